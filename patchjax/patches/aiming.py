"""Where a search for the k-th key looks first: near the k-th of a sample."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement
from patchjax.patches.selection import AT, EVEN, Search, put

Array = Any

_BUCKETS = 10
"""Bits of a key that the histogram of a sample tells apart."""


def sketch(
  keys: Sequence[Array], leaf: placement.Leaf, states: Search, each: int = 1
) -> Array:
  """Returns histograms of some of a leaf's keys, for `aimed`.

  Args:
    keys: arrays of unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is.
    states: the searches.
    each: how many of them are in each array.

  Returns:
    `int32[len(states), 1024]`, of this leaf or shard alone; zeros if its
    arrays may lie on several devices, where taking some apart is dear. Of no
    buckets for few keys, of which all are soon counted.
  """
  buckets = 1 << _BUCKETS
  if states.stride == 1:
    return jnp.zeros((len(keys) * each, 0), jnp.int32)
  histogram = jnp.zeros(len(keys) * buckets, jnp.int32)
  if leaf.local and keys[0].size:
    shift = jnp.uint32(_shift(states))
    # All in one: what takes long is to compile such a loop.
    some = [
      (key.reshape(-1)[:: states.stride].astype(jnp.uint32) >> shift)
      + jnp.uint32(i * buckets)
      for i, key in enumerate(keys)
    ]
    where = jnp.concatenate(some)
    histogram = histogram.at[where].add(jnp.int32(1), mode="drop")
  histogram = histogram.reshape(len(keys), 1, buckets)
  whole = jnp.broadcast_to(histogram, (len(keys), each, buckets))
  return whole.reshape(len(keys) * each, buckets)


def _shift(state: Search) -> int:
  return max(state.widths[0] - _BUCKETS, 0)


def aimed(histogram: Array, state: Search) -> Search:
  """Returns a search at its beginning, with thresholds near k.

  Args:
    histogram: from `sketch`, of a search, summed over leaves and shards.
    state: the search.
  """
  if not histogram.size:
    return state
  above = _suffix_sums(histogram)
  size = above[0]
  of = state.under / jnp.maximum(state.under + state.over, jnp.float32(1))
  rank = size * of
  sigma = jnp.sqrt(rank * (jnp.float32(1) - of)) + jnp.float32(1)
  ranks = rank + sigma * jnp.asarray([4.0, 1.3, -1.3, -4.0], jnp.float32)
  # The last bucket at whose lower end so many are above, and how far in it.
  above = above[:, None]
  enough = above >= ranks[None]
  one, nought = jnp.float32(1), jnp.float32(0)
  at, high, low = lax.reduce(
    (
      enough.astype(jnp.float32),
      jnp.where(enough, above, size),
      jnp.where(enough, nought, above),
    ),
    (nought, jnp.float32(jnp.inf), nought),
    lambda a, b: (
      a[0] + b[0],
      jnp.minimum(a[1], b[1]),
      jnp.maximum(a[2], b[2]),
    ),
    (0,),
  )
  inside = jnp.clip((high - ranks) / jnp.maximum(high - low, one), 0.0, 1.0)
  width = jnp.float32(1 << _shift(state))
  words = (jnp.maximum(at - one, nought) + inside) * width
  # Zeros of sparse task vectors are told from all others.
  words = [one, *(words[i] for i in range(4))]
  use = (size > nought) & state.in_keys
  least, most = jnp.uint32(1), state.span
  parts = {
    AT + i: jnp.clip(word.astype(jnp.uint32), least, most)
    for i, word in enumerate(words)
  }
  known = put(state.known, {**parts, EVEN: jnp.uint32(0)})
  known = jnp.where(use, known, state.known)
  return dataclasses.replace(state, known=known)


def _suffix_sums(x: Array) -> Array:
  """Returns `cumsum(reverse=True)` of 1024 integers, as float32.

  In two steps of 32, each a product with a triangle: a scan is compiled to
  several loops. A sample is small enough for float32.
  """
  side = 1 << (_BUCKETS // 2)
  triangle = np.tril(np.ones((side, side), np.float32))
  dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
  within = dot(x.reshape(side, side).astype(jnp.float32), triangle)
  after = dot((triangle - np.eye(side, dtype=np.float32)).T, within[:, 0])
  return (within + after[:, None]).reshape(-1)
