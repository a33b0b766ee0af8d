"""Models on disk, or anywhere else: described first, read leaf by leaf.

Leaves are read into memory that is used again for leaf after leaf. A memory
map would do without the copy, but its pages stay in the process until they
are given back, and its arrays are seldom aligned as JAX wants them.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from patchjax.patches import storage
from patchjax.trees.digest import Entry, tree_objects, words_digest
from patchjax.trees.dtypes import host, is_array
from patchjax.trees.errors import FormatError, StructureError
from patchjax.trees.names import join, named_leaves, nested, split
from patchjax.trees.suggest import list_names

Abstract = jax.ShapeDtypeStruct
Moved = Callable[[int], None]
"""Is told how many bytes were read."""

_PIECE = 16 << 20  # bytes read at a time


def nbytes(like: Any) -> int:
  """Returns the bytes of a leaf.

  Args:
    like: has a shape and a dtype.
  """
  return math.prod(like.shape) * np.dtype(like.dtype).itemsize


class Slot:
  """Memory for one leaf after another.

  It is cut for the largest; what is never used takes none.

  Args:
    size: bytes.
  """

  def __init__(self, size: int):
    # Starts at a page, so that JAX on a CPU reads it as it lies. Huge pages
    # spare the kernel most of its work at the first use.
    self._memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
      self._memory.madvise(mmap.MADV_HUGEPAGE)

  def array(self, like: Abstract) -> np.ndarray:
    """Returns an array in this memory, of a shape and dtype.

    Args:
      like: the leaf.
    """
    words = np.frombuffer(self._memory, np.uint8, nbytes(like))
    return words.view(like.dtype).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
  """A model that is read leaf by leaf.

  Attributes:
    what: what it is called.
    leaves: shapes and dtypes by text name, in the model's order.
    keys: what a file calls each leaf.
    metadata: texts that a file holds beside the arrays.
    identity: JSON that is another where the model may be another; None if
      nothing is known.
    paths: files that are read.
  """

  what: str
  leaves: Mapping[str, Abstract]
  keys: Mapping[str, str]
  metadata: Mapping[str, str]
  identity: Any
  paths: tuple[pathlib.Path, ...]

  @abc.abstractmethod
  def read(self, name: str, slot: Slot, moved: Moved) -> np.ndarray:
    """Returns a leaf, in the memory of the slot.

    Args:
      name: text name.
      slot: memory that nobody uses any more.
      moved: is told how many bytes were read.
    """

  def expect(self, name: str) -> None:
    """Says that a leaf will be read soon.

    Args:
      name: text name.
    """
    del name


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where an array lies: file, first byte."""

  path: pathlib.Path
  start: int


@dataclasses.dataclass(frozen=True)
class FileModel(Model):
  """A model in safetensors files; see `Model`."""

  places: Mapping[str, _Place]

  def read(self, name: str, slot: Slot, moved: Moved) -> np.ndarray:
    """See `Model.read`."""
    array = slot.array(self.leaves[name])
    place = self.places[name]
    words = array.reshape(-1).view(np.uint8).data
    at = 0
    with open(place.path, "rb", buffering=0) as file:
      if _stamp(place.path, file.fileno()) not in self.identity:
        raise FormatError(f"{place.path}: changed while it was merged")
      file.seek(place.start)
      while at < len(words):
        count = file.readinto(words[at : at + _PIECE])
        if not count:
          raise FormatError(f"{place.path}: truncated while it was merged")
        at += count
        moved(count)
    return array

  def expect(self, name: str) -> None:
    """See `Model.expect`."""
    if not hasattr(os, "posix_fadvise"):
      return
    place = self.places[name]
    with open(place.path, "rb", buffering=0) as file:
      size = nbytes(self.leaves[name])
      advice = os.POSIX_FADV_WILLNEED
      os.posix_fadvise(file.fileno(), place.start, size, advice)


def _stamp(path: pathlib.Path, handle: int) -> list[Any]:
  stat = os.fstat(handle)
  return [str(path), stat.st_size, stat.st_mtime_ns]


