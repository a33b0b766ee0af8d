"""`bits`: the difference to another leaf, by pairs of bits.

For words of one or two bytes. A fine-tune moves a bfloat16 by few steps, so
that of a code's sixteen bits three or four are ever set: held as digits of two
bits, four to a byte, they take a fraction of the byte that a byte-wise coder
needs at the least. A table turns a byte into four digits.
"""

from __future__ import annotations

import math

import numpy as np

from patchjax.history.arrays.encodings import coding
from patchjax.history.arrays.encodings.common import (
  Encoding,
  Fetch,
  aligned,
  expect,
  full,
  grid_of,
  needed,
  of_words,
)
from patchjax.history.arrays.encodings.zigzag import unzigzag, zigzag
from patchjax.trees import tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region

_DIGITS = 4  # to base four, of a byte


def code_tile(words: np.ndarray, base: np.ndarray) -> list[coding.Section]:
  """Returns the digits of a tile's differences, the lowest first.

  Args:
    words: unsigned integers [n].
    base: those of the base.
  """
  codes = zigzag(words, base)
  largest = int(codes.max(initial=0))
  sections = []
  for k in range(words.itemsize):
    octets = (codes >> codes.dtype.type(8 * k) if k else codes).astype(np.uint8)
    length = (largest >> 8 * k).bit_length()
    count = min(-(-length // 2), _DIGITS)
    sections += [coding.code_digits(octets, i) for i in range(count)]
    sections += [coding.EMPTY] * (_DIGITS - count)
  return sections


def _decode_tile(
  sections: list[coding.Section], word: np.dtype, size: int
) -> np.ndarray:
  """Returns the differences of a tile."""
  if len(sections) != _DIGITS * word.itemsize:
    raise ValueError(f"{len(sections)} digits for words of {word.name}")
  length = max((k + 1 for k, (_, d) in enumerate(sections) if d), default=0)
  # Small differences stay bytes as long as they can.
  count = 1 if length <= _DIGITS else word.itemsize
  octets = np.zeros((count, _padded(size)), np.uint8)
  for k in range(length):
    coding.add_digits(octets[k // _DIGITS], k % _DIGITS, sections[k])
  if count > 1:
    codes = coding.join_planes(octets[:, :size], word)
    return unzigzag(codes)
  signed = unzigzag(octets[0, :size]).view(np.int8)
  return signed.astype(f"int{8 * word.itemsize}", copy=False).view(word)


def _padded(size: int) -> int:
  return -(-size // 4) * 4


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  base = needed(base)
  rows = [
    code_tile(words[tile].reshape(-1), base[tile].reshape(-1))
    for tile in grid_of(entry)
  ]
  return {"": coding.pack(rows)}


def _decode(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  base = needed(base)
  grid = grid_of(entry)
  wanted = full(entry, region)
  expect(base, base.dtype, tiles.shape_of(of_words(entry, wanted)))
  stream = coding.unpack(fetch, grid, None if region is None else wanted)
  words = base if base.flags.writeable else aligned(base.shape, base.dtype)
  for number, sections in stream.rows.items():
    tile = grid[number]
    shape = tiles.shape_of(of_words(entry, tile))
    change = _decode_tile(sections, base.dtype, math.prod(shape))
    shared = tiles.overlap(tile, wanted)
    if shared is not None:
      change = change.reshape(shape)[tiles.within(shared, tile)]
      # The dots keep what has no axes an array.
      here = (*tiles.within(shared, wanted), ...)
      np.add(base[here], change, out=words[here])
  return words


BITS = Encoding("bits", _encode, _decode, delta=True, heavy=True, coded=True)
