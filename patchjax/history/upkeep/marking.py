"""What is reachable: from the refs and the reflog to every leaf they need.

Works on objects alone; imports no array library before it meets a tree.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from patchjax.history.storage.files import Files
from patchjax.history.storage.objects import Objects, is_id, key_of
from patchjax.history.storage.reflog import LOGS
from patchjax.history.storage.refs import NOTES, id_in
from patchjax.trees.errors import IntegrityError

if TYPE_CHECKING:
  from patchjax.trees.digest import Entry

FILE = "file"
"""Kind of an object that is none of ours: a patch file, for one."""


@dataclasses.dataclass(frozen=True)
class Links:
  """What one object refers to.

  Attributes:
    kind: `commit`, `tree`, `note` or `file`.
    needs: ids of the objects it cannot do without.
    parents: ids of the commits before a commit; a shallow clone lacks some.
    leaves: the leaves that it names itself.
  """

  kind: str
  needs: tuple[str, ...] = ()
  parents: tuple[str, ...] = ()
  leaves: tuple[Entry, ...] = ()


def links(data: bytes) -> Links:
  """Returns what an intact object refers to.

  A note does not need its commit: it goes when the commit has gone.

  Args:
    data: the bytes of the object.

  Example:
    >>> links(b'{"type": "note", "commit": "ab", "previous": null}')
    Links(kind='note', needs=(), parents=(), leaves=())
  """
  try:
    spelled = json.loads(data)
    kind = spelled["type"]
  except (ValueError, TypeError, KeyError):
    return Links(FILE)
  if kind == "commit":
    ids = (spelled["tree"], spelled.get("patch"))
    needs = tuple(id_ for id_ in ids if id_ is not None)
    return Links(kind, needs, tuple(spelled["parents"]))
  if kind == "note":
    previous = spelled["previous"]
    return Links(kind, () if previous is None else (previous,))
  if kind == "tree":
    return _folder(spelled["entries"])
  return Links(FILE)


def _folder(entries: dict[str, dict[str, Any]]) -> Links:
  from patchjax.trees.digest import Entry

  trees = tuple(item["tree"] for item in entries.values() if "tree" in item)
  leaves = tuple(
    Entry(item["digest"], item["dtype"], tuple(item["shape"]))
    for item in entries.values()
    if "tree" not in item
  )
  return Links("tree", trees, leaves=leaves)


class Marks:
  """The objects and leaves found reachable so far.

  Attributes:
    objects: ids of the objects.
    leaves: `{digest: entry}` of the leaves that have bits.
    absent: `{id: why}` of the objects that cannot be read.
  """

  def __init__(self, objects: Objects, boundary: Iterable[str] = ()):
    """Marks nothing yet.

    Args:
      objects: objects of the repository.
      boundary: ids of commits whose parents are known to be elsewhere.
    """
    self._objects = objects
    self._boundary = frozenset(boundary)
    self.objects: set[str] = set()
    self.leaves: dict[str, Entry] = {}
    self.absent: dict[str, str] = {}

  def extend(self, roots: Iterable[str]) -> None:
    """Marks objects, and all that they need.

    Args:
      roots: ids of objects.
    """
    stack = [id_ for id_ in roots if id_ not in self.objects]
    while stack:
      id_ = stack.pop()
      if id_ in self.objects:
        continue
      self.objects.add(id_)
      try:
        found = links(self._objects.read(id_))
      except IntegrityError as error:
        self.absent[id_] = str(error)
        continue
      stack += found.needs
      if id_ not in self._boundary:
        stack += found.parents
      self.leaves.update((e.digest, e) for e in found.leaves if e.size)


def roots(files: Files) -> list[str]:
  """Returns the ids that refs, other than notes, hold.

  Of every file there is, whatever its name: what one may name must stay.

  Args:
    files: files of the repository.

  Raises:
    IntegrityError: if one of them is damaged.
  """
  keys = [key for key in files.walk("refs") if not key.startswith(f"{NOTES}/")]
  # A ref that was removed since it was listed holds nothing.
  found = files.read_all(keys)
  return [id_in(data, key, files.path(key)) for key, data in found.items()]


def logged(files: Files, *, since: float) -> list[str]:
  """Returns the ids that reflog entries name, as far as they are there.

  Those of a move that never came may not have been written, or in part.

  Args:
    files: files of the repository.
    since: seconds since 1970; older entries hold nothing.

  Raises:
    IntegrityError: if an entry is damaged.
  """
  found: dict[str, None] = {}
  for key in files.walk(LOGS):
    if _time(key) >= since:
      found |= dict.fromkeys(moved(files, key))
  return [id_ for id_ in found if files.exists(key_of(id_))]


def expired(files: Files, before: float) -> list[str]:
  """Returns the keys of the reflog entries older than a time.

  Args:
    files: files of the repository.
    before: seconds since 1970.
  """
  return [key for key in files.walk(LOGS) if _time(key) < before]


def moved(files: Files, key: str) -> list[str]:
  """Returns the ids that a reflog entry names: from where, and to where.

  Args:
    files: files of the repository.
    key: key of the entry.

  Raises:
    IntegrityError: if it is damaged.
  """
  try:
    spelled = json.loads(files.read(key))
    ids = [spelled["old"], spelled["new"]]
  except FileNotFoundError:
    return []  # its move was lost since it was listed
  except (ValueError, TypeError, KeyError) as error:
    raise IntegrityError(
      f"reflog entry {key} is damaged: {error}; remove the file: only the "
      "memory of one move goes with it"
    ) from error
  return [id_ for id_ in ids if isinstance(id_, str) and is_id(id_)]


def _time(key: str) -> float:
  """Returns when a reflog entry was written: its name says it."""
  digits = key.rpartition("/")[2].partition("-")[0]
  return int(digits) / 1e9 if digits.isdecimal() else math.inf
