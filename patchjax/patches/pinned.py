"""The pinned evaluation: a patch applied by numpy, the same bits everywhere.

XLA may contract a multiply and an add into one rounding, and may sum a
product in any order, so compiled results differ between machines in the last
bit. What a history stores must not. Here every operation is an IEEE float32
(float64 for wide leaves) operation of its own: a low-rank product is a sum of
outer products in the order of the rank, and a value is rounded once at the
end. Leaves are host arrays, so 64-bit leaves are exact whatever JAX's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from patchjax.patches.checks import check_deltas
from patchjax.patches.codes import (
  Dense,
  LowRank,
  Quantized,
  Sparse,
  spread,
  unravel,
)
from patchjax.patches.cutting import cut
from patchjax.patches.deltas import Delta, Insert, Rename
from patchjax.patches.laws import LAWS, compute_dtype
from patchjax.trees import dtypes, tiles
from patchjax.trees.errors import LawError

_PIECE = 1 << 16  # entries that are computed at a time


def apply_host(leaf: Any, delta: Delta, *, undo: bool = False) -> Any:
  """Returns one leaf with a delta applied, evaluated by numpy.

  Args:
    leaf: array (numpy or fully addressable jax; PRNG keys included).
    delta: a numeric delta.
    undo: whether to take the delta away instead.

  Returns:
    A new numpy array of the leaf's shape and dtype (a jax array of keys for
    PRNG keys).

  Raises:
    LawError: if the law cannot act on the leaf's dtype, or not be undone.

  Example:
    >>> delta = Delta(Dense(np.float32([1, 2])), "add")
    >>> apply_host(np.float32([10, 20]), delta).tolist()
    [11.0, 22.0]
  """
  law = LAWS[delta.law]
  function = law.undo if undo else law.act
  if function is None:
    raise LawError(f"a delta of law {delta.law!r} cannot be reverted")
  if delta.law == "bits" or dtypes.is_key(leaf):
    held, dtype = dtypes.host(leaf)
    if delta.law == "set":
      return dtypes.device(dtypes.host(numbers(delta.code, None))[0], dtype)
    changed = _combine(held, delta.code, function, None, held.dtype)
    kind = dtypes.KINDS.get(dtype)
    if kind and kind.bits < 8:
      changed &= kind.word.type((1 << kind.bits) - 1)
    return dtypes.device(changed, dtype)
  leaf = np.asarray(leaf)
  wide = leaf.dtype if delta.law == "set" else compute_dtype(leaf)
  if isinstance(delta.code, Sparse) or leaf.size < 2 * _PIECE:
    return _combine(leaf, delta.code, function, wide, leaf.dtype)
  # Piece by piece: the many passes of a low-rank sum stay in cache. Entry by
  # entry the operations are the same.
  changed = np.empty(leaf.shape, leaf.dtype)
  rows = max(1, _PIECE * leaf.shape[0] // leaf.size)
  if isinstance(delta.code, LowRank):
    with np.errstate(all="ignore"):
      for part, held in _products(delta.code, wide, rows):
        changed[part] = function(leaf[part].astype(wide, copy=False), held)
    return changed
  for start in range(0, leaf.shape[0], rows):
    piece = tiles.region_of((slice(start, start + rows),), leaf.shape[:1])
    piece += tiles.whole(leaf.shape)[1:]
    code = cut(delta, leaf.shape, piece).code
    changed[piece] = _combine(leaf[piece], code, function, wide, leaf.dtype)
  return changed


def _combine(
  x: np.ndarray, code: Any, function: Any, compute: Any, out: np.dtype
) -> np.ndarray:
  # Overflow to inf and operations on NaN are IEEE results, not mistakes.
  with np.errstate(all="ignore"):
    if not isinstance(code, Sparse):
      held = numbers(code, compute)
      wide = x if compute is None else x.astype(compute, copy=False)
      result = function(wide, np.broadcast_to(held, x.shape))
      result = result.astype(out, order="C", copy=False)
      # What is set is the code's own array, and may be somebody's.
      return np.array(result) if np.may_share_memory(result, held) else result
    values = code.values
    held = numbers(values, compute)
    indices = np.asarray(code.indices)
    inside = (indices if indices.ndim == 1 else indices[:, 0]) < code.end
    at = tuple(axis[inside] for axis in unravel(indices, code.shape))
    changed = np.array(x, order="C")
    rows = changed if code.shape else changed[None]
    old = rows[at]
    old = old if compute is None else old.astype(compute)
    rows[at] = function(old, held[inside]).astype(out)
    return changed


def numbers(code: Any, dtype: Any = None) -> np.ndarray:
  """Returns the numbers of a code that is not sparse, on the host.

  Args:
    code: `Dense`, `LowRank` or `Quantized`, or an array as it is.
    dtype: dtype of the result, by default that of the numbers.
  """
  match code:
    case Dense(values=values):
      if dtypes.is_key(values):
        return values
      values = np.asarray(values)
      return values if dtype is None else values.astype(dtype)
    case LowRank():
      return _product(code, dtype)
    case Quantized():
      dtype = dtype or np.dtype(code.scales.dtype)
      wide = dtypes.widened(dtype)
      scales = spread(np.asarray(code.scales), code.block, code.shape)
      return (np.asarray(code.words).astype(wide) * scales.astype(wide)).astype(
        dtype
      )
  values = np.asarray(code)
  return values if dtype is None else values.astype(dtype)


def _product(code: LowRank, dtype: Any) -> np.ndarray:
  """`scale * a @ b` as rank-ordered sums of outer products."""
  [(_, total)] = _products(code, dtype, max(code.shape[0], 1))
  return total


def _products(
  code: LowRank, dtype: Any, rows: int
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields `scale * a @ b`, some rows at a time, in memory that is used again.

  Args:
    code: the factors.
    dtype: dtype of the result; by default that of the factors.
    rows: how many.
  """
  dtype = np.dtype(dtype or np.asarray(code.a).dtype)
  wide = dtypes.widened(dtype)
  # The rank first, then the axes of the leaf: of one entry where they are the
  # other factor's.
  a = np.moveaxis(np.asarray(code.a).astype(wide), -1, 0)
  b = np.moveaxis(np.asarray(code.b).astype(wide), code.batch, 0)
  inputs = a.ndim - code.batch - 1
  outputs = b.ndim - code.batch - 1
  a = np.ascontiguousarray(a).reshape(a.shape + (1,) * outputs)
  batch = b.shape[: code.batch + 1]
  b = b.reshape(batch + (1,) * inputs + b.shape[code.batch + 1 :])
  scale = np.asarray(code.scale).astype(wide)
  length = code.shape[0]
  total = np.empty((min(rows, length), *code.shape[1:]), wide)
  outer = np.empty_like(total)
  for start in range(0, length, rows) or [0]:
    part = slice(start, min(start + rows, length))
    size = part.stop - start
    sums, terms = total[:size], outer[:size]
    with np.errstate():  # restores the size of buffers, too
      # Numpy would copy rows that are shorter than its buffers, at four times
      # the price of the multiplication.
      np.setbufsize(16)
      if not code.rank:
        sums.fill(0)
      for r in range(code.rank):
        left, right = (x[r] if len(x[r]) == 1 else x[r][part] for x in (a, b))
        # Two statements: one expression could become a fused multiply-add.
        np.multiply(left, right, out=terms)
        np.add(sums if r else wide.type(0), terms, out=sums)
      np.multiply(sums, scale, out=sums)
    yield part, sums.astype(dtype, copy=False)


def apply_named(named: Mapping[str, Any], patch: Any) -> dict[str, Any]:
  """Returns `{name: leaf}` with a whole patch applied by numpy.

  Untouched leaves are passed through as they are. Structural deltas are done
  after the numeric ones, as in `patchjax.apply`.

  Args:
    named: `{text name: leaf}` of the base; an `Entry` may stand for a leaf
      that the patch does not touch.
    patch: a `Patch`; whether it was made for this value is not checked.

  Returns:
    `{text name: leaf}`, renamed leaves in the place of the old ones.

  Raises:
    MismatchError: lists every delta that does not fit its leaf.
  """
  check_deltas(named, patch.deltas)
  changed: dict[str, Any] = {}
  for name, leaf in named.items():
    match patch.deltas.get(name):
      case None:
        changed[name] = leaf
      case Delta() as delta:
        changed[name] = apply_host(leaf, delta)
      case Insert(value=value, axis=int() as axis):
        changed[name] = np.concatenate(
          [np.asarray(leaf), np.asarray(value)], axis=axis
        )
      case Rename(to=to):
        changed[to] = leaf
  changed.update(
    (name, delta.value)
    for name, delta in patch.deltas.items()
    if isinstance(delta, Insert) and delta.axis is None
  )
  return changed
