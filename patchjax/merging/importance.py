"""keep_important: the entries of one contributor that Arcee Fusion takes.

Two steps: rows are compared once, softmax against softmax; the quantiles of
the importance are then found by counting, from one number a row.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.merging import rows
from patchjax.patches import ordering, selection, transform
from patchjax.patches.counting import limbs
from patchjax.patches.rank_cuts import cuts
from patchjax.trees.errors import SelectionError


def keep_important() -> transform.Transform:
  """Returns the chain that keeps the entries whose importance is an outlier.

  See `methods.arcee_fusion`.
  """
  return transform.chain(
    transform.Transform.of(_DIVERGENCE, {}),
    transform.Transform.of(_OUTLIERS, {}),
  )


def _start(state, shapes, k):
  del state
  if k != 1:
    raise SelectionError(
      f"arcee_fusion takes one contributor, got {k}; choose which"
    )
  (shape,) = shapes
  return np.zeros(shape[:-1], np.float32)


def _reduce(leaf, deltas, base, state, carry):
  """The rows' divergence: summed over the parts of a row on each shard."""
  del state, carry
  (d,) = deltas
  p, q = _softmax(base + d, leaf), _softmax(base, leaf)
  terms = transform.rounded(p * jnp.log(p / q)).astype(jnp.float32)
  if not terms.ndim:
    return terms
  return rows.placed(leaf, jnp.sum(terms, axis=-1))


def _softmax(x, leaf):
  names = leaf.axes[-1] if leaf.manual and leaf.axes else ()
  if not x.ndim:
    return jnp.ones_like(x)
  top = jnp.max(lax.stop_gradient(x), axis=-1, keepdims=True)
  top = lax.pmax(top, names) if names else top
  e = jnp.exp(x - top)
  total = jnp.sum(e, axis=-1, keepdims=True)
  total = lax.psum(total, names) if names else total
  return e / total + jnp.asarray(1e-8, x.dtype)


def _finish(total, carry):
  del carry
  return total, jnp.asarray(True)


def _update(leaf, deltas, base, state, divergence):
  """The task vector and, as a second one, the importance of its entries."""
  del leaf, base, state
  (d,) = deltas
  row = divergence.astype(d.dtype)
  row = row[..., None] if d.ndim else row
  return d, transform.rounded(jnp.abs(d) * row)


_DIVERGENCE = transform.register_step(
  transform.Step(
    name="importance",
    update=_update,
    start=_start,
    counts=transform.one_count(_reduce, _finish),
    needs_base=True,
    scope=lambda: "leaf",
  )
)


def _keys(leaf, deltas, state):
  del leaf, state
  # A divergence may be rounded to just below zero: signed keys.
  return (ordering.ordered_bits(deltas[1]),)


def _ranks(state, shapes, k):
  del state, k
  size = math.prod(shapes[0])
  below = (size - 1) // 4, (size - 1) // 2, 3 * (size - 1) // 4
  return tuple(limbs(size - number) for number in below)


def _outliers(leaf, deltas, base, state, searches):
  del leaf, base, state
  d, importance = deltas
  low, middle, high = (
    ordering.value_of(selection.cut_key(search)) for search in searches
  )
  spread = transform.rounded((high - low) * jnp.float32(1.5))
  cut = (middle + spread).astype(d.dtype)
  return jnp.where(importance >= cut, d, jnp.zeros_like(d))


_OUTLIERS = transform.register_step(
  transform.Step(
    name="keep_outliers",
    update=_outliers,
    reducing=True,
    scope=lambda: "leaf",
    **cuts(_keys, _ranks, each=3, keep=True),
  )
)
