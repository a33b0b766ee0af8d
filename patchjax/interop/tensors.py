"""safetensors: one file, or shards with an index.

Written leaf by leaf, so that a model of any size passes through little
memory; read as views of memory maps.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchjax.interop.source import Source
from patchjax.patches import storage
from patchjax.trees.errors import DtypeError, StructureError
from patchjax.trees.suggest import list_names

INDEX = storage.INDEX
SHARD = 5 << 30  # bytes; what Hugging Face's libraries write

_DTYPES = {dtype: code for code, dtype in storage.CODES.items()}


def read_safetensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays of a safetensors file by key, and its metadata.

  Args:
    path: the file.

  Returns:
    `({key: array}, metadata)`; arrays are views of a read-only memory map.

  Raises:
    FormatError: if the file is malformed or truncated, or has a dtype that
      JAX does not.

  Example:
    >>> import tempfile
    >>> from patchjax.interop import write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f"{folder}/a.safetensors"
    ...   write(path, {"w": np.int8([1, 2])})
    ...   read_safetensors(path)[0]["w"].tolist()
    [1, 2]
  """
  header, data = storage.open_safetensors(path)
  metadata = header.pop("__metadata__", {})
  arrays = {
    key: storage.view(path, key, tensor, data) for key, tensor in header.items()
  }
  return arrays, metadata


def read_sharded(index: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a sharded model by key.

  Args:
    index: the file `*.safetensors.index.json`.

  Raises:
    FormatError: if it is malformed, or the shards are not what it says.
  """
  places = storage.places_of(index)
  arrays: dict[str, np.ndarray] = {}
  found: dict[str, list[str]] = {}
  for name in sorted(set(places.values())):
    held, _ = read_safetensors(index.parent / name)
    found[name] = list(held)
    arrays.update(held)
  storage.check_places(index, places, found)
  return {key: arrays[key] for key in places}


def check(path: pathlib.Path, source: Source) -> None:
  """Refuses what the format cannot hold.

  Args:
    path: the file to write, for messages.
    source: the leaves.

  Raises:
    DtypeError: lists every leaf of a dtype without a code.
    StructureError: if a leaf has the one name that is no key.
  """
  if "__metadata__" in source.entries:
    raise StructureError(
      "'__metadata__' is no name for a leaf in safetensors; rename it"
    )
  odd = {
    entry.dtype: name
    for name, entry in source.entries.items()
    if entry.dtype not in _DTYPES
  }
  if odd:
    names = [n for n, e in source.entries.items() if e.dtype in odd]
    raise DtypeError(
      f"{path}: safetensors has no {', '.join(sorted(odd))} (leaves "
      f"{list_names(names)}); write an Orbax directory (a path without a "
      "suffix), commit the tree to a repository, which holds it, or leave "
      "these leaves out"
    )


def write(
  path: pathlib.Path, source: Source, *, shard_bytes: int = SHARD
) -> list[pathlib.Path]:
  """Writes leaves to one file, or to shards and their index beside each other.

  Args:
    path: the file, ending in `.safetensors`; of shards, where it would be:
      `m.safetensors` becomes `m-00001-of-00002.safetensors`, ... and
      `m.safetensors.index.json`.
    source: the leaves.
    shard_bytes: bytes of a shard at most, unless a leaf is larger.

  Returns:
    What was written.
  """
  # Wide words first, so that every array is aligned in a memory map.
  order = sorted(source.entries, key=lambda name: -source.itemsize(name))
  shards = _split(order, source, shard_bytes)
  if len(shards) == 1:
    _write_one(path, order, source)
    return [path]
  stem = path.name.removesuffix(".safetensors")
  places: dict[str, str] = {}
  done: list[pathlib.Path] = []
  try:
    for i, names in enumerate(shards, 1):
      name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
      _write_one(path.with_name(name), names, source)
      done.append(path.with_name(name))
      places |= dict.fromkeys(names, name)
    total = sum(map(source.nbytes, order))
    text = {"metadata": {"total_size": total}, "weight_map": places}
    # The index comes last: without it there is no model.
    with storage.replacing(index_of(path)) as file:
      file.write(json.dumps(text, indent=2, ensure_ascii=False).encode())
  except BaseException:
    for shard in done:
      with contextlib.suppress(OSError):
        shard.unlink()
    raise
  return [*done, index_of(path)]


def index_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of the index of a model in shards.

  Args:
    path: where the model would be if it were one file.
  """
  return path.with_name(path.name.removesuffix(".safetensors") + INDEX)


def _split(order: Sequence[str], source: Source, limit: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  size = 0
  for name in order:
    more = source.nbytes(name)
    if shards[-1] and size + more > limit:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += more
  return shards


def _write_one(
  path: pathlib.Path, names: Sequence[str], source: Source
) -> None:
  header: dict[str, Any] = {}
  end = 0
  for name in names:
    begin, end = end, end + source.nbytes(name)
    header[name] = {
      "dtype": _DTYPES[source.entries[name].dtype],
      "shape": list(source.entries[name].shape),
      "data_offsets": [begin, end],
    }
  with storage.replacing(path) as file:
    file.write(storage.header_bytes(header))
    for _, words in source.stream(names):
      file.write(np.ascontiguousarray(words).data)
