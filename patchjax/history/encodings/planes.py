"""`planes`: the difference to another leaf, in byte planes.

The integer difference of the bit patterns, modulo the word, is exact for every
dtype; its zigzag code makes small differences of either sign small numbers,
and splitting the words into byte planes puts the bytes that are nearly always
zero side by side, where zstd finds them.
"""

from __future__ import annotations

import numpy as np

from patchjax.history.encodings.common import (
  Encoding,
  Fetch,
  Region,
  expect,
  region_of,
)
from patchjax.trees.digest import Entry

_BLOCK = 1 << 16  # words at a time: the temporaries stay in cache


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
  itemsize = words.dtype.itemsize
  new, old = words.reshape(-1), base.reshape(-1)
  planes = np.empty((itemsize, new.size), np.uint8)
  signed = np.dtype(f"int{8 * itemsize}")
  for start in range(0, new.size, _BLOCK):
    block = slice(start, start + _BLOCK)
    # Differences wrap around: that is what makes them exact.
    difference = (new[block] - old[block]).view(signed)
    zigzag = (difference << 1) ^ (difference >> (8 * itemsize - 1))
    zigzag = zigzag.view(words.dtype)
    for k in range(itemsize):
      # Assigning to a byte keeps the low eight bits.
      planes[k, block] = zigzag >> (8 * k) & 0xFF
  return planes.reshape(itemsize, *words.shape)


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
  itemsize, word = base.dtype.itemsize, base.dtype.type
  old = base.reshape(-1)
  planes = planes.reshape(itemsize, -1)
  words = np.empty(old.size, base.dtype)
  for start in range(0, old.size, _BLOCK):
    block = slice(start, start + _BLOCK)
    zigzag = planes[0, block].astype(base.dtype)
    for k in range(1, itemsize):
      zigzag |= planes[k, block].astype(base.dtype) << word(8 * k)
    difference = (zigzag >> word(1)) ^ (word(0) - (zigzag & word(1)))
    np.add(old[block], difference, out=words[block])
  return words.reshape(base.shape)


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  del entry
  assert base is not None
  return {"": to_planes(words, base)}


def _decode(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  if base is None:
    raise ValueError("a difference without its base")
  region = region_of(entry, region)
  itemsize = base.dtype.itemsize
  planes = fetch("", (slice(0, itemsize, 1), *region))
  expect(planes, np.dtype(np.uint8), (itemsize, *base.shape))
  return from_planes(planes, base)


PLANES = Encoding("planes", _encode, _decode, delta=True, elementwise=True)
