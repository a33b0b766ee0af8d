"""`sparse`: the entries that changed, and where they are.

Positions are held as the gaps between them, entries as zigzag codes of their
differences or as they are, whichever is smaller. Both are coded byte by byte
and tile by tile.
"""

from __future__ import annotations

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
from patchjax.history.arrays.encodings.zigzag import add_zigzag, zigzag
from patchjax.trees import tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region

_DIFFERENCES, _ENTRIES = 0, 1
_GAPS = 4  # sections that positions take
_TRIED = 1 << 14  # changed entries that are coded both ways to compare


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  base = needed(base)
  changes = []
  for tile in grid_of(entry):
    new, old = words[tile].reshape(-1), base[tile].reshape(-1)
    at = np.flatnonzero(new != old)
    changes.append((at, new[at], old[at]))
  flag = _form(changes)
  rows = []
  for at, new, old in changes:
    count = (0, np.uint32(at.size).tobytes())
    rows.append([count, *_code(at, new, old, flag)])
  return {"": coding.pack(rows, flag)}


def code_changes(
  at: np.ndarray, new: np.ndarray, old: np.ndarray
) -> list[coding.Section]:
  """Returns the sections of some changes, in the smaller form.

  Args:
    at: where they are.
    new: the words.
    old: those before.
  """
  return _code(at, new, old, _form([(at, new, old)]))


def _code(
  at: np.ndarray, new: np.ndarray, old: np.ndarray, flag: int
) -> list[coding.Section]:
  values = new if flag == _ENTRIES else zigzag(new, old)
  return coding.code_positions(at) + coding.code_words(values)


def _form(changes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> int:
  """Returns what takes less room: differences or the entries themselves."""
  taken, new, old = 0, [], []
  for at, some, others in changes:
    if at.size and taken < _TRIED:
      new.append(some[: _TRIED - taken])
      old.append(others[: _TRIED - taken])
      taken += at.size
  if not new:
    return _DIFFERENCES
  entries, before = np.concatenate(new), np.concatenate(old)
  sizes = [
    sum(len(data) for _, data in coding.code_words(values))
    for values in (zigzag(entries, before), entries)
  ]
  return _ENTRIES if sizes[1] < sizes[0] else _DIFFERENCES


def _decode(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  base = needed(base)
  grid = grid_of(entry)
  wanted = full(entry, region)
  expect(base, base.dtype, tiles.shape_of(of_words(entry, wanted)))
  stream = coding.unpack(fetch, grid, None if region is None else wanted)
  # A base that may be written to is; one axis at least, to be indexed by.
  words = base
  if not base.flags.writeable:
    words = aligned(base.shape, base.dtype)
    words[...] = base
  words = words.reshape(base.shape or (1,))
  for number, sections in stream.rows.items():
    tile = grid[number]
    shape = tiles.shape_of(of_words(entry, tile)) or (1,)
    at, values = _changes(sections, base.dtype, int(np.prod(shape)))
    shared = tiles.overlap(tile, wanted)
    if shared is None or not at.size:
      continue
    place, inside = _places(at, shape, tile, wanted)
    values = values[inside]
    if stream.flag == _DIFFERENCES:
      values = add_zigzag(values, words[place])
    words[place] = values
  return words.reshape(base.shape)


def _changes(
  sections: list[coding.Section], word: np.dtype, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions in a tile, and what is held of each."""
  if len(sections) != 1 + _GAPS + word.itemsize or len(sections[0][1]) != 4:
    raise ValueError(f"{len(sections)} sections for words of {word.name}")
  count = int(np.frombuffer(sections[0][1], np.uint32)[0])
  if count > size:
    raise ValueError(f"{count} changes among {size} words")
  at = coding.decode_positions(sections[1 : 1 + _GAPS], count, size)
  planes = [coding.decode_bytes(s, count) for s in sections[1 + _GAPS :]]
  return at, coding.join_planes(planes, word)


def _places(
  at: np.ndarray, shape: tuple[int, ...], tile: Region, wanted: Region
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
  """Returns where positions of a tile lie in a region, and which do."""
  axes = list(np.unravel_index(at, shape))
  inside = np.ones(at.size, bool)
  for axis, (own, part) in enumerate(zip(tile, wanted)):
    axes[axis] = axes[axis] + (own.start - part.start)
    inside &= (axes[axis] >= 0) & (axes[axis] < part.stop - part.start)
  return tuple(axis[inside] for axis in axes), inside


SPARSE = Encoding("sparse", _encode, _decode, delta=True, coded=True)
