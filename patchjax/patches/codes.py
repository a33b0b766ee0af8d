"""Codes: how the numbers of a delta are held.

A code describes one array, of the shape of the leaf it is for. `Dense` holds
it whole (or along some axes only), `Sparse` some entries, `LowRank` two
factors, `Quantized` small integers with scales of blocks. Codes nest: the
values of a `Sparse` may be `Quantized`. What a code holds it holds exactly;
loss happens in transforms, before an array is encoded.

Codes are registered dataclasses: their arrays may be tracers, their shapes
static. Constructors check nothing, since pytrees are rebuilt with all sorts of
leaves; the checks are where a patch is made, loaded, or applied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.trees.dtypes import KINDS, dtype_name, is_key, widened

Array = Any
_static: dict[str, Any] = {"metadata": {"static": True}}


def _nbytes(x: Array) -> int:
  if is_key(x):
    x = jax.eval_shape(jax.random.key_data, x)
  kind = KINDS[dtype_name(x)]
  return math.prod(x.shape) * kind.word.itemsize * kind.words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
  """The array itself.

  Attributes:
    values: the array; an axis of size 1 stands for equal numbers along that
      axis of the leaf (IA3 is `mul` with `values` of shape `[n, 1]`).
  """

  values: Array

  TRAINABLE: ClassVar[tuple[str, ...]] = ("values",)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `values`, which broadcasts to that of the leaf."""
    return tuple(self.values.shape)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return _nbytes(self.values)

  def dense(self, dtype: Any = None) -> jax.Array:
    """Returns the array, in `dtype` if given."""
    return _cast(self.values, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
  """Some entries of an array; the others are the law's identity.

  Attributes:
    values: `[nnz]` numbers, or a `Quantized` of that shape; for the law
      `bits` `[nnz, ...]` words.
    indices: int32 `[nnz]`, sorted row-major positions in the leaf. Padding, so
      that patches can be stacked, has distinct positions past the end. A leaf
      of 2**31 entries or more has `[nnz, 2]`: the position among its leading
      axes and within the rest, see `split_axis`.
    shape: shape of the leaf.
  """

  values: Array | Quantized
  indices: Array
  shape: tuple[int, ...] = dataclasses.field(**_static)

  TRAINABLE: ClassVar[tuple[str, ...]] = ("values",)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    values = self.values
    held = values.nbytes if isinstance(values, Quantized) else _nbytes(values)
    return held + _nbytes(self.indices)

  @property
  def end(self) -> int:
    """The first position that is padding (of the leading axes, if split)."""
    return math.prod(self.shape[: split_axis(self.shape) or None])

  def entries(self, dtype: Any = None) -> jax.Array:
    """Returns the `[nnz]` numbers, in `dtype` if given."""
    if isinstance(self.values, Quantized):
      return self.values.dense(dtype)
    return _cast(self.values, dtype)

  def positions(self) -> tuple[jax.Array, ...]:
    """Returns the indices as one int32 array an axis of the leaf.

    A leaf without axes counts as one of shape `[1]`.
    """
    return unravel(self.indices, self.shape)

  def dense(self, dtype: Any = None, fill: float = 0) -> jax.Array:
    """Returns the whole array, `fill` where no entry is.

    Args:
      dtype: dtype of the result; by default that of the values.
      fill: the number of the entries that are not held.
    """
    entries = self.entries(dtype)
    shape = (*(self.shape or (1,)), *entries.shape[1:])
    full = jnp.full(shape, fill, entries.dtype)
    full = full.at[self.positions()].set(entries, **SCATTER)
    return full if self.shape else full[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A product of two factors: `scale * a @ b`.

  The factors keep the axes of the leaf, so that nothing is reshaped and each
  can be sharded as the leaf is: `a` has the leaf's batch axes (those of
  scan-stacked layers), its input axes and the rank; `b` its batch axes, the
  rank and its output axes.

  Attributes:
    a: `[*batch, *inputs, rank]`.
    b: `[*batch, rank, *outputs]`.
    scale: a number (LoRA's alpha / rank); not trained unless asked.
    batch: number of leading batch axes.
  """

  a: Array
  b: Array
  scale: Array
  batch: int = dataclasses.field(default=0, **_static)

  TRAINABLE: ClassVar[tuple[str, ...]] = ("a", "b")
  SCALES: ClassVar[tuple[str, ...]] = ("scale",)

  @property
  def rank(self) -> int:
    """Size of the contracted axis."""
    return self.b.shape[self.batch]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the product."""
    return (*self.a.shape[:-1], *self.b.shape[self.batch + 1 :])

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return _nbytes(self.a) + _nbytes(self.b) + _nbytes(self.scale)

  def dense(self, dtype: Any = None) -> jax.Array:
    """Returns the product, accumulated in at least float32.

    Args:
      dtype: dtype of the result; by default that of the factors.
    """
    out = jnp.dtype(dtype or self.a.dtype)
    wide = widened(out)
    batch = tuple(range(self.batch))
    product = jax.lax.dot_general(
      _cast(self.a, wide),
      _cast(self.b, wide),
      (((self.a.ndim - 1,), (self.batch,)), (batch, batch)),
      precision=jax.lax.Precision.HIGHEST,
    )
    return (product * _cast(self.scale, wide)).astype(out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """Small integers times the scale of their block.

  Attributes:
    words: int8 integers, of the leaf's shape, between `-2**(bits-1)` and
      `2**(bits-1) - 1`; with one bit they are -1 or 1.
    scales: floating point, one a block: `ceil(n / block)` on each axis.
    bits: 1 to 8, bits a word takes in a file.
    block: size of a block on each axis.
  """

  words: Array
  scales: Array
  bits: int = dataclasses.field(**_static)
  block: tuple[int, ...] = dataclasses.field(**_static)

  TRAINABLE: ClassVar[tuple[str, ...]] = ()
  SCALES: ClassVar[tuple[str, ...]] = ("scales",)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the words."""
    return tuple(self.words.shape)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file, where the words are packed."""
    return -(-math.prod(self.shape) * self.bits // 8) + _nbytes(self.scales)

  def dense(self, dtype: Any = None) -> jax.Array:
    """Returns `words * scales`, multiplied in at least float32.

    Args:
      dtype: dtype of the result; by default that of the scales.
    """
    out = jnp.dtype(dtype or self.scales.dtype)
    wide = widened(out)
    scales = spread(_cast(self.scales, wide), self.block, self.shape)
    return (_cast(self.words, wide) * scales).astype(out)


Code = Dense | Sparse | LowRank | Quantized
CODES: dict[str, type] = {
  code.__name__: code for code in (Dense, Sparse, LowRank, Quantized)
}


def number_dtype(code: Code) -> Any:
  """Returns the dtype of the numbers that a code holds.

  Args:
    code: any code.

  Example:
    >>> number_dtype(Quantized(np.int8([1]), np.float16([2]), 8, (1,))).name
    'float16'
  """
  match code:
    case LowRank(a=array) | Quantized(scales=array):
      return array.dtype
    case Sparse(values=Quantized() as values):
      return values.scales.dtype
  array: Any = code.values
  return array.dtype


# Positions are sorted and differ; padding lies past the end and is dropped.
SCATTER: dict[str, Any] = {
  "mode": "drop",
  "unique_indices": True,
  "indices_are_sorted": True,
}
GATHER: dict[str, Any] = SCATTER | {"mode": "fill", "fill_value": 0}


def _cast(x: Array, dtype: Any) -> jax.Array:
  x = jnp.asarray(x)
  return x if dtype is None else x.astype(dtype)


def spread(scales: Array, block: Sequence[int], shape: Sequence[int]) -> Array:
  """Returns the scales of blocks as an array that broadcasts to `shape`.

  Args:
    scales: one number a block.
    block: size of a block on each axis.
    shape: shape of the whole.
  """
  for axis, (size, step) in enumerate(zip(shape, block, strict=True)):
    if 1 < step < size:
      xp = np if isinstance(scales, np.ndarray) else jnp
      index = np.arange(size, dtype=np.int32) // np.int32(step)
      scales = xp.take(scales, index, axis=axis)
  return scales


def split_axis(shape: Sequence[int]) -> int:
  """Returns the axis from which on the trailing axes' positions fit in int32.

  0 for leaves of less than 2**31 entries: one position says it all.

  Args:
    shape: shape of the leaf.

  Example:
    >>> split_axis((1000, 1000)), split_axis((100, 50_000, 1000))
    (0, 1)
  """
  limit = 2**31 - 1
  return next(
    axis for axis in range(len(shape) + 1) if math.prod(shape[axis:]) <= limit
  )


def unravel(indices: Array, shape: Sequence[int]) -> tuple[Array, ...]:
  """Returns positions as one array an axis; those past the end stay past it.

  Args:
    indices: `[nnz]`, or `[nnz, 2]` for leaves that need it.
    shape: shape of the leaf.

  Example:
    >>> [axis.tolist() for axis in unravel(np.int32([4, 6]), (2, 3))]
    [[1, 2], [1, 0]]
  """
  axis = split_axis(shape)
  if axis:
    return (
      *unravel(indices[:, 0], shape[:axis]),
      *unravel(indices[:, 1], shape[axis:]),
    )
  # jnp.unravel_index would clip positions past the end; they must stay out.
  axes = []
  for size in reversed(shape[1:]):
    size = indices.dtype.type(max(size, 1))
    axes.append(indices % size)
    indices = indices // size
  return (indices, *reversed(axes))
