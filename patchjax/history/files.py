"""The files of a repository: immutable values, and a few that are swapped.

Everything under a repository but its refs is written once and never changed.
A value appears under its name only when it is whole and on the disk: it is
written to a temporary file, synced and renamed. Refs are compared and swapped
through a TensorStore key-value store, which locks across processes; reading
them needs plain file access only, so listing a history imports no TensorStore.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping

from patchjax.history.threads import each
from patchjax.trees.errors import RepositoryError

TEMPORARY = ".tmp-"
"""Prefix of files being written; what a killed process leaves behind."""

LOCK = ".__lock"
"""TensorStore's suffix of lock files."""


class Files:
  """The files under one root directory, by `/`-separated keys.

  Attributes:
    root: absolute path of the directory.
  """

  def __init__(self, root: str):
    self.root = root

  def path(self, key: str) -> str:
    """Returns the path of a key.

    Args:
      key: `/`-separated key.
    """
    return os.path.join(self.root, *key.split("/"))

  def read(self, key: str) -> bytes:
    """Returns the bytes under a key.

    Args:
      key: `/`-separated key.

    Raises:
      FileNotFoundError: if there are none.
    """
    with open(self.path(key), "rb") as file:
      return file.read()

  def exists(self, key: str) -> bool:
    """Returns whether there is a file or folder under a key."""
    return os.path.exists(self.path(key))

  def names(self, folder: str) -> list[str]:
    """Returns the sorted names directly in a folder, temporaries left out.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """
    return sorted(n for n in self.listing(folder) if not is_temporary(n))

  def listing(self, folder: str) -> list[str]:
    """Returns all names directly in a folder, as they come.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """
    try:
      return os.listdir(self.path(folder))
    except (FileNotFoundError, NotADirectoryError):
      return []

  def walk(self, folder: str) -> Iterator[str]:
    """Yields the keys of all files below a folder, temporaries left out.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """
    for name in self.names(folder):
      key = f"{folder}/{name}"
      if os.path.isdir(self.path(key)):
        yield from self.walk(key)
      else:
        yield key

  def freshen(self, key: str) -> bool:
    """Sets the time of a file to now, so that no `gc` takes it from us.

    Who finds that a value is stored already, and is going to refer to it,
    freshens it first.

    Args:
      key: `/`-separated key.

    Returns:
      Whether it is there and is fresh now; if not, write it again.
    """
    try:
      os.utime(self.path(key))
    except OSError:  # gone; or somebody else's, which only they can freshen
      return False
    return True

  def leftovers(self) -> list[str]:
    """Returns the keys that killed writers left behind; safe to remove."""
    found = []
    for folder, folders, names in os.walk(self.root):
      place = os.path.relpath(folder, self.root).replace(os.sep, "/")
      found += [
        name if place == "." else f"{place}/{name}"
        for name in folders + names
        if is_temporary(name) and not name.endswith(LOCK)
      ]
    return sorted(found)

  def write(self, key: str, data: bytes) -> None:
    """Writes an immutable value; see `write_all`.

    Args:
      key: `/`-separated key.
      data: the bytes.
    """
    self.write_all({key: data})

  def write_all(self, values: Mapping[str, bytes]) -> None:
    """Writes immutable values, each of them whole or not at all.

    Two writers of one key write the same bytes, so it does not matter whose
    rename comes last. When this returns, the values survive a power failure.

    Args:
      values: `{key: bytes}`.

    Raises:
      OSError: if the disk is full or the path cannot be written.
    """
    folders = {os.path.dirname(self.path(key)) for key in values}
    for folder in folders:
      os.makedirs(folder, exist_ok=True)
    # Syncing is waiting: files synced at once share a turn of the journal.
    each(self._write_one, values.items())
    each(_sync_folder, folders)

  def _write_one(self, item: tuple[str, bytes]) -> None:
    path = self.path(item[0])
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}-{name}")
    try:
      with open(temporary, "xb") as file:
        file.write(item[1])
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise

  def delete(self, key: str) -> None:
    """Removes a value; does nothing if there is none.

    Args:
      key: `/`-separated key.
    """
    with contextlib.suppress(FileNotFoundError):
      os.unlink(self.path(key))

  def prune(self, key: str) -> None:
    """Removes folders without files, so that a value can have their name.

    Args:
      key: `/`-separated key.
    """
    for folder, _, _ in os.walk(self.path(key), topdown=False):
      with contextlib.suppress(OSError):  # not empty, or gone already
        os.rmdir(folder)

  def swap(self, key: str, *, old: bytes | None, new: bytes | None) -> bool:
    """Replaces the value of a key if it still is what the caller has seen.

    Args:
      key: `/`-separated key.
      old: the value it must have; None if it must not exist.
      new: the value to write; None removes it.

    Returns:
      Whether it was replaced. False means that somebody else was faster.

    Raises:
      RepositoryError: if the file cannot be written.
    """
    # TensorStore takes a third of a second to import; readers never need it.
    import tensorstore as ts

    try:
      store = ts.KvStore.open(
        {"driver": "file", "path": self.root.rstrip("/") + "/"}
      ).result()
      found = store.read(key).result()
      seen = bytes(found.value) if found.state == "value" else None
      if seen != old:
        return False
      # A lost swap does not raise: it answers with an empty generation.
      written = store.write(key, new, if_equal=found.stamp.generation).result()
    except (ValueError, OSError, NotImplementedError) as error:
      # The last is TensorStore's word for what a file system does not do.
      raise RepositoryError(
        f"could not write {self.path(key)}: {error}\n"
        "free some space or make the path writable, and try again; what "
        "was written so far stays invisible"
      ) from error
    return written.generation != b""


def is_temporary(name: str) -> bool:
  """Returns whether a file name is that of a file being written.

  Args:
    name: last part of a path.

  Example:
    >>> is_temporary(".tmp-12-x"), is_temporary("main")
    (True, False)
  """
  # The last is Orbax's: `<name>.orbax-checkpoint-tmp`.
  return (
    name.startswith(TEMPORARY)
    or name.endswith(LOCK)
    or ".orbax-checkpoint-tmp" in name
  )


def _sync_folder(folder: str) -> None:
  """Makes renames in a folder survive a power failure, where that exists."""
  if os.name == "nt":
    return  # folders cannot be opened there
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
