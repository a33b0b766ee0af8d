"""`dense` and `words`: a leaf by itself.

`dense` is the array in its own dtype, as any Orbax user expects it; `words`
its bit patterns as unsigned integers, for what Orbax cannot hold in its own
dtype (PRNG keys, numbers of less than a byte, some float8).
"""

from __future__ import annotations

import numpy as np

from patchjax.history.arrays.encodings.common import (
  Encoding,
  Fetch,
  expect,
  full,
  of_words,
  word_of,
)
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region

# What TensorStore's zarr3 driver and numpy both know.
_NATIVE = frozenset(
  "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32"
  " float64 bfloat16 complex64 complex128 float8_e4m3b11fnuz float8_e4m3fn"
  " float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz".split()
)


def plain_encoding(dtype: str) -> str:
  """Returns how a leaf of a dtype is stored without a base.

  Args:
    dtype: name of the dtype.

  Example:
    >>> plain_encoding("bfloat16"), plain_encoding("uint4")
    ('dense', 'words')
  """
  return DENSE.name if dtype in _NATIVE else WORDS.name


def to_stored(words: np.ndarray, dtype: str) -> np.ndarray:
  """Returns the array that `plain_encoding` stores, without a copy.

  Args:
    words: bit patterns, as `dtypes.host` gives them.
    dtype: name of the dtype.
  """
  if plain_encoding(dtype) == WORDS.name:
    return words
  return dtypes.from_words(words, dtype)


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  del base
  return {"": to_stored(words, entry.dtype)}


def _decode_dense(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  del base
  region = full(entry, region)
  stored = fetch("", region)
  expect(stored, dtypes.KINDS[entry.dtype].dtype, tiles.shape_of(region))
  return dtypes.to_words(stored)


def _decode_words(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  del base
  part = of_words(entry, full(entry, region))
  stored = fetch("", part)
  expect(stored, word_of(entry.dtype), tiles.shape_of(part))
  return stored


DENSE = Encoding("dense", _encode, _decode_dense, elementwise=True)
WORDS = Encoding("words", _encode, _decode_words, elementwise=True)
