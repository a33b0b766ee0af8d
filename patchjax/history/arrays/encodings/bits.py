"""`bits`: the difference to another leaf, in coded bit planes.

For words of one or two bytes. A fine-tune moves a bfloat16 by few steps, so
that of a code's sixteen bits three or four are ever set: held bit by bit they
take a fraction of the byte that a byte-wise coder needs at the least.
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
from patchjax.history.arrays.encodings.zigzag import zigzag
from patchjax.trees import tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region


def code_tile(words: np.ndarray, base: np.ndarray) -> list[coding.Section]:
  """Returns the bit planes of a tile's differences, the lowest first.

  Args:
    words: unsigned integers [n].
    base: those of the base.
  """
  codes = zigzag(words, base).view(np.uint8).reshape(-1, words.itemsize)
  sections = []
  for octets in np.ascontiguousarray(codes.T):
    length = int(octets.max(initial=0)).bit_length()
    sections += [coding.code_bits(octets, k) for k in range(length)]
    sections += [coding.EMPTY] * (8 - length)
  return sections


def _decode_tile(
  sections: list[coding.Section], word: np.dtype, size: int
) -> np.ndarray:
  """Returns the differences of a tile."""
  if len(sections) != 8 * word.itemsize:
    raise ValueError(f"{len(sections)} bit planes for words of {word.name}")
  length = max((k + 1 for k, (_, d) in enumerate(sections) if d), default=0)
  # Small differences stay bytes as long as they can. Bit 0 is the sign: the
  # others, shifted by one, are flipped where it is set.
  count = 1 if length <= 8 else word.itemsize
  octets = np.zeros((count, size), np.uint8)
  for k in range(1, length):
    coding.set_bits(octets[(k - 1) // 8], (k - 1) % 8, sections[k])
  signs = np.zeros(size, np.uint8)
  coding.set_bits(signs, 0, sections[0])
  np.negative(signs, out=signs)
  octets ^= signs
  if count == 1:
    signed = octets[0].view(np.int8)
    return signed.astype(f"int{8 * word.itemsize}", copy=False).view(word)
  return coding.join_planes(octets, word)


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
