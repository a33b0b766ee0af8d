"""What every encoding needs: words, regions of them, and the interface."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region

_ALIGNMENT = 64  # bytes

# Words of one key of JAX's own PRNGs.
_KEY_WORDS = {"key<fry>": 2, "key<rbg>": 4, "key<urbg>": 4}


class Fetch(Protocol):
  """Reads a stored array of a leaf, or a slice of it."""

  def __call__(
    self,
    part: str,
    region: Region | None = None,
    out: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns what is stored.

    Args:
      part: which of the leaf's arrays; "" where there is one.
      region: which part of the stored array; None for all of it.
      out: where to put it, of the dtype and shape of the result (strides are
        free: interleaving while copying costs nothing); by default a new
        array.
    """
    ...


Encode = Callable[
  [np.ndarray, "np.ndarray | None", Entry], dict[str, np.ndarray]
]
Decode = Callable[
  [Entry, "Region | None", Fetch, "np.ndarray | None"], np.ndarray
]


@dataclasses.dataclass(frozen=True)
class Encoding:
  """One way to hold a leaf.

  A region is one of the leaf: words that an element has on a last axis (those
  of complex numbers and keys) are always taken together.

  Attributes:
    name: its name in indices.
    encode: `(words, base, entry) -> {part: array}`; `base` are the words of
      another leaf of the same dtype and shape, None unless `delta`.
    decode: `(entry, region, fetch, base) -> words` of that region (None: of
      the whole leaf), the inverse; `base` are the base's words of the same
      region. A base that is writeable is taken over: pass a read-only view of
      one that is needed again. Raises ValueError if what is stored cannot be
      such a leaf.
    parts: names of the arrays it may store; "" where there is one.
    delta: whether it is a difference to a base.
    elementwise: whether shards can be encoded one by one, in place: there is
      one array, `[planes, *words]` of a delta, `[*leaf]` of a whole leaf.
    heavy: whether decoding takes time for each word, changed or not.
    coded: whether what it stores is compressed already.
  """

  name: str
  encode: Encode
  decode: Decode
  parts: tuple[str, ...] = ("",)
  delta: bool = False
  elementwise: bool = False
  heavy: bool = False
  coded: bool = False


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


def full(entry: Entry, region: Region | None) -> Region:
  """Returns a region with all its bounds spelled out.

  Args:
    entry: the leaf.
    region: a region of it; None for all of it.

  Example:
    >>> full(Entry("", "float32", (4,)), None)
    (slice(0, 4, None),)
  """
  if region is None:
    return tiles.whole(entry.shape)
  return tiles.region_of(region, entry.shape)


def of_words(entry: Entry, region: Region) -> Region:
  """Returns the region of a leaf's words that a region of the leaf is.

  Args:
    entry: the leaf.
    region: with all its bounds spelled out.

  Example:
    >>> of_words(Entry("", "complex64", (4,)), (slice(1, 3),))
    (slice(1, 3, None), slice(0, 2, None))
  """
  inner = words_shape(entry.dtype, entry.shape)[len(entry.shape) :]
  return (*region, *(slice(0, size) for size in inner))


def grid_of(entry: Entry) -> tiles.Grid:
  """Returns how a leaf is cut into tiles.

  Args:
    entry: the leaf.
  """
  inner = words_shape(entry.dtype, entry.shape)[len(entry.shape) :]
  size = word_of(entry.dtype).itemsize * math.prod(inner)
  return tiles.grid(entry.shape, size)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns a new array whose memory JAX can use on a CPU without a copy.

  Args:
    shape: its shape.
    dtype: its dtype.

  Example:
    >>> aligned((3,), np.dtype("float32")).ctypes.data % 64
    0
  """
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  return room[start : start + size].view(dtype).reshape(shape)


def needed(base: np.ndarray | None) -> np.ndarray:
  """Returns the base of a difference.

  Args:
    base: what was given for it.

  Raises:
    ValueError: if that is None.
  """
  if base is None:
    raise ValueError("a difference without its base")
  return base


def expect(stored: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
  """Refuses a stored array that is not what its encoding writes.

  Args:
    stored: what was read.
    dtype: the dtype it must have.
    shape: the shape it must have.

  Raises:
    ValueError: if it has not.
  """
  if (stored.dtype, stored.shape) != (dtype, shape):
    raise ValueError(
      f"expected {dtype.name} of shape {shape}, found {stored.dtype.name} of "
      f"shape {stored.shape}"
    )


def key_of(key: str, part: str) -> str:
  """Returns the key of one array of a leaf in a payload.

  Args:
    key: the leaf's key.
    part: which array.

  Example:
    >>> key_of("w", ""), key_of("w", "gaps")
    ('w', 'w//gaps')
  """
  # Names spell an empty part as `~2`: no leaf is called so.
  return f"{key}//{part}" if part else key


def parts_of(
  stored: Mapping[str, np.ndarray], key: str, encoding: Encoding
) -> dict[str, np.ndarray]:
  """Returns the arrays of one leaf among those of a payload.

  Args:
    stored: `{key in the payload: array}`.
    key: the leaf's key.
    encoding: how it is stored.
  """
  keys = {part: key_of(key, part) for part in encoding.parts}
  return {part: stored[k] for part, k in keys.items() if k in stored}


def fetch_from(arrays: Mapping[str, np.ndarray]) -> Fetch:
  """Returns a `Fetch` of arrays in memory.

  Args:
    arrays: `{part: array}`.
  """

  def fetch(
    part: str, region: Region | None = None, out: np.ndarray | None = None
  ) -> np.ndarray:
    stored = arrays[part] if region is None else arrays[part][region]
    if out is None:
      return stored
    expect(stored, out.dtype, out.shape)
    out[...] = stored
    return out

  return fetch
