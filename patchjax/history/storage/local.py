"""Files on a disk of this machine: written beside, synced, renamed.

A file appears under its name only when it is whole and safe. What is compared
and swapped goes through TensorStore, which locks across processes; reading
imports no TensorStore.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from patchjax.history.storage.files import (
  LOCK,
  TEMPORARY,
  Files,
  is_temporary,
)
from patchjax.history.storage.threads import each
from patchjax.trees.errors import RepositoryError


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
