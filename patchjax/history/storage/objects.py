"""Objects: immutable JSON under the SHA-256 of its bytes.

A commit names a tree, its parents and its provenance; a tree names digests
and subtrees, so that equal folders of two versions are one object, as in git;
a note attaches a fact (a verdict, a release) to a commit. Patch files that
were submitted lie among them byte for byte. Objects say what a value *is*;
where its bits lie is the business of payload indices, so that repacking never
changes an id.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.trees.errors import IntegrityError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.storage.files import Files
  from patchjax.trees.digest import Entry


_FOLDERS = 4096  # kept in memory, least recently used go first


@dataclasses.dataclass(frozen=True)
class Commit:
  """One version of a value, and how it came about.

  Attributes:
    id: hex digest of the commit object.
    tree: id of the value: names, dtypes, shapes and bits.
    parents: ids of the commits it was made from; more than one for a merge.
    message: what was done.
    author: by whom.
    time: when, in ISO 8601 with time zone.
    recipe: how a merge was computed; None otherwise.
    patch: id of the patch file that was submitted; None otherwise.
    order: a time later than those of its parents, where `time` is not: clocks
      disagree, and histories are imported. None otherwise.
  """

  id: str
  tree: str
  parents: tuple[str, ...]
  message: str
  author: str
  time: str
  recipe: dict[str, Any] | None = None
  patch: str | None = None
  order: str | None = None

  @property
  def position(self) -> str:
    """A text that sorts after those of all commits before it.

    Walking a history by it meets children before parents, without looking
    ahead.
    """
    return self.order or self.time

  @property
  def when(self) -> datetime.datetime:
    """The time as a datetime."""
    return datetime.datetime.fromisoformat(self.time)

  @property
  def title(self) -> str:
    """First line of the message."""
    return self.message.partition("\n")[0]

  def to_json(self) -> dict[str, Any]:
    """Returns the commit as a JSON-able dict, its id included."""
    return {**dataclasses.asdict(self), "parents": list(self.parents)}


_COMMIT_FIELDS = {field.name for field in dataclasses.fields(Commit)} - {"id"}


def spell(value: dict[str, Any]) -> bytes:
  """Returns the bytes of an object.

  Args:
    value: what it says.

  Raises:
    RepositoryError: if that is no JSON (NaN and Inf are none either).
  """
  from patchjax.trees.digest import canonical_json

  try:
    return canonical_json(value)
  except (TypeError, ValueError) as error:
    raise RepositoryError(
      f"cannot be stored as JSON: {error}; give dicts with text keys, lists, "
      "texts, finite numbers, booleans or None"
    ) from error


def commit_bytes(
  *,
  tree: str,
  parents: tuple[str, ...],
  message: str,
  author: str,
  time: str,
  recipe: dict[str, Any] | None,
  patch: str | None,
  order: str | None = None,
) -> bytes:
  """Returns the bytes of a commit object; arguments as in `Commit`."""
  spelled: dict[str, Any] = {
    "type": "commit",
    "tree": tree,
    "parents": list(parents),
    "message": message,
    "author": author,
    "time": time,
  }
  # Absent rather than null: an id does not depend on features unused.
  if recipe is not None:
    spelled["recipe"] = recipe
  if patch is not None:
    spelled["patch"] = patch
  if order is not None:
    spelled["order"] = order
  return spell(spelled)


def id_of(data: bytes) -> str:
  """Returns the id of an object: the SHA-256 of its bytes.

  Args:
    data: the bytes.
  """
  return hashlib.sha256(data).hexdigest()


def is_id(text: str) -> bool:
  """Returns whether a text has the form of an object id.

  Args:
    text: any text.

  Example:
    >>> is_id("ab" * 32), is_id("main")
    (True, False)
  """
  return len(text) == 64 and set(text) <= set("0123456789abcdef")


def key_of(name: str) -> str:
  """Returns the key of the file of an object.

  Args:
    name: id of the object.

  Example:
    >>> key_of("ab" * 32)[:12]
    'objects/ab/a'
  """
  return f"objects/{name[:2]}/{name[2:]}"


def _parse(name: str, data: bytes, kind: str) -> dict[str, Any]:
  try:
    spelled = json.loads(data)
    found = spelled["type"]
  except (ValueError, TypeError, KeyError) as error:
    raise IntegrityError(f"object {name} is no {kind}") from error
  if found != kind:
    raise IntegrityError(f"object {name}: expected a {kind}, found a {found}")
  return spelled


def parse_commit(name: str, data: bytes) -> Commit:
  """Returns the commit that an object spells out.

  Args:
    name: its id.
    data: its bytes.

  Raises:
    IntegrityError: if it is no commit.
  """
  spelled = _parse(name, data, "commit")
  # Fields that a newer version may add do not concern this one.
  known = {k: v for k, v in spelled.items() if k in _COMMIT_FIELDS}
  try:
    known["parents"] = tuple(known["parents"])
    return Commit(id=name, **known)
  except (KeyError, TypeError) as error:
    raise IntegrityError(f"commit {name} lacks a field: {error}") from error


def parse_folder(name: str, data: bytes) -> dict[str, Entry | str]:
  """Returns what a tree object holds itself; see `Objects.folder`.

  Args:
    name: its id.
    data: its bytes.

  Raises:
    IntegrityError: if it is no tree.
  """
  from patchjax.trees.digest import Entry

  return {
    part: item["tree"]
    if "tree" in item
    else Entry(item["digest"], item["dtype"], tuple(item["shape"]))
    for part, item in _parse(name, data, "tree")["entries"].items()
  }


class Objects:
  """The objects of a repository. Every read is verified.

  Attributes:
    files: where they lie.
  """

  def __init__(self, files: Files):
    self.files = files
    self._commits: dict[str, Commit] = {}
    # Folders of recent trees: a commit starts from those of its parent.
    self._folders: collections.OrderedDict[str, dict[str, Entry | str]] = (
      collections.OrderedDict()
    )

  def write(self, data: bytes) -> str:
    """Stores bytes and returns their id.

    Args:
      data: the bytes.
    """
    name = id_of(data)
    self.write_all({name: data})
    return name

  def write_all(
    self,
    objects: Mapping[str, bytes],
    beside: Mapping[str, bytes] | None = None,
  ) -> None:
    """Stores objects; what is stored already is freshened, not written again.

    Args:
      objects: `{id: bytes}`.
      beside: `{key: bytes}` of other files to write in the same go.
    """
    new = {
      key_of(name): data
      for name, data in objects.items()
      if not self._holds(name, len(data))
    }
    self.files.write_all({**new, **(beside or {})})

  def freshen(self, name: str) -> None:
    """Keeps an object, and all that it needs, from a `gc` under way.

    Args:
      name: its id.

    Raises:
      IntegrityError: if it is gone.
    """
    key = key_of(name)
    # What belongs to another user cannot be freshened: it is there, at least.
    if not self.files.freshen(key) and not self.files.exists(key):
      raise IntegrityError(
        f"object {name} is missing: expected the file {self.files.path(key)}; "
        "nothing refers to it any more, and gc has removed it"
      )

  def _holds(self, name: str, size: int) -> bool:
    # A damaged file of another length is written over; fsck finds the rest.
    # Fresh before it is looked at: from then on a `gc` leaves it alone.
    key = key_of(name)
    return self.files.freshen(key) and self.files.holds(key, size)

  def read(self, name: str) -> bytes:
    """Returns the bytes of an object.

    Args:
      name: its id.

    Raises:
      IntegrityError: if it is missing, or is not what its id says.
    """
    path = self.files.path(key_of(name))
    try:
      data = self.files.read(key_of(name))
    except FileNotFoundError as error:
      raise IntegrityError(
        f"object {name} is missing: expected the file {path}; "
        "copy it from another copy of the repository, or commit the same "
        "value again"
      ) from error
    found = id_of(data)
    if found != name:
      raise IntegrityError(
        f"object {name} is damaged: the bytes of {path} have the digest "
        f"{found}; remove the file, then copy it from another copy of the "
        "repository, or commit the same value again"
      )
    return data

  def commit(self, name: str) -> Commit:
    """Returns a commit.

    Args:
      name: its id.

    Raises:
      IntegrityError: if it is missing, damaged, or no commit.
    """
    if name not in self._commits:
      self._commits[name] = parse_commit(name, self.read(name))
    return self._commits[name]

  def parents(self, name: str) -> tuple[str, ...]:
    """Returns the ids of the parents with which a history goes on.

    Args:
      name: id of a commit; where a shallow history was cut it has none.
    """
    return () if name in self.shallow else self.commit(name).parents

  @functools.cached_property
  def shallow(self) -> frozenset[str]:
    """The commits whose parents were not copied; see `shallow`."""
    from patchjax.history.storage import shallow

    return shallow.read(self.files)

  def note(self, name: str) -> dict[str, Any]:
    """Returns a note; see `notes`.

    Args:
      name: its id.
    """
    return _parse(name, self.read(name), "note")

  def folder(self, name: str) -> dict[str, Entry | str]:
    """Returns what a tree object holds itself.

    Args:
      name: id of the tree.

    Returns:
      `{part: entry of a leaf, or id of a subtree}`.

    Raises:
      IntegrityError: if it is missing or damaged.
    """
    if name in self._folders:
      self._folders.move_to_end(name)
      return self._folders[name]
    folder = parse_folder(name, self.read(name))
    self._folders[name] = folder
    if len(self._folders) > _FOLDERS:
      self._folders.popitem(last=False)
    return folder

  def tree(self, name: str) -> dict[str, Entry]:
    """Returns the leaves of a tree by text name, in the order of the names.

    Args:
      name: id of the tree.

    Raises:
      IntegrityError: if it or a subtree is missing or damaged.
    """
    from patchjax.trees.names import join

    leaves: dict[str, Entry] = {}

    def visit(name: str, parents: tuple[str, ...]) -> None:
      for part, item in self.folder(name).items():
        if isinstance(item, str):
          visit(item, (*parents, part))
        else:
          leaves[join((*parents, part))] = item

    visit(name, ())
    return leaves

  def forget(self) -> None:
    """Drops what was read before: some of it may have been removed."""
    self._commits.clear()
    self._folders.clear()
    self.__dict__.pop("shallow", None)

  def with_prefix(self, prefix: str) -> list[str]:
    """Returns the ids of the objects that start with a prefix.

    Args:
      prefix: at least two hex digits.
    """
    folder = f"objects/{prefix[:2]}"
    return [
      prefix[:2] + name
      for name in self.files.names(folder)
      if name.startswith(prefix[2:])
    ]
