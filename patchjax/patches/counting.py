"""Counting true entries, fast and beyond int32.

Counts are pairs of int32 limbs `[2, ...]`, `high * 2**12 + low`, so that a
model of more than `2**31` entries is counted exactly with 64-bit types off.
Limbs are added as they are, over leaves and devices, and carried afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any

LIMB = 12
"""Bits of the low limb: few enough to add half a million of them."""


def limbs(count: int) -> np.ndarray:
  """Returns a host integer as limbs `int32[2]` (high, low)."""
  return np.array([count >> LIMB, count & ((1 << LIMB) - 1)], np.int32)


def carried(count: Array) -> Array:
  """Returns limbs `int32[2, ...]` with the low one brought under `2**12`."""
  high, low = count[0], count[1]
  # On the host where it is there: outside jit each small operation takes
  # longer than a pass over a small leaf.
  stack = jnp.stack if isinstance(count, jax.Array) else np.stack
  return stack(
    [high + (low >> np.int32(LIMB)), low & np.int32((1 << LIMB) - 1)]
  )


def number_of(count: Array, xp: Any = jnp) -> Array:
  """Returns limbs `int32[2, ...]`, also of a difference, as float32.

  Args:
    count: limbs; both are exact in float32 for less than `2**36`.
    xp: `jnp`, or `np` for limbs on the host.

  Example:
    >>> number_of(limbs(5000)).tolist()
    5000.0
  """
  count = xp.asarray(count).astype(xp.float32)
  return count[0] * xp.float32(1 << LIMB) + count[1]


def at_least(count: Array, k: Array) -> Array:
  """Returns `count >= k` for carried limbs."""
  same = (count[0] == k[0]) & (count[1] >= k[1])
  return (count[0] > k[0]) | same


def _rows(shape: tuple[int, ...], most: int = 64) -> tuple[int, ...]:
  """Returns a shape of rows to reduce: several, for several cores.

  Each holds whole slices of the leading axes. A cut through a slice would
  have the index of each entry computed by divisions, where one is asked for:
  ten times as slow.

  Args:
    shape: of the arrays.
    most: rows, of large arrays.
  """
  size = math.prod(shape)
  if size >= 1 << 16:
    rows = 1
    for length in shape:
      fit = range(min(most // rows, length), 0, -1)
      part = next(d for d in fit if length % d == 0)
      rows *= part
      if part < length:
        break
    if rows >= 8:
      return (rows, size // rows)
  return (1, size) if len(shape) < 2 else (size // shape[-1], shape[-1])


def count_true(masks: Sequence[Array], *, local: bool) -> Array:
  """Counts the true entries of several masks of one shape in one read.

  The counts are the operands of one variadic reduction: XLA fuses that with
  what computes the masks, where a plain sum of a mask takes twenty times as
  long on a CPU.

  Args:
    masks: boolean arrays of one shape.
    local: whether the arrays lie on one device (also inside `shard_map`) and
      so may be reshaped freely.

  Returns:
    carried limbs `int32[2, len(masks)]`.
  """
  return count_each([masks], local=local)


def count_each(groups: Sequence[Sequence[Array]], *, local: bool) -> Array:
  """Counts the true entries of groups of masks, with one read for each group.

  Args:
    groups: see `count_true`; of one shape.
    local: see `count_true`.

  Returns:
    carried limbs `int32[2, number of all masks]`.
  """
  shape = groups[0][0].shape
  if not math.prod(shape):
    return jnp.zeros((2, sum(map(len, groups))), jnp.int32)
  partial = [x for masks in groups for x in _partial(masks, local=local)]
  # Fused with the next sum, the reduction would run on one core.
  partial = lax.optimization_barrier(partial)
  if math.prod(shape) >= 1 << 31:
    return jnp.stack([limb_sum(p) for p in partial], axis=1)
  flat = jnp.stack([p.reshape(-1) for p in partial])
  total = jnp.sum(flat, axis=1, dtype=jnp.int32)
  return jnp.stack(
    [total >> jnp.int32(LIMB), total & jnp.int32((1 << LIMB) - 1)]
  )


def _partial(masks: Sequence[Array], *, local: bool) -> Sequence[Array]:
  """Returns the counts of several masks along rows."""
  shape = masks[0].shape
  rows: tuple[int, ...] = shape or (1,)
  axis = len(rows) - 1
  if local:
    rows = _rows(shape, 64 if len(masks) > 1 else 16)
    axis = len(rows) - 1
    # One mask alone along its rows would be the slow case again: the sums of
    # a few rows beside each other are not.
    if len(masks) == 1 and 8 <= rows[0] <= 16:
      axis = 0
  ones = [mask.reshape(rows).astype(jnp.int32) for mask in masks]
  return lax.reduce(
    tuple(ones),
    (jnp.int32(0),) * len(ones),
    lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
    (axis,),
  )


def limb_sum(x: Array) -> Array:
  """Sums non-negative int32 of any number and size into carried limbs."""

  def add(a, b):
    low = a[1] + b[1]
    high = a[0] + b[0] + (low >> jnp.int32(LIMB))
    return high, low & jnp.int32((1 << LIMB) - 1)

  pair = (x >> jnp.int32(LIMB), x & jnp.int32((1 << LIMB) - 1))
  zero = jnp.int32(0)
  return jnp.stack(lax.reduce(pair, (zero, zero), add, tuple(range(x.ndim))))
