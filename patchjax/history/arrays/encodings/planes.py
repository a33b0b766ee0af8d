"""`planes`: the difference to another leaf, in byte planes.

Splitting zigzag codes into byte planes puts the bytes that are nearly always
zero side by side, where zstd finds them; the bytes that are noise stay apart
and cost it no time.
"""

from __future__ import annotations

import numpy as np

from patchjax.history.arrays.encodings.common import (
  Encoding,
  Fetch,
  aligned,
  expect,
  full,
  needed,
  of_words,
)
from patchjax.history.arrays.encodings.zigzag import add_zigzag, zigzag
from patchjax.trees import tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region


def to_planes(words: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Returns the byte planes of the difference of two leaves' bits.

  Args:
    words: unsigned integers [*shape].
    base: those of the base, of the same dtype and shape.

  Returns:
    uint8 [itemsize, *shape]: byte k of zigzag(words - base) in plane k.

  Example:
    >>> to_planes(np.uint16([7, 300]), np.uint16([8, 300])).tolist()
    [[1, 0], [0, 0]]
  """
  codes = zigzag(words.reshape(-1), base.reshape(-1))
  octets = codes.view(np.uint8).reshape(-1, words.itemsize)
  return np.ascontiguousarray(octets.T).reshape(-1, *words.shape)


def from_planes(planes: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Returns the bits of a leaf from its planes; the inverse of `to_planes`.

  Args:
    planes: uint8 [itemsize, *shape].
    base: unsigned integers [*shape].

  Example:
    >>> base = np.uint16([8, 300])
    >>> from_planes(to_planes(np.uint16([7, 300]), base), base).tolist()
    [7, 300]
  """
  octets = np.empty((*base.shape, base.itemsize), np.uint8)
  np.moveaxis(octets, -1, 0)[...] = planes
  return _join(octets, base)


def _join(octets: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Returns the words whose codes have these bytes [*shape, itemsize]."""
  codes = octets.reshape(-1).view(base.dtype)
  return add_zigzag(codes, base.reshape(-1)).reshape(base.shape)


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  del entry
  return {"": to_planes(words, needed(base))}


def _decode(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  base = needed(base)
  part = of_words(entry, full(entry, region))
  expect(base, base.dtype, tiles.shape_of(part))
  octets = aligned((*base.shape, base.itemsize), np.dtype(np.uint8))
  # The planes are interleaved while they are copied out of their chunks.
  fetch("", (slice(0, base.itemsize), *part), out=np.moveaxis(octets, -1, 0))
  return _join(octets, base)


PLANES = Encoding(
  "planes", _encode, _decode, delta=True, elementwise=True, heavy=True
)
