"""The order of entries in their rows, exactly, on any mesh.

Whether an entry is above another one is seen by looking at that one; ranks of
all entries need a sort. Either is made where whole rows are: rows that are cut
over devices are first handed round, each device gets some of them (an
all-to-all, never a copy of the leaf on every device). On a CPU, NumPy sorts
rows about ten times as fast as what XLA compiles, so a leaf on CPU devices is
ranked by it in a callback; the ranks are the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import ordering, placement

Array = Any

ALWAYS = 1 << 31
"""What `outranks` takes for the other entry, where the answer is to be yes."""


def outranks(
  values: Array, others: Array, leaf: placement.Leaf, axis: int = -1
) -> Array:
  """Returns which entries are larger than another one of their row.

  By magnitude; of equal ones the first is the smaller.

  Args:
    values: floats of the leaf's shape.
    others: `uint32`, which of the n - 1 other entries of its row each is
      compared with, from 0; n - 1 for none, then it is false, and `ALWAYS`
      for those that are true anyway.
    leaf: where the leaf is.
    axis: along which a row lies.

  Example:
    >>> import jax.numpy as jnp
    >>> values = jnp.float32([[5, -2, -5, 1]])
    >>> others = jnp.uint32([[0, 0, 0, ALWAYS]])
    >>> outranks(values, others, placement.leaf_of(values)).tolist()
    [[True, False, True, True]]
  """
  if not leaf.shape or not leaf.size:
    return others >= jnp.uint32(ALWAYS)
  # Wider floats are ranked as these: rounding keeps the order.
  values = lax.stop_gradient(values).astype(jnp.float32)

  def shard(held, leaf):
    values, others = held
    return _shard_outranks(values, others, leaf, axis % len(leaf.shape))

  return placement.on_shards(shard, (values, others), leaf)


def _shard_outranks(
  values: Array, others: Array, leaf: placement.Leaf, axis: int
) -> Array:
  if not leaf.local:
    return _above(values, others, axis)
  if not (leaf.manual and leaf.axes[axis]):
    return _looked_up(values, others, axis)

  def whole(values, others):
    return _looked_up(values, others, 1)

  return _by_whole_rows(whole, (values, others), leaf, axis)


def _by_whole_rows(
  f: Callable[..., Array],
  held: Sequence[Array],
  leaf: placement.Leaf,
  axis: int,
) -> Array:
  """Returns f of rows as long as the leaf's, which are cut over devices."""
  names = leaf.axes[axis]
  devices = math.prod(lax.axis_size(name) for name in names)
  shape = jnp.moveaxis(held[0], axis, -1).shape
  count = math.prod(shape[:-1])

  def handed(x):
    rows = jnp.moveaxis(x, axis, -1).reshape(count, shape[-1])
    rows = jnp.pad(rows, ((0, -count % devices), (0, 0)))
    return lax.all_to_all(rows, names, 0, 1, tiled=True)

  out = lax.all_to_all(f(*map(handed, held)), names, 1, 0, tiled=True)
  return jnp.moveaxis(out[:count].reshape(shape), -1, axis)


def _above(values: Array, others: Array, axis: int) -> Array:
  always, at, own = _places(others, axis)
  found = jnp.take_along_axis(values, at, axis, mode="promise_in_bounds")
  return _larger(values, found, at < own, always)


def _larger(values: Array, found: Array, before: Array, always: Array) -> Array:
  keys, found = ordering.magnitude_keys(values), ordering.magnitude_keys(found)
  # Keys are integers of 31 bits: one more is above what is equal.
  return (keys | always) + before.astype(jnp.uint32) > found


def _places(others: Array, axis: int) -> tuple[Array, Array, Array]:
  """Returns the mark, and indices along rows of the others and of entries."""
  always = others & jnp.uint32(ALWAYS)
  other = others ^ always
  own = lax.broadcasted_iota(jnp.uint32, others.shape, axis)
  at = other + (other >= own).astype(jnp.uint32)
  # Nobody is larger than itself.
  none = (other == jnp.uint32(others.shape[axis] - 1)) | (always > other)
  return always, jnp.where(none, own, at), own


def _looked_up(values: Array, others: Array, axis: int) -> Array:
  """Returns `_above` of arrays that lie on one device."""
  if values.size >= ALWAYS:
    return _above(values, others, axis)
  # By positions in memory: they are made with the others, side by side, and
  # leave the least to do to the loop that looks up.
  always, at, own = _places(others, axis)
  stride = jnp.uint32(math.prod(values.shape[axis + 1 :]))
  at = _positions(values.shape) + (at - own) * stride
  return lax.platform_dependent(
    values, at | always, cpu=_stored, default=_above_at
  )


