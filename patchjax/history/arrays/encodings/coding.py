"""Coded sections: bytes and positions, near their entropy, tile by tile.

What small differences and sparse changes consist of is small and skewed: noise
in few values. Its entropy coder is that of zstd, a dozen times as fast as
deflate's. Matches, which noise has by accident only and each dearer than the
bytes it stands for, are hardly looked for. A stream is an array of bytes: a
table of how each section of each tile is held, and the sections in the order
of the tiles, so that a region is read without the rest.

    header: uint32 [3 + tiles * columns], little-endian:
            length of the header in bytes, columns, flag, lengths
    sections: as many bytes as their length says; its top two bits are the form
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from patchjax.history.arrays.encodings.common import Fetch, expect
from patchjax.trees import tiles
from patchjax.trees.tiles import Region

_RAW, _CODED, _GAPS, _DIGITS = 0, 1, 2, 3
_FORM = 30  # the bit from which on a length holds the form
_FACTS = 3  # numbers before the lengths

_SHORT = 64  # bytes that are not cut into digits
_RARE = 8  # digits set less often than one in so many are held by positions

_RARE_FACTS = 6  # numbers before their sections: how many, and five lengths

_GAP = np.dtype(np.uint32)

# The four digits that are packed in a byte, as bytes.
_FOURS = np.bitwise_or.reduce(
  [
    (np.arange(256, dtype=np.uint32) >> np.uint32(2 * i) & np.uint32(3))
    << np.uint32(8 * i)
    for i in range(4)
  ]
)

Section = tuple[int, bytes]
"""The form of a section, and its bytes."""


EMPTY: Section = (_CODED, b"")
"""Zeros, however many."""


@functools.lru_cache(maxsize=64)
def _coders(thread: int) -> tuple[Any, Any]:
  """Returns what compresses and decompresses; a thread has its own."""
  del thread
  # The smallest table to find matches by, and the longest matches. Neither
  # magic number nor size: the section knows both.
  parameters = zstandard.ZstdCompressionParameters(
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
    strategy=zstandard.STRATEGY_FAST,
    window_log=20,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_content_size=False,
  )
  return zstandard.ZstdCompressor(
    compression_params=parameters
  ), zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)


def code_bytes(octets: np.ndarray) -> Section:
  """Returns bytes as a section; all zeros take none.

  Args:
    octets: uint8 [n], contiguous.
  """
  largest = int(octets.max(initial=0))
  if not largest:
    return EMPTY
  if largest < 16 and octets.size >= _SHORT:
    # Among so few values everything is a match: denser, hardly anything is.
    digits = [code_digits(octets, k) for k in (0, 1)]
    lengths = np.array([_spell(section) for section in digits], "<u4")
    data = lengths.tobytes() + digits[0][1] + digits[1][1]
    return (_DIGITS, data) if len(data) < octets.size else _packed(octets)
  return _packed(octets)


def _packed(octets: np.ndarray) -> Section:
  coded = _coders(threading.get_ident())[0].compress(octets.data)
  if len(coded) < octets.size:
    return _CODED, coded
  return _RAW, octets.tobytes()


def decode_bytes(section: Section, size: int) -> np.ndarray:
  """Returns the bytes of a section.

  Args:
    section: as `code_bytes` made it.
    size: how many bytes there are.

  Raises:
    ValueError: if it is no such section.
  """
  form, data = section
  if form == _DIGITS:
    # Each section within another is for fewer bytes: there is an end to it.
    if len(data) < 8 or size < _SHORT:
      raise ValueError(f"{len(data)} bytes of digits for {size} bytes")
    octets = np.zeros(-(-size // 4) * 4, np.uint8)
    lengths = np.frombuffer(data[:8], "<u4").tolist()
    for k, digit in enumerate(_split(lengths, data[8:])):
      add_digits(octets, k, digit)
    return octets[:size]
  if form == _CODED:
    if not data:
      return np.zeros(size, np.uint8)
    data = _decoded(data, size)
  if len(data) != size:
    raise ValueError(f"expected a section of {size} bytes, found {len(data)}")
  return np.frombuffer(data, np.uint8)


def _decoded(data: bytes, size: int) -> bytes:
  # A size in the frame would be believed, however large.
  if data[0] >> 6 or data[0] & 0x20:
    raise ValueError("a section is damaged: it says its own size")
  decoder = _coders(threading.get_ident())[1]
  try:
    return decoder.decompress(data, max_output_size=size)
  except (zstandard.ZstdError, MemoryError) as error:
    raise ValueError(f"a section is damaged: {error}") from error


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


def code_digits(octets: np.ndarray, k: int) -> Section:
  """Returns one digit to base four of some bytes as a section.

  Four to a byte, or the positions of the few that are not zero.

  Args:
    octets: uint8 [n], contiguous.
    k: number of the digit, 0 to 3.
  """
  packed = _pack_fours(octets, k)
  count = int(np.bitwise_count((packed | packed >> 1) & 0x55).sum())
  if count * _RARE > octets.size or not count:
    return _packed(packed) if count else EMPTY
  # Few bytes have a digit set: the others are not unpacked.
  some = np.flatnonzero(packed)
  digits = _FOURS[packed[some]].view(np.uint8)
  within = np.flatnonzero(digits)
  at = 4 * some[within >> 2] + (within & 3)
  values = digits[within] - np.uint8(1)
  sections = [*code_positions(at), code_bytes(values)]
  spelled = [count] + [_spell(section) for section in sections]
  lengths = np.array(spelled, "<u4")
  held = [lengths.tobytes(), *(data for _, data in sections)]
  return _GAPS, b"".join(held)


def _pack_fours(octets: np.ndarray, k: int = 0) -> np.ndarray:
  """Returns one digit to base four of all bytes, four to a byte."""
  if rest := -octets.size % 4:
    octets = np.append(octets, np.zeros(rest, np.uint8))
  fours = octets.view("<u4") >> np.uint32(2 * k)
  fours &= np.uint32(0x03030303)
  fours |= fours >> np.uint32(6)
  fours |= fours >> np.uint32(12)
  return fours.astype(np.uint8)


def add_digits(octets: np.ndarray, k: int, section: Section) -> None:
  """Sets one digit of some bytes; the inverse of `code_digits`.

  Args:
    octets: uint8 [n], n a multiple of four, with this digit zero.
    k: number of the digit.
    section: as `code_digits` made it.

  Raises:
    ValueError: if it is no such section.
  """
  form, data = section
  if form == _GAPS:
    at, digits = _decode_rare(data, octets.size)
    octets[at] |= digits << np.uint8(2 * k)
  elif data:
    fours = _FOURS[decode_bytes(section, octets.size // 4)]
    if k:
      fours <<= np.uint32(2 * k)
    octets.view("<u4")[...] |= fours


def _decode_rare(data: bytes, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns where digits are that are not zero, and which they are."""
  if len(data) < 4 * _RARE_FACTS:
    raise ValueError(f"{len(data)} bytes of rare digits")
  head = np.frombuffer(data[: 4 * _RARE_FACTS], "<u4")
  count, *lengths = head.tolist()
  if count * _RARE > size:
    raise ValueError(f"{count} rare digits among {size}")
  *gaps, values = _split(lengths, data[4 * _RARE_FACTS :])
  at = decode_positions(gaps, count, size)
  return at, (decode_bytes(values, count) + np.uint8(1)) & np.uint8(3)


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
