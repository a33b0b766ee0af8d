"""Encodings: how the bits of a leaf are held in a payload.

* `dense`: the array in its own dtype, as any Orbax user expects it.
* `words`: its bit patterns as unsigned integers, for what Orbax cannot hold
  in its own dtype (PRNG keys, numbers of less than a byte, some float8).
* `planes`: the difference to another leaf. The integer difference of the bit
  patterns, modulo the word, is exact for every dtype; its zigzag code makes
  small differences of either sign small numbers, and splitting the words into
  byte planes puts the bytes that are nearly always zero side by side, where
  zstd finds them.

Which one is smaller is not guessed: a sample of the leaf is compressed both
ways with the codec that will store it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from patchjax.trees import dtypes

DENSE = "dense"
WORDS = "words"
PLANES = "planes"

MAX_DEPTH = 8
"""Longest chain of differences; the next version is stored whole."""

SMALLEST = 4096
"""Bytes below which a difference is not worth reading the base."""

_GAIN = 0.9  # a difference costs reading its base: it must save a tenth
_BLOCK = 1 << 16  # words at a time: the temporaries stay in cache
_STRIPS, _STRIP = 4, 4096  # words measured: evenly spread strips

# What TensorStore's zarr3 driver and numpy both know.
_NATIVE = frozenset(
  "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32"
  " float64 bfloat16 complex64 complex128 float8_e4m3b11fnuz float8_e4m3fn"
  " float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz".split()
)

# Words of one key of JAX's own PRNGs.
_KEY_WORDS = {"key<fry>": 2, "key<rbg>": 4, "key<urbg>": 4}


def plain_encoding(dtype: str) -> str:
  """Returns how a leaf of a dtype is stored without a base.

  Args:
    dtype: name of the dtype.

  Example:
    >>> plain_encoding("bfloat16"), plain_encoding("uint4")
    ('dense', 'words')
  """
  return DENSE if dtype in _NATIVE else WORDS


def to_stored(words: np.ndarray, dtype: str) -> np.ndarray:
  """Returns the array that `plain_encoding` stores, without a copy.

  Args:
    words: bit patterns, as `dtypes.host` gives them.
    dtype: name of the dtype.
  """
  if plain_encoding(dtype) == WORDS:
    return words
  return dtypes.from_words(words, dtype)


def decode(
  stored: np.ndarray, encoding: str, dtype: str, base: np.ndarray | None
) -> np.ndarray:
  """Returns the bit patterns of a stored leaf.

  Args:
    stored: the array as the payload has it.
    encoding: `dense`, `words` or `planes`.
    dtype: name of the leaf's dtype.
    base: bit patterns of the base leaf, for `planes`.

  Raises:
    ValueError: if `stored` cannot be a leaf of this dtype and encoding.
  """
  word = word_of(dtype)
  if encoding == DENSE:
    if stored.dtype != dtypes.KINDS[dtype].dtype:
      raise ValueError(f"expected {dtype}, found {stored.dtype.name}")
    return dtypes.to_words(stored)
  if encoding == WORDS:
    if stored.dtype != word:
      raise ValueError(f"expected words of {word}, found {stored.dtype.name}")
    return stored
  if encoding != PLANES or base is None:
    raise ValueError(f"unknown encoding {encoding!r}")
  if stored.dtype != np.uint8 or stored.shape != (word.itemsize, *base.shape):
    raise ValueError(
      f"expected byte planes of shape {(word.itemsize, *base.shape)}, "
      f"found {stored.dtype.name} of shape {stored.shape}"
    )
  return from_planes(stored, base)


def word_of(dtype: str) -> np.dtype:
  """Returns the unsigned dtype of a leaf's words.

  Args:
    dtype: name of the dtype.

  Example:
    >>> word_of("bfloat16"), word_of("key<fry>")
    (dtype('uint16'), dtype('uint32'))
  """
  if dtype in _KEY_WORDS:
    return np.dtype(np.uint32)
  return dtypes.KINDS[dtype].word


def words_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a leaf's words.

  Args:
    dtype: name of the dtype.
    shape: shape of the leaf.

  Example:
    >>> words_shape("complex64", (3,))
    (3, 2)
  """
  if dtype in _KEY_WORDS:
    return (*shape, _KEY_WORDS[dtype])
  return (*shape, 2) if dtypes.KINDS[dtype].words == 2 else shape


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


def planes_pay(words: np.ndarray, base: np.ndarray) -> bool:
  """Returns whether a leaf is stored smaller as a difference, measured.

  Compresses a sample both ways with the codec of the payloads.

  Args:
    words: unsigned integers [*shape].
    base: those of the base, of the same dtype and shape.
  """
  sample = _sample(words.size)
  new, old = words.reshape(-1)[sample], base.reshape(-1)[sample]
  return compressed(to_planes(new, old)) < _GAIN * compressed(new)


@functools.cache
def _sample(size: int) -> Any:
  """Returns the indices of the measured strips of a leaf."""
  if size <= _STRIPS * _STRIP:
    return slice(None)
  starts = np.linspace(0, size - _STRIP, _STRIPS).astype(np.int64)
  return (starts[:, None] + np.arange(_STRIP)).reshape(-1)


def compressed(x: np.ndarray) -> int:
  """Returns how many bytes an array takes in a payload.

  Args:
    x: array of a plain dtype.
  """
  import tensorstore as ts

  octets = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  array = ts.open(
    {
      "driver": "zarr3",
      "kvstore": {"driver": "memory", "path": "sample/"},
      "metadata": {
        "shape": [octets.size],
        "data_type": "uint8",
        "chunk_grid": {
          "name": "regular",
          "configuration": {"chunk_shape": [octets.size]},
        },
        # Orbax's own choice for its checkpoints.
        "codecs": [
          {"name": "bytes"},
          {"name": "zstd", "configuration": {"level": 3}},
        ],
      },
      "store_data_equal_to_fill_value": True,
    },
    create=True,
    context=ts.Context(),
  ).result()
  array.write(octets).result()
  store = array.kvstore
  assert store is not None  # every zarr array has one
  return len(store.read("c/0").result().value)
