"""Digests: what makes two leaves, or two trees, the same value.

A leaf's digest is the root of a SHA-256 Merkle tree over its tiles (see
`tiles`: of at most 1 MiB, as bit patterns in row-major, little-endian order),
with its dtype and shape: tiles can be hashed by those who hold them, and be
verified one by one. A tree's id is that of nested objects, as in git, so that
subtrees which did not change are shared.
Neither depends on containers, encodings, shardings or machines.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.trees import dtypes, tiles
from patchjax.trees.errors import StructureError
from patchjax.trees.names import named_leaves, split


@dataclasses.dataclass(frozen=True)
class Entry:
  """What a tree object says of one leaf.

  Attributes:
    digest: hex digest of its bits, dtype and shape.
    dtype: name of its dtype; `key<impl>` for PRNG keys.
    shape: its shape; that of the keys, not of their data.
  """

  digest: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of entries."""
    return math.prod(self.shape)


def canonical_json(value: Any) -> bytes:
  """Returns the one JSON text of a value: sorted keys, no spaces, UTF-8.

  Args:
    value: JSON-able value without NaN or Inf.

  Example:
    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
  """
  return json.dumps(
    value,
    sort_keys=True,
    separators=(",", ":"),
    ensure_ascii=False,
    allow_nan=False,
  ).encode()


@functools.cache
def _pool(pid: int) -> concurrent.futures.ThreadPoolExecutor:
  """The hashing threads of a process (a fork must not inherit them)."""
  del pid
  return concurrent.futures.ThreadPoolExecutor(
    max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="digest"
  )


def words_digest(words: np.ndarray, dtype: str, shape: tuple[int, ...]) -> str:
  """Returns the digest of a leaf from its bits; see `leaf_digest`.

  Args:
    words: its bit patterns, as `dtypes.host` gives them; packed bits, whose
      shape is another, are cut as they are.
    dtype: the name of its dtype.
    shape: its shape.
  """
  cut = shape if words.shape[: len(shape)] == shape else words.shape
  return root(tile_digests(words, cut), dtype, shape)


def tile_digests(
  words: np.ndarray,
  shape: tuple[int, ...],
  region: tiles.Region | None = None,
  numbers: Sequence[int] | None = None,
) -> list[bytes]:
  """Returns the digests of tiles of a leaf, hashed in threads.

  Args:
    words: bit patterns of the leaf, or of a region of it.
    shape: the shape of the leaf.
    region: which region `words` are; by default the whole leaf.
    numbers: which tiles of the leaf; they lie in the region as a whole. By
      default all of the leaf.
  """
  held = tiles.whole(shape) if region is None else region
  grid = tiles.grid(shape, tiles.itemsize_of(words, held))
  which = range(len(grid)) if numbers is None else numbers
  return hash_tiles(
    lambda tile: words[tiles.within(tile, held)], [grid[i] for i in which]
  )


def hash_tiles(
  read: Callable[[tiles.Region], np.ndarray], regions: Sequence[tiles.Region]
) -> list[bytes]:
  """Returns the digests of tiles, read and hashed in threads.

  Args:
    read: returns the words of a tile.
    regions: the tiles.
  """
  if len(regions) < 2:
    return [tile_digest(read(tile)) for tile in regions]
  work = _pool(os.getpid()).map(lambda tile: tile_digest(read(tile)), regions)
  return list(work)


def tile_digest(words: np.ndarray) -> bytes:
  """Returns the digest of one tile.

  Args:
    words: its bit patterns.
  """
  # The first byte keeps tiles, nodes and leaves apart (RFC 6962, 2.1).
  hasher = hashlib.sha256(b"\x00")
  hasher.update(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data)
  return hasher.digest()


