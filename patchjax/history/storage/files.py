"""The files of a repository: immutable values, and a few that are swapped.

Everything under a repository but its refs is written once and never changed.
A value appears under its name only when it is whole and safe: on a disk it is
written to a temporary file, synced and renamed; a key-value store (`stores`)
writes it in one request. Refs are compared and swapped through TensorStore,
which locks across processes; reading local files imports no TensorStore.
"""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from patchjax.history.storage.threads import each
from patchjax.trees.errors import RepositoryError

TEMPORARY = ".tmp-"
"""Prefix of files being written; what a killed process leaves behind."""

PIECE = 8 << 20
"""Bytes of a large file that are in memory at a time while it is copied."""

LOCK = ".__lock"
"""TensorStore's suffix of lock files."""


class Files(abc.ABC):
  """The files under one root, by `/`-separated keys.

  Attributes:
    root: absolute path of a folder, or a URL.
    local: whether the paths are those of files on this machine.
  """

  root: str
  local: bool

  @abc.abstractmethod
  def path(self, key: str) -> str:
    """Returns the path or URL of a key.

    Args:
      key: `/`-separated key.
    """

  @abc.abstractmethod
  def spec(self, key: str) -> dict[str, Any]:
    """Returns the TensorStore specification of the store below a folder.

    Args:
      key: key of the folder.
    """

  @abc.abstractmethod
  def cache(self, name: str) -> str:
    """Returns the local path of a file that can be rebuilt at any time.

    Args:
      name: name of the file.
    """

  @abc.abstractmethod
  def read(self, key: str) -> bytes:
    """Returns the bytes under a key.

    Args:
      key: `/`-separated key.

    Raises:
      FileNotFoundError: if there are none.
    """

  @abc.abstractmethod
  def read_range(self, key: str, start: int, stop: int) -> bytes:
    """Returns some of the bytes under a key; fewer where it ends before.

    Args:
      key: `/`-separated key.
      start: the first byte.
      stop: the byte after the last.

    Raises:
      FileNotFoundError: if there is no such file.
    """

  @abc.abstractmethod
  def size(self, key: str) -> int | None:
    """Returns how many bytes a file has; None where that takes a read.

    Args:
      key: `/`-separated key.

    Raises:
      FileNotFoundError: if there is no such file.
    """

  @abc.abstractmethod
  def exists(self, key: str) -> bool:
    """Returns whether there is a file or folder under a key."""

  @abc.abstractmethod
  def holds(self, key: str, size: int) -> bool:
    """Returns whether an immutable file need not be written again.

    Args:
      key: `/`-separated key.
      size: how many bytes it must have: a damaged file is written over.
    """

  @abc.abstractmethod
  def listing(self, folder: str) -> list[str]:
    """Returns all names directly in a folder, as they come.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """

  @abc.abstractmethod
  def walk(self, folder: str) -> Iterator[str]:
    """Yields the keys of all files below a folder, temporaries left out.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """

  @abc.abstractmethod
  def leftovers(self) -> list[str]:
    """Returns the keys that killed writers left behind; safe to remove."""

  @abc.abstractmethod
  def freshen(self, key: str) -> bool:
    """Sets the time of a file to now, so that no `gc` takes it from us.

    Who finds that a value is stored already, and is going to refer to it,
    freshens it first.

    Args:
      key: `/`-separated key.

    Returns:
      Whether it is there and is fresh now; if not, write it again.
    """

  @abc.abstractmethod
  def write_all(self, values: Mapping[str, bytes]) -> None:
    """Writes immutable values, each of them whole or not at all.

    Two writers of one key write the same bytes, so it does not matter whose
    write comes last. When this returns, the values survive a power failure.

    Args:
      values: `{key: bytes}`.

    Raises:
      OSError: if the disk is full or the path cannot be written.
      RepositoryError: if a store refuses.
    """

  @abc.abstractmethod
  def write_pieces(self, key: str, pieces: Iterable[bytes]) -> None:
    """Writes one immutable value that comes in pieces; see `write_all`.

    Args:
      key: `/`-separated key.
      pieces: its bytes, in order.
    """

  @abc.abstractmethod
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

  @abc.abstractmethod
  def prove(self) -> None:
    """Makes sure that of several who swap a value one wins.

    Raises:
      RepositoryError: if a server ignores conditions: commits would be lost.
    """

  @abc.abstractmethod
  def delete(self, key: str) -> None:
    """Removes a file, or a folder with all that is in it, if it is there.

    Args:
      key: `/`-separated key.
    """

  @abc.abstractmethod
  def prune(self, key: str) -> None:
    """Removes folders without files, so that a value can have their name.

    Args:
      key: `/`-separated key.
    """

  def names(self, folder: str) -> list[str]:
    """Returns the sorted names directly in a folder, temporaries left out.

    Args:
      folder: key of the folder; one that does not exist is empty.
    """
    return sorted(n for n in self.listing(folder) if not is_temporary(n))

  def holding(self, folder: str, name: str) -> list[str]:
    """Returns the sorted names of the folders in a folder that hold a file.

    Args:
      folder: key of the folder; one that does not exist is empty.
      name: name of the file.
    """
    names = self.names(folder)
    return [n for n in names if self.exists(f"{folder}/{n}/{name}")]

  def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
    """Returns the bytes under many keys; those that do not exist are left out.

    Args:
      keys: `/`-separated keys.
    """
    found = {}
    for key in keys:
      with contextlib.suppress(FileNotFoundError):
        found[key] = self.read(key)
    return found

  def write(self, key: str, data: bytes) -> None:
    """Writes an immutable value; see `write_all`.

    Args:
      key: `/`-separated key.
      data: the bytes.
    """
    self.write_all({key: data})

  def pieces(self, key: str) -> Iterator[bytes]:
    """Yields the bytes under a key, `PIECE` bytes at a time.

    Args:
      key: `/`-separated key.

    Raises:
      FileNotFoundError: if there are none.
    """
    start = 0
    while True:
      piece = self.read_range(key, start, start + PIECE)
      if piece:
        yield piece
      if len(piece) < PIECE:
        return
      start += PIECE


