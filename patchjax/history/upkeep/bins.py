"""Removing files so that a death at any moment, or a writer, does no harm.

What goes is renamed first, then looked at once more: whoever freshened it
before that gets it back, and whoever looks for it afterwards finds it gone
and writes it again. A folder that was renamed loses its index first, so that
what a killed `gc` leaves is either whole, and is put back by the next one, or
goes.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection

from patchjax.history.arrays.index import INDEX
from patchjax.history.storage.files import LOCK, TEMPORARY, Files
from patchjax.trees.errors import ConflictError, IntegrityError

_REMOVED = f"{TEMPORARY}gc-"
_LEDGER = "gc.json"


class Bin(abc.ABC):
  """Where the files of a repository go.

  Attributes:
    files: files of the repository.
    cutoff: time before which a file must have been touched last to go.
  """

  def __init__(self, files: Files, cutoff: float):
    self.files = files
    self.cutoff = cutoff

  @abc.abstractmethod
  def fresh(self, key: str) -> bool:
    """Returns whether an object or a pack is within the grace period.

    Args:
      key: key of the file or folder.
    """

  @abc.abstractmethod
  def stale(self, key: str) -> bool:
    """Returns whether nobody can be at work on a leftover any more.

    Args:
      key: key of the file or folder.
    """

  @abc.abstractmethod
  def note(self, keys: Collection[str]) -> None:
    """Is told what could go if it were old enough.

    Args:
      keys: keys of files and folders.
    """

  @abc.abstractmethod
  def recover(self) -> None:
    """Puts back what a killed `gc` was about to remove, where it is whole."""

  @abc.abstractmethod
  def remove(self, key: str, *, always: bool = False) -> bool:
    """Removes an object, a payload or a blob, unless it is in use again.

    Args:
      key: key of the file or folder.
      always: whether it goes even if it is in use: all of it lies elsewhere.

    Returns:
      Whether it is gone.
    """

  @abc.abstractmethod
  def discard(self, key: str) -> bool:
    """Removes a leftover, unless somebody is at work on it again.

    Args:
      key: key of the file or folder.

    Returns:
      Whether it is gone.
    """

  @abc.abstractmethod
  def delete(self, key: str) -> None:
    """Removes anything else, whoever uses it.

    Args:
      key: key of the file or folder.
    """

  @abc.abstractmethod
  def size(self, key: str) -> int:
    """Returns the bytes that something takes; 0 where a store does not tell.

    Args:
      key: key of the file or folder.
    """


class LocalBin(Bin):
  """Removes files of this machine, which know when they were touched."""

  def fresh(self, key: str) -> bool:
    return touched(self.files.path(key)) >= self.cutoff

  def stale(self, key: str) -> bool:
    return newest(self.files.path(key)) < self.cutoff

  def note(self, keys: Collection[str]) -> None:
    del keys  # their times are theirs

  def delete(self, key: str) -> None:
    delete(self.files.path(key))

  def size(self, key: str) -> int:
    return size_of(self.files.path(key))

  def recover(self) -> None:
    for key in self.files.leftovers():
      folder, _, name = key.rpartition("/")
      if not name.startswith(_REMOVED):
        continue
      path = self.files.path(key)
      real = self.files.path(f"{folder}/{name[len(_REMOVED) + 33 :]}")
      whole = not os.path.isdir(path) or os.path.exists(f"{path}/{INDEX}")
      if whole and not os.path.exists(real):
        os.rename(path, real)
      elif os.path.isdir(path) and newest(path, folders=False) >= self.cutoff:
        _put_back(path, real)  # somebody was at work on it
      else:
        delete(path)

  def remove(self, key: str, *, always: bool = False) -> bool:
    path = self.files.path(key)
    away = _take_away(path)
    if away is None:
      return True
    if not always and touched(away) >= self.cutoff:
      _put_back(away, path)
      return False
    delete(away)
    return True

  def discard(self, key: str) -> bool:
    path = self.files.path(key)
    if key.endswith(LOCK):
      # One that came back could take the place of a new one, so that two
      # would hold it; TensorStore copes with one that vanishes.
      delete(path)
      return True
    away = _take_away(path)
    if away is None:
      return True
    if newest(away) >= self.cutoff:
      _put_back(away, path)
      return False
    delete(away)
    return True


def _take_away(path: str) -> str | None:
  """Renames what is to go; returns where it is now, None if it was gone."""
  folder, name = os.path.split(path)
  away = os.path.join(folder, f"{_REMOVED}{uuid.uuid4().hex}-{name}")
  try:
    os.rename(path, away)
  except FileNotFoundError:
    return None  # its writer came to an end, or somebody moved it elsewhere
  return away


def _put_back(away: str, path: str) -> None:
  """Gives back what is in use, beside what was written meanwhile."""
  try:
    os.rename(away, path)
    return
  except OSError:
    if not os.path.isdir(away):
      raise
  # Whoever is at work has made the folder anew.
  for folder, _, names in os.walk(away):
    place = os.path.normpath(os.path.join(path, os.path.relpath(folder, away)))
    os.makedirs(place, exist_ok=True)
    for name in names:
      if not os.path.exists(os.path.join(place, name)):
        os.rename(os.path.join(folder, name), os.path.join(place, name))
  delete(away)


class StoreBin(Bin):
  """Removes files in a bucket, which do not know when they were touched.

  What could go is written down with the time at which it was first seen so;
  it goes when that is long enough ago.
  """

  def __init__(self, files: Files, cutoff: float):
    super().__init__(files, cutoff)
    self._now = time.time()
    try:
      self._ledger = files.read(_LEDGER)
      self._seen: dict[str, float] = json.loads(self._ledger)
    except FileNotFoundError:
      self._ledger, self._seen = None, {}
    except ValueError as error:
      raise IntegrityError(
        f"{files.path(_LEDGER)} is damaged: {error}; remove the file: a gc "
        "writes it anew, and waits for its grace period again"
      ) from error

  def fresh(self, key: str) -> bool:
    return self._seen.get(key, self._now) >= self.cutoff

  def stale(self, key: str) -> bool:
    return not self.fresh(key)

  def note(self, keys: Collection[str]) -> None:
    seen = {key: self._seen.get(key, self._now) for key in sorted(keys)}
    if seen != self._seen:
      new = json.dumps(seen).encode()
      if not self.files.swap(_LEDGER, old=self._ledger, new=new):
        raise ConflictError(
          f"another gc is at work in {self.files.root}: wait for its end"
        )
      self._seen, self._ledger = seen, new

  def recover(self) -> None:
    pass  # what goes is not moved before

  def remove(self, key: str, *, always: bool = False) -> bool:
    del always
    self.delete(key)
    return True

  def discard(self, key: str) -> bool:
    return self.remove(key)

  def delete(self, key: str) -> None:
    if key.startswith("payloads/"):
      # From here on it is no payload any more.
      self.files.delete(f"{key}/{INDEX}")
    self.files.delete(key)

  def size(self, key: str) -> int:
    return 0


def bin_of(files: Files, cutoff: float) -> Bin:
  """Returns the bin of a repository.

  Args:
    files: files of the repository.
    cutoff: time before which a file must have been touched last to go.
  """
  return (LocalBin if files.local else StoreBin)(files, cutoff)


def leftovers(files: Files) -> list[str]:
  """Returns the keys that killed writers left behind, locks included.

  Args:
    files: files of the repository.
  """
  found = files.leftovers()
  whole = files.holding("payloads", INDEX)
  found += [
    f"payloads/{name}"
    for name in files.names("payloads")
    if name not in set(whole)
  ]
  if files.local:
    # Stale locks are in nobody's way, but they are not refs either.
    for folder, _, names in os.walk(files.path("refs")):
      place = os.path.relpath(folder, files.root).replace(os.sep, "/")
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


def newest(path: str, *, folders: bool = True) -> float:
  """Returns when anything at or below a path was written last.

  Args:
    path: a file or folder; 0 if it does not exist.
    folders: whether the times of folders count, which what is removed from
      them changes too.
  """
  time = 0.0
  for place, _, names in os.walk(path):
    found = [os.path.join(place, name) for name in names]
    for inside in (place, *found) if folders else found:
      with contextlib.suppress(FileNotFoundError):
        time = max(time, os.stat(inside).st_mtime)
  if not folders:
    return time
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
