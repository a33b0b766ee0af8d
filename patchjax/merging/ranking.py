"""The rank of every entry in its row, exactly, on any mesh.

Ranks of all entries need a sort. It is made where whole rows are: rows that
are cut over devices are first handed round, each device gets some of them (an
all-to-all, never a copy of the leaf on every device). On a CPU, NumPy sorts
rows about ten times as fast as what XLA compiles, so a leaf on CPU devices is
ranked by it in a callback; the ranks are the same integers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement

Array = Any


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
  moved = jnp.moveaxis(keys, axis, -1)
  rows = moved.reshape(-1, moved.shape[-1])
  names = leaf.axes[axis] if leaf.manual else ()
  if not names:
    ranks = _whole_ranks(rows, leaf)
  else:
    devices = math.prod(lax.axis_size(name) for name in names)
    count = rows.shape[0]
    rows = jnp.pad(rows, ((0, -count % devices), (0, 0)))
    whole = lax.all_to_all(rows, names, 0, 1, tiled=True)
    ranks = _whole_ranks(whole, leaf)
    ranks = lax.all_to_all(ranks, names, 1, 0, tiled=True)[:count]
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
