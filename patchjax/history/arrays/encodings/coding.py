"""Coded sections: bytes and positions, near their entropy, tile by tile.

What bit planes and sparse changes consist of is small and skewed. zstd looks
for repetitions in it and finds them by accident, each dearer than the bytes it
stands for; plain Huffman codes (deflate without matches, in Python's own
library) come within a few per cent of the entropy. A stream is an array of
bytes: a table of how each section of each tile is held, and the sections in
the order of the tiles, so that a region is read without the rest.

    header: uint32 [3 + tiles * columns], little-endian:
            length of the header in bytes, columns, flag, lengths
    sections: as many bytes as their length says; its top two bits are the form
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from patchjax.history.arrays.encodings.common import Fetch, expect
from patchjax.trees import tiles
from patchjax.trees.tiles import Region

_RAW, _DEFLATED, _GAPS = 0, 1, 2
_FORM = 30  # the bit from which on a length holds the form
_FACTS = 3  # numbers before the lengths

_NOISE = 7.8  # bits a byte from which on coding is not tried
_TRIED = 1 << 14  # bytes whose histogram says whether it is
_RARE = 16  # a bit set less often than one in so many is held by its position

_GAP = np.dtype(np.uint32)

Section = tuple[int, bytes]
"""The form of a section, and its bytes."""


EMPTY: Section = (_DEFLATED, b"")
"""Zeros, however many."""


def code_bytes(octets: np.ndarray) -> Section:
  """Returns bytes as a section; all zeros take none.

  Args:
    octets: uint8 [n].
  """
  if not octets.any():
    return EMPTY
  raw = octets.tobytes()
  sample = octets[:: max(1, octets.size // _TRIED)]
  shares = np.bincount(sample, minlength=256) / sample.size
  shares = shares[shares > 0]
  if -(shares * np.log2(shares)).sum() > _NOISE:
    return _RAW, raw
  # Runs of one value are worth a match, once it is nearly all there is.
  best = _deflated(raw, zlib.Z_HUFFMAN_ONLY)
  if shares.max() > 0.6:
    best = min(best, _deflated(raw, zlib.Z_RLE), key=len)
  return (_DEFLATED, best) if len(best) < len(raw) else (_RAW, raw)


def decode_bytes(section: Section, size: int) -> np.ndarray:
  """Returns the bytes of a section.

  Args:
    section: as `code_bytes` made it.
    size: how many bytes there are.

  Raises:
    ValueError: if it is no such section.
  """
  form, data = section
  if form == _DEFLATED:
    if not data:
      return np.zeros(size, np.uint8)
    try:
      data = zlib.decompress(data, -zlib.MAX_WBITS, size)
    except zlib.error as error:
      raise ValueError(f"a section is damaged: {error}") from error
  if len(data) != size:
    raise ValueError(f"expected a section of {size} bytes, found {len(data)}")
  return np.frombuffer(data, np.uint8)


def _deflated(raw: bytes, strategy: int) -> bytes:
  # The smallest window: none is looked through.
  coder = zlib.compressobj(1, zlib.DEFLATED, -9, 8, strategy)
  return coder.compress(raw) + coder.flush()


def code_positions(positions: np.ndarray) -> list[Section]:
  """Returns sorted positions as four sections: the bytes of their gaps.

  Args:
    positions: int64 [count], below 2**32.
  """
  gaps = np.diff(positions, prepend=-1) - 1
  return [code_bytes(plane) for plane in _planes(gaps.astype(np.uint32))]


def decode_positions(
  sections: Sequence[Section], count: int, size: int
) -> np.ndarray:
  """Returns sorted positions; the inverse of `code_positions`.

  Args:
    sections: four.
    count: how many positions there are.
    size: what they must be below.

  Raises:
    ValueError: if they are not.
  """
  gaps = join_planes([decode_bytes(s, count) for s in sections], _GAP)
  positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
  if count and positions[-1] >= size:
    raise ValueError(f"position {positions[-1]} of {size}")
  return positions


def code_words(words: np.ndarray) -> list[Section]:
  """Returns words as sections: their bytes, the lowest first.

  Args:
    words: unsigned integers [count].
  """
  return [code_bytes(plane) for plane in _planes(words)]


def join_planes(
  planes: Sequence[np.ndarray] | np.ndarray, dtype: np.dtype
) -> np.ndarray:
  """Returns the words whose bytes these are.

  Args:
    planes: uint8 [count], the lowest first.
    dtype: unsigned dtype of the words.
  """
  return np.stack([*planes], axis=-1).view(dtype)[..., 0]


def _planes(words: np.ndarray) -> np.ndarray:
  octets = np.ascontiguousarray(words).view(np.uint8)
  return np.ascontiguousarray(octets.reshape(-1, words.itemsize).T)


def code_bits(octets: np.ndarray, k: int) -> Section:
  """Returns bit k of some bytes as a section.

  Packed, or the positions of the few that are set.

  Args:
    octets: uint8 [n].
    k: number of the bit.
  """
  packed = np.packbits(octets & np.uint8(1 << k))
  count = int(np.bitwise_count(packed).sum())
  if count * _RARE > octets.size or not count:
    return code_bytes(packed)
  # Few bytes have a bit set: the others are not unpacked.
  some = np.flatnonzero(packed)
  within = np.flatnonzero(np.unpackbits(packed[some]))
  sections = code_positions(8 * some[within >> 3] + (within & 7))
  spelled = [count] + [_spell(section) for section in sections]
  lengths = np.array(spelled, np.uint32)
  held = [lengths.tobytes(), *(data for _, data in sections)]
  return _GAPS, b"".join(held)


def set_bits(octets: np.ndarray, k: int, section: Section) -> None:
  """Sets bit k of the bytes that had it set; the inverse of `code_bits`.

  Args:
    octets: uint8 [n] with bit k clear.
    k: number of the bit.
    section: as `code_bits` made it.

  Raises:
    ValueError: if it is no such section.
  """
  form, data = section
  if form == _GAPS:
    count, *lengths = np.frombuffer(data[:20], np.uint32).tolist()
    at = decode_positions(_split(lengths, data[20:]), count, octets.size)
    octets[at] |= np.uint8(1 << k)
  elif data:
    packed = decode_bytes(section, -(-octets.size // 8))
    plane = np.unpackbits(packed, count=octets.size)
    np.left_shift(plane, np.uint8(k), out=plane)
    np.bitwise_or(octets, plane, out=octets)


def _spell(section: Section) -> int:
  form, data = section
  return form << _FORM | len(data)


def _split(lengths: Sequence[int], data: bytes | memoryview) -> list[Section]:
  sections = []
  start = 0
  for spelled in lengths:
    stop = start + (spelled & (1 << _FORM) - 1)
    sections.append((spelled >> _FORM, bytes(data[start:stop])))
    start = stop
  return sections


def pack(rows: Sequence[Sequence[Section]], flag: int = 0) -> np.ndarray:
  """Returns the stream of some sections.

  Args:
    rows: for each tile its sections, equally many.
    flag: a number that readers are told.

  Returns:
    uint8 [n].
  """
  lengths = [_spell(section) for row in rows for section in row]
  size = 4 * (_FACTS + len(lengths))
  columns = len(rows[0]) if rows else 0
  header = np.array([size, columns, flag, *lengths], "<u4").tobytes()
  data = b"".join(data for row in rows for _, data in row)
  return np.frombuffer(header + data, np.uint8)


@dataclasses.dataclass(frozen=True)
class Stream:
  """What a stream holds of some tiles.

  Attributes:
    rows: `{tile: its sections}`.
    flag: what `pack` was given.
  """

  rows: dict[int, list[Section]]
  flag: int


def unpack(fetch: Fetch, grid: tiles.Grid, region: Region | None) -> Stream:
  """Reads the sections of the tiles that a region touches, in one piece.

  Args:
    fetch: reads the stream.
    grid: the leaf's tiles.
    region: a region of the leaf, None for all of it.

  Raises:
    ValueError: if it is no stream of such a leaf.
  """
  whole = fetch("") if region is None else None

  def read(start: int, stop: int) -> memoryview:
    piece = slice(start, stop)
    found = fetch("", (piece,)) if whole is None else whole[piece]
    expect(found, np.dtype(np.uint8), (stop - start,))
    return np.ascontiguousarray(found).data

  size, columns, flag = np.frombuffer(read(0, 4 * _FACTS), "<u4").tolist()
  if size != 4 * (_FACTS + len(grid) * columns):
    raise ValueError(f"a stream of {columns} columns for {len(grid)} tiles")
  table = np.frombuffer(read(4 * _FACTS, size), "<u4").reshape(-1, columns)
  lengths = (table & ((1 << _FORM) - 1)).sum(axis=1, dtype=np.int64)
  stops = size + np.cumsum(lengths)
  wanted = range(len(grid)) if region is None else grid.cover(region)
  if not wanted:
    return Stream({}, flag)
  first, last = wanted[0], wanted[-1]
  start = int(stops[first] - lengths[first])
  body = read(start, int(stops[last]))
  rows = {}
  for tile in wanted:
    stop = int(stops[tile])
    data = body[stop - int(lengths[tile]) - start : stop - start]
    rows[tile] = _split(table[tile].tolist(), data)
  return Stream(rows, flag)
