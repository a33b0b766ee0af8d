"""Removing files so that a death at any moment, or a writer, does no harm.

What goes is renamed first, then looked at once more: whoever freshened it
before that gets it back, and whoever looks for it afterwards finds it gone
and writes it again. A folder that was renamed loses its index first, so that
what a killed `gc` leaves is either whole, and is put back by the next one, or
goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping

from patchjax.history.files import LOCK, TEMPORARY, Files
from patchjax.history.index import INDEX

_REMOVED = f"{TEMPORARY}gc-"


class Bin:
  """Where the files of a repository go.

  Attributes:
    files: files of the repository.
    cutoff: time before which a file must have been touched last to go.
  """

  def __init__(self, files: Files, cutoff: float):
    self.files = files
    self.cutoff = cutoff

  def recover(self) -> None:
    """Puts back what a killed `gc` was about to remove, where it is whole."""
    for key in self.files.leftovers():
      folder, _, name = key.rpartition("/")
      if not name.startswith(_REMOVED):
        continue
      path = self.files.path(key)
      real = self.files.path(f"{folder}/{name[len(_REMOVED) + 33 :]}")
      whole = not os.path.isdir(path) or os.path.exists(f"{path}/{INDEX}")
      if whole and not os.path.exists(real):
        os.rename(path, real)
      else:
        delete(path)

  def remove(self, key: str, *, always: bool = False) -> bool:
    """Removes an object, a payload or a blob, unless it is in use again.

    Args:
      key: key of the file or folder.
      always: whether it goes even if it is in use: all of it lies elsewhere.

    Returns:
      Whether it is gone.
    """
    path = self.files.path(key)
    folder, name = os.path.split(path)
    away = os.path.join(folder, f"{_REMOVED}{uuid.uuid4().hex}-{name}")
    try:
      os.rename(path, away)
    except FileNotFoundError:
      return True  # somebody moved it out of the repository
    if not always and touched(away) >= self.cutoff:
      os.rename(away, path)
      return False
    delete(away)
    return True

  def leftovers(self) -> list[str]:
    """Returns the keys that killed writers left behind, locks included."""
    found = self.files.leftovers()
    found += [
      f"payloads/{name}"
      for name in self.files.names("payloads")
      if not self.files.exists(f"payloads/{name}/{INDEX}")
    ]
    # Stale ones are in nobody's way, but they are not refs either.
    for folder, _, names in os.walk(self.files.path("refs")):
      place = os.path.relpath(folder, self.files.root).replace(os.sep, "/")
      found += [f"{place}/{name}" for name in names if name.endswith(LOCK)]
    return found


def touched(path: str) -> float:
  """Returns when an object or a pack was written or freshened.

  Args:
    path: a file, or the folder of a payload, whose index says it.
  """
  inside = os.path.join(path, INDEX)
  try:
    return os.stat(inside if os.path.isdir(path) else path).st_mtime
  except FileNotFoundError:
    return newest(path)


def newest(path: str) -> float:
  """Returns when anything at or below a path was written last.

  Args:
    path: a file or folder; 0 if it does not exist.
  """
  time = 0.0
  for place, _, names in os.walk(path):
    for inside in (place, *(os.path.join(place, name) for name in names)):
      with contextlib.suppress(FileNotFoundError):
        time = max(time, os.stat(inside).st_mtime)
  with contextlib.suppress(FileNotFoundError):
    time = max(time, os.stat(path).st_mtime)
  return time


def size_of(path: str) -> int:
  """Returns the bytes of a file, or of all files below a folder.

  Args:
    path: the file or folder; 0 if it does not exist.
  """
  size = 0
  if not os.path.isdir(path):
    with contextlib.suppress(FileNotFoundError):
      size = os.stat(path).st_size
  for place, _, names in os.walk(path):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        size += os.stat(os.path.join(place, name)).st_size
  return size


def sweep(
  nodes: Mapping[str, Iterable[str]], remove: Callable[[str], bool]
) -> list[str]:
  """Removes things, users before what they use.

  At every moment whatever is left has all that it uses; what could not be
  removed keeps all that it uses too.

  Args:
    nodes: `{thing: what it uses}`; what is no thing itself does not matter.
    remove: removes one thing, and returns whether it is gone.

  Returns:
    What was removed, in order.

  Example:
    >>> sweep({"tree": [], "commit": ["tree"], "other": []}, lambda key: True)
    ['other', 'commit', 'tree']
  """
  uses = {
    key: {other for other in used if other in nodes and other != key}
    for key, used in nodes.items()
  }
  users = dict.fromkeys(nodes, 0)
  for used in uses.values():
    for key in used:
      users[key] += 1
  ready = [key for key, count in users.items() if not count]
  gone: dict[str, None] = {}  # in order
  used: set[str] = set()  # by what is in use again
  while ready:
    key = ready.pop()
    if not remove(key):
      used |= _below(key, uses)
      continue
    gone[key] = None
    for other in uses[key]:
      users[other] -= 1
      if not users[other]:
        ready.append(other)
  # What is left is in use, or payloads with bases in each other.
  for key in nodes:
    if key not in gone and key not in used:
      if remove(key):
        gone[key] = None
      else:
        used |= _below(key, uses)
  return list(gone)


def _below(key: str, uses: Mapping[str, Iterable[str]]) -> set[str]:
  """Returns a thing and all that it uses."""
  found, stack = {key}, [key]
  while stack:
    new = set(uses[stack.pop()]) - found
    found |= new
    stack += new
  return found


def delete(path: str) -> None:
  """Removes a file or folder, the index of a payload first.

  Args:
    path: the file or folder; one that does not exist is no error.
  """
  if not os.path.isdir(path):
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    return
  # From here on it is no payload any more.
  with contextlib.suppress(FileNotFoundError):
    os.unlink(os.path.join(path, INDEX))
  shutil.rmtree(path, ignore_errors=True)