def root(level: Sequence[bytes], dtype: str, shape: tuple[int, ...]) -> str:
  """Returns the digest of a leaf from those of its tiles.

  Args:
    level: digests of all its tiles, in order; none for a zero-size leaf.
    dtype: the name of its dtype.
    shape: its shape.
  """
  level = list(level) or [hashlib.sha256(b"\x00").digest()]
  while len(level) > 1:
    # An odd node at the end rises unchanged.
    pairs = [
      hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest()
      for i in range(0, len(level) - 1, 2)
    ]
    level = pairs + level[2 * len(pairs) :]
  head = canonical_json({"dtype": dtype, "shape": list(shape)})
  return hashlib.sha256(b"\x02" + level[0] + head).hexdigest()


def leaf_digest(x: Any) -> str:
  """Returns the hex digest of a leaf: its bits, dtype and shape.

  Args:
    x: a fully addressable array of any dtype of the table, PRNG keys included.

  Returns:
    64 hex digits. NaN payloads, the sign of zero and denormals count.

  Raises:
    DtypeError: if `x` is no array of a known dtype.

  Example:
    >>> leaf_digest(np.float32(0)) == leaf_digest(np.float32(-0.0))
    False
  """
  return entry(x).digest


def entry(x: Any) -> Entry:
  """Returns the tree entry of a leaf.

  Args:
    x: see `leaf_digest`.

  Example:
    >>> entry(np.zeros((2, 3), np.float32)).shape
    (2, 3)
  """
  words, dtype = dtypes.host(x)
  shape = tuple(np.shape(x))
  return Entry(words_digest(words, dtype, shape), dtype, shape)


def tree_objects(
  entries: Mapping[str, Entry],
) -> tuple[str, dict[str, bytes]]:
  """Returns the id of a tree and the objects that spell it out.

  Args:
    entries: `{text name: Entry}`.

  Returns:
    `(id, {object id: canonical JSON})`: one object a folder. An object is
    `{"entries": {part: entry}, "type": "tree"}`, an entry either
    `{"digest", "dtype", "shape"}` or `{"tree": id}`.

  Raises:
    StructureError: if a name is both a leaf and the parent of another.

  Example:
    >>> e = Entry("00", "float32", (2,))
    >>> root, objects = tree_objects({"a/w": e, "b/w": e})
    >>> len(objects)  # the root, and one for both equal subtrees
    2
  """
  root: dict[str, Any] = {}
  for text, item in entries.items():
    *parents, last = split(text)
    folder = root
    for part in parents:
      folder = folder.setdefault(part, {})
      if isinstance(folder, Entry):
        raise StructureError(f"{text!r}: its parent is a leaf; rename one")
    if last in folder:
      raise StructureError(f"{text!r} is a leaf and holds others; rename one")
    folder[last] = item
  objects: dict[str, bytes] = {}

  def write(folder: dict[str, Any]) -> str:
    spelled = {
      part: {"tree": write(item)}
      if isinstance(item, dict)
      else {
        "digest": item.digest,
        "dtype": item.dtype,
        "shape": list(item.shape),
      }
      for part, item in folder.items()
    }
    data = canonical_json({"entries": spelled, "type": "tree"})
    name = hashlib.sha256(data).hexdigest()
    objects[name] = data
    return name

  return write(root), objects


def tree_id(tree: Any) -> str:
  """Returns the id of the value of a pytree: names, dtypes, shapes and bits.

  Args:
    tree: a pytree of fully addressable arrays; Python numbers count as the
      arrays without axes that a repository holds them as (`bool`, `int64`,
      `float64`, `complex128`), what else is no array is left out.

  Returns:
    64 hex digits; the same for every container, sharding and machine.

  Raises:
    StructureError: if two leaves would get the same name.

  Example:
    >>> x = np.ones(3, np.float32)
    >>> tree_id({"0": x}) == tree_id([x])
    True
  """
  named = named_leaves(tree)
  return tree_objects(
    {
      k: entry(v)
      for k, v in named.items()
      if dtypes.is_array(v) or dtypes.is_number(v)
    }
  )[0]