class LocalFiles(Files):
  """Files in a folder of this machine.

  Attributes:
    root: absolute path of the folder.
    local: True.
  """

  local = True

  def __init__(self, root: str):
    self.root = root

  def path(self, key: str) -> str:
    return os.path.join(self.root, *key.split("/"))

  def spec(self, key: str) -> dict[str, Any]:
    return {"driver": "file", "path": self.path(key).rstrip("/") + "/"}

  def cache(self, name: str) -> str:
    return self.path(f"cache/{name}")

  def read(self, key: str) -> bytes:
    with open(self.path(key), "rb") as file:
      return file.read()

  def read_range(self, key: str, start: int, stop: int) -> bytes:
    with open(self.path(key), "rb") as file:
      file.seek(start)
      return file.read(stop - start)

  def size(self, key: str) -> int:
    return os.path.getsize(self.path(key))

  def exists(self, key: str) -> bool:
    return os.path.exists(self.path(key))

  def holds(self, key: str, size: int) -> bool:
    try:
      return self.size(key) == size
    except OSError:
      return False

  def listing(self, folder: str) -> list[str]:
    try:
      return os.listdir(self.path(folder))
    except (FileNotFoundError, NotADirectoryError):
      return []

  def walk(self, folder: str) -> Iterator[str]:
    for name in self.names(folder):
      key = f"{folder}/{name}"
      if os.path.isdir(self.path(key)):
        yield from self.walk(key)
      else:
        yield key

  def leftovers(self) -> list[str]:
    found = []
    for folder, folders, names in os.walk(self.root):
      place = os.path.relpath(folder, self.root).replace(os.sep, "/")
      found += [
        name if place == "." else f"{place}/{name}"
        for name in folders + names
        if is_temporary(name) and not name.endswith(LOCK)
      ]
    return sorted(found)

  def freshen(self, key: str) -> bool:
    try:
      os.utime(self.path(key))
    except OSError:  # gone; or somebody else's, which only they can freshen
      return False
    return True

  def write_all(self, values: Mapping[str, bytes]) -> None:
    folders = {os.path.dirname(self.path(key)) for key in values}
    folders |= _make_folders(folders)
    # Orbax made the folder of a payload, and its name must last as well.
    folders |= {self.path("payloads") for k in values if k[:9] == "payloads/"}
    # Syncing is waiting: files synced at once share a turn of the journal.
    each(self._write_one, [(key, (data,)) for key, data in values.items()])
    each(_sync_folder, folders)

  def write_pieces(self, key: str, pieces: Iterable[bytes]) -> None:
    folder = os.path.dirname(self.path(key))
    above = _make_folders([folder])
    self._write_one((key, pieces))
    # One by one: a copy calls this in the threads of `each` already.
    for place in {folder, *above}:
      _sync_folder(place)

  def _write_one(self, item: tuple[str, Iterable[bytes]]) -> None:
    path = self.path(item[0])
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}-{name}")
    try:
      with open(temporary, "xb") as file:
        for piece in item[1]:
          file.write(piece)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise

  def swap(self, key: str, *, old: bytes | None, new: bytes | None) -> bool:
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

  def prove(self) -> None:
    pass  # TensorStore locks the file

  def delete(self, key: str) -> None:
    path = self.path(key)
    try:
      os.unlink(path)
    except FileNotFoundError:
      return
    except (IsADirectoryError, PermissionError):
      # Some systems call it a lack of permission that a folder is no file.
      if not os.path.isdir(path):
        raise
      shutil.rmtree(path)

  def prune(self, key: str) -> None:
    for folder, _, _ in os.walk(self.path(key), topdown=False):
      with contextlib.suppress(OSError):  # not empty, or gone already
        os.rmdir(folder)


def open_files(root: str) -> Files:
  """Returns the files below a path or URL; nothing is read yet.

  Args:
    root: absolute path of a folder, or a URL of `stores.SCHEMES`.

  Raises:
    RepositoryError: if the URL is of no scheme that can be read.

  Example:
    >>> open_files("/tmp/repository").path("refs/heads/main")
    '/tmp/repository/refs/heads/main'
  """
  if "://" not in root:
    return LocalFiles(root)
  from patchjax.history.storage.stores import StoreFiles

  return StoreFiles(root)


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


def _make_folders(folders: Iterable[str]) -> set[str]:
  """Creates folders; returns those in which one was, which are to be synced."""
  above = set()
  for folder in folders:
    place = folder
    while not os.path.isdir(place):
      place = os.path.dirname(place)
      above.add(place)
    os.makedirs(folder, exist_ok=True)
  return above


def _sync_folder(folder: str) -> None:
  """Makes renames in a folder survive a power failure, where that exists."""
  if os.name == "nt":
    return  # folders cannot be opened there
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