def _stored(values: Array, others: Array) -> Array:
  """Returns `_above_at`, of arguments that are stored first.

  On a CPU all that the loop of a lookup computes is computed in single words.
  The condition holds for all positions, but the compiler does not know it.
  """
  first = others.reshape(-1)[0] & jnp.uint32(ALWAYS - 1)
  return lax.cond(
    first < jnp.uint32(others.size),
    _above_at,
    lambda values, others: others >= jnp.uint32(ALWAYS),
    values,
    others,
  )


def _above_at(values: Array, others: Array) -> Array:
  always = others & jnp.uint32(ALWAYS)
  at = others ^ always
  found = values.reshape(-1).at[at].get(mode="promise_in_bounds")
  return _larger(values, found, at < _positions(values.shape), always)


def _positions(shape: tuple[int, ...]) -> Array:
  place = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    along = lax.broadcasted_iota(jnp.uint32, shape, axis)
    place = place + along * jnp.uint32(math.prod(shape[axis + 1 :]))
  return place


def row_ranks(keys: Array, leaf: placement.Leaf, axis: int = -1) -> Array:
  """Returns each entry's rank among those along an axis, from 0 for the least.

  Of equal keys the first ranks lower.

  Args:
    keys: `uint32` of the leaf's shape.
    leaf: where the leaf is.
    axis: along which a row lies.

  Example:
    >>> import jax.numpy as jnp
    >>> keys = jnp.uint32([[5, 2, 5, 1]])
    >>> row_ranks(keys, placement.leaf_of(keys)).tolist()
    [[2, 1, 3, 0]]
  """
  if not leaf.shape:
    return jnp.zeros_like(keys)

  def shard(keys, leaf):
    return _shard_ranks(keys, leaf, axis % len(leaf.shape))

  return placement.on_shards(shard, keys, leaf)


def _shard_ranks(keys: Array, leaf: placement.Leaf, axis: int) -> Array:
  if not leaf.local:
    return _sorted_ranks(keys, axis)
  if leaf.manual and leaf.axes[axis]:
    return _by_whole_rows(
      lambda rows: _whole_ranks(rows, leaf), (keys,), leaf, axis
    )
  moved = jnp.moveaxis(keys, axis, -1)
  ranks = _whole_ranks(moved.reshape(-1, moved.shape[-1]), leaf)
  return jnp.moveaxis(ranks.reshape(moved.shape), -1, axis)


def _whole_ranks(rows: Array, leaf: placement.Leaf) -> Array:
  if leaf.manual or rows.size < 1 << 12:  # Few are not worth a callback.
    return _sorted_ranks(rows, 1)
  return lax.platform_dependent(
    rows, cpu=_called_back, default=lambda x: _sorted_ranks(x, 1)
  )


def _sorted_ranks(keys: Array, axis: int) -> Array:
  column = lax.broadcasted_iota(jnp.uint32, keys.shape, axis)
  _, order = lax.sort((keys, column), dimension=axis, num_keys=2)
  _, ranks = lax.sort((order, column), dimension=axis, num_keys=1)
  return ranks


def _called_back(rows: Array) -> Array:
  shape = jax.ShapeDtypeStruct(rows.shape, jnp.uint32)
  return jax.pure_callback(host_ranks, shape, rows, vmap_method="broadcast_all")


def host_ranks(keys: Any) -> np.ndarray:
  """Returns ranks along the last axis, as `row_ranks`, by NumPy.

  Args:
    keys: `uint32` array.
  """
  keys = np.asarray(keys)
  length = keys.shape[-1]
  rows = keys.reshape(-1, length)
  out = np.empty(rows.shape, np.uint32)
  # Blocks whose temporaries stay in cache.
  block = max(1, (1 << 15) // max(length, 1))
  column = np.arange(length, dtype=np.uint32)
  for start in range(0, rows.shape[0], block):
    part = rows[start : start + block]
    # A sort of plain words runs in vectors, where an argsort does not.
    packed = (part.astype(np.uint64) << np.uint64(32)) | column
    packed.sort(axis=-1)
    order = packed.astype(np.uint32).astype(np.intp)
    order += (np.arange(len(part)) * length)[:, None]
    out[start : start + block].reshape(-1)[order] = column
  return out.reshape(keys.shape)
