"""The files of a repository: immutable values, and a few that are swapped.

Everything under a repository but its refs is written once and never changed.
A value appears under its name only when it is whole and safe: on a disk
(`local`) it is written to a temporary file, synced and renamed; a key-value
store (`stores`) writes it in one request. Refs are compared and swapped.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
    from patchjax.history.storage.local import LocalFiles

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