@dataclasses.dataclass(frozen=True)
class HeldModel(Model):
  """A model whose leaves are arrays, or sliced as arrays; see `Model`."""

  arrays: Mapping[str, Any]

  def read(self, name: str, slot: Slot, moved: Moved) -> np.ndarray:
    """See `Model.read`."""
    like, leaf = self.leaves[name], self.arrays[name]
    array = slot.array(like)
    if not array.ndim or not array.size:
      array[...] = np.asarray(leaf)
      return array
    # Some rows at a time: a stored leaf is decoded into memory of its own.
    rows = max(1, _PIECE * len(array) // nbytes(like))
    for i in range(0, len(array), rows):
      array[i : i + rows] = np.asarray(leaf[i : i + rows])
      moved(array[i : i + rows].nbytes)
    return array


def open_model(source: Any) -> Model:
  """Returns a model that is read leaf by leaf.

  Args:
    source: a safetensors file; the index of a model in shards, or the folder
      with one; a mapping from text names to lazy leaves (`Repo.open`), which
      have `shape` and `dtype` and are sliced as arrays are; or a pytree of
      arrays.

  Raises:
    FormatError: if a file is malformed or truncated.
    StructureError: if there are no arrays.
    OSError: if a file cannot be read.
  """
  if isinstance(source, str | os.PathLike):
    return _open_files(pathlib.Path(source))
  if isinstance(source, Mapping) and not isinstance(source, dict):
    arrays = {name: source[name] for name in source}
  else:
    arrays = {n: x for n, x in named_leaves(source).items() if is_array(x)}
  what = "the parameters"
  if not arrays:
    raise StructureError(f"{what} hold no arrays")
  commit = getattr(source, "commit", None)
  return HeldModel(
    what=what if commit is None else f"version {commit[:12]}",
    leaves={n: Abstract(x.shape, x.dtype) for n, x in arrays.items()},
    keys={name: name for name in arrays},
    metadata={},
    identity=None if commit is None else {"commit": commit},
    paths=(),
    arrays=arrays,
  )


def abstract_of(source: Any) -> Any:
  """Returns shapes and dtypes of a model that is not read, in nested dicts.

  Args:
    source: see `open_model`.

  Example:
    >>> import tempfile, numpy as np, patchjax as pj
    >>> from patchjax.interop.files import write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f"{folder}/model.safetensors"
    ...   write(path, {"block": {"w": np.zeros((2, 3), np.float32)}})
    ...   abstract_of(path)["block"]["w"].shape
    (2, 3)
  """
  return nested(open_model(source).leaves)


def _open_files(path: pathlib.Path) -> FileModel:
  what = str(path)
  path = _model_at(path)
  if path.name.endswith(storage.INDEX):
    places = storage.places_of(path)
    files = [path.parent / name for name in dict.fromkeys(places.values())]
  else:
    places, files = None, [path]
  found: dict[str, tuple[_Place, Abstract]] = {}
  keys_of: dict[str, list[str]] = {}
  metadata: dict[str, str] = {}
  identity: list[Any] = []
  for file in map(pathlib.Path.absolute, files):
    header, start = storage.header_of(file)
    metadata |= header.pop("__metadata__", {})
    tensors = sorted(header.items(), key=lambda x: x[1]["data_offsets"])
    for key, tensor in tensors:
      dtype = storage.dtype_of(file, key, tensor)
      like = Abstract(tuple(tensor["shape"]), dtype)
      found[key] = _Place(file, start + tensor["data_offsets"][0]), like
    keys_of[file.name] = list(header)
    with open(file, "rb") as opened:
      identity.append(_stamp(file, opened.fileno()))
    text = json.dumps(header, sort_keys=True).encode()
    identity.append(hashlib.sha256(text).hexdigest())
  if places is not None:
    storage.check_places(path, places, keys_of)
  if not found:
    raise StructureError(f"{what}: the file holds no arrays")
  names = _names(found)
  return FileModel(
    what=what,
    leaves={names[key]: like for key, (_, like) in found.items()},
    keys={name: key for key, name in names.items()},
    metadata=metadata,
    identity=identity,
    paths=tuple(file.absolute() for file in files),
    places={names[key]: place for key, (place, _) in found.items()},
  )


def _model_at(path: pathlib.Path) -> pathlib.Path:
  """Returns the file, or the index, of the model that a path means."""
  if path.is_dir():
    indices = sorted(path.glob(f"*{storage.INDEX}"))
    files = indices or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
      raise FormatError(
        f"{path}: expected one safetensors model, found "
        + (
          f"several: {list_names(f.name for f in files)}; name one of them"
          if files
          else "none"
        )
      )
    return files[0]
  shards = path.with_name(path.name.removesuffix(".safetensors"))
  shards = shards.with_name(shards.name + storage.INDEX)
  if not path.exists() and path.suffix == ".safetensors" and shards.exists():
    return shards
  return path


def _names(keys: Iterable[str]) -> dict[str, str]:
  """Text names of keys; cut at slashes where they are none (haiku)."""
  try:
    for key in keys:
      split(key)
  except StructureError:
    return {key: join(key.split("/")) for key in keys}
  return {key: key for key in keys}


def digest_of(model: Model, moved: Moved) -> str:
  """Returns the digest of a model's value; see `trees.digest.tree_id`.

  Args:
    model: the model; it is read, unless it knows its leaves' digests.
    moved: is told how many bytes were read.
  """
  slot = Slot(max(map(nbytes, model.leaves.values())))
  entries: dict[str, Entry] = {}
  for name, like in model.leaves.items():
    known = getattr(getattr(model, "arrays", {}).get(name), "entry", None)
    if known is None:
      words, dtype = host(model.read(name, slot, moved))
      shape = tuple(like.shape)
      known = Entry(words_digest(words, dtype, shape), dtype, shape)
    entries[name] = known
  return tree_objects(entries)[0]
