"""Cuts by rank over a whole model, in two reads of it.

The k-th largest of n keys is found by two histograms: of the upper 16 bits of
all keys, which says in which bucket it lies, and of the lower 16 bits of the
keys in that bucket. Counting again and again, as in memory, would read the
model twelve times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging.streaming import majority
from patchjax.patches import engine, leafwise, selection
from patchjax.patches.counting import LIMB

_BUCKETS = 1 << 16
_NONE = np.uint16(_BUCKETS - 1)
_EVERY = _BUCKETS  # no bucket's number
_CHUNK = 1 << 18  # keys whose indices fit in a cache
_TOGETHER = 128 << 20  # bytes of keys of several contributors at a time


def applies(plan: leafwise.Plan, index: int) -> bool:
  """Returns whether a stage cuts keys by rank.

  Args:
    plan: what is computed.
    index: of the stage.
  """
  return plan.stages[index][0].keys is not None


def cut(
  plan: leafwise.Plan,
  index: int,
  items: Callable[[], Any],
  start: selection.Search,
  passes: Callable[[Any], Any],
  votes: majority.Votes | None = None,
) -> Any:
  """Returns the finished searches of a stage, for `engine.count`.

  Args:
    plan: what is computed.
    index: of the stage.
    items: goes over the leaves once.
    start: the searches at their beginning.
    passes: goes on by counting, where ties are to be broken.
    votes: is shown the leaves in the second read.
  """
  searches = list(start)
  count = len(searches)
  ranks = [(int(s.k[0]) << LIMB) + int(s.k[1]) for s in searches]
  upper = np.zeros((count, _BUCKETS), np.int64)
  every = np.full(count, _EVERY, np.uint32)
  for item in items():
    for j, halves in _halves(plan, index, count, item, every):
      upper[j] += _histogram(halves)
  # How many keys are in or above each bucket.
  above = np.cumsum(upper[:, ::-1], axis=1)[:, ::-1]
  buckets = [_last(row, k) for row, k in zip(above, ranks, strict=True)]
  lower = np.zeros((count, _BUCKETS), np.int64)
  wanted = np.array(buckets, np.uint32)
  ends = [
    selection.stacked(
      [
        selection.resumed(search, (bucket << 16) + low, k, k)
        for search, bucket, k in zip(searches, buckets, ranks, strict=True)
      ]
    )
    for low in (0, _BUCKETS - 1)
  ]
  for item in items():
    inside = np.zeros(item.leaf.size if votes else 0, bool)
    for j, halves in _halves(plan, index, count, item, wanted):
      # Zeros are nothing to decide about, and may be most of a model.
      nought = 0 if buckets[j] else 1
      lower[j] += _inside(halves, inside, nought)
    if votes is not None:
      votes.see(item, inside, *ends)
  found = []
  for j, (search, k) in enumerate(zip(searches, ranks, strict=True)):
    bucket = buckets[j]
    # The last key of the bucket was taken for one of no bucket.
    lower[j, -1] += upper[j, bucket] - lower[j].sum()
    higher = above[j, bucket] - upper[j, bucket]
    inside = higher + np.cumsum(lower[j, ::-1])[::-1]
    low = _last(inside, k)
    key = min((bucket << 16) + low, (1 << search.widths[0]) - 1)
    after = int(inside[low + 1]) if low + 1 < _BUCKETS else int(higher)
    found.append(selection.resumed(search, key, int(inside[low]), after))
  carry = selection.stacked(found)
  return carry if carry.done.all() else passes(carry)


def _last(counts: np.ndarray, k: int) -> int:
  """Returns the last place where a falling count is at least k, or 0."""
  return max(int(np.count_nonzero(counts >= k)) - 1, 0)


def _histogram(halves: np.ndarray) -> np.ndarray:
  """Returns how often each half occurs."""
  total = np.zeros(_BUCKETS, np.int64)
  for i in range(0, halves.size, _CHUNK):
    total += np.bincount(halves[i : i + _CHUNK], minlength=_BUCKETS)
  return total


def _inside(halves: np.ndarray, inside: np.ndarray, least: int) -> np.ndarray:
  """Returns how often each half occurs that is not `_NONE`.

  Args:
    halves: of the keys of a leaf.
    inside: is made true where there is one that is at least `least`; or empty.
    least: see above.
  """
  total = np.zeros(_BUCKETS, np.int64)
  for i in range(0, halves.size, _CHUNK):
    chunk = halves[i : i + _CHUNK]
    # Most keys are in other buckets: faster found than counted.
    here = chunk != _NONE
    if inside.size:
      inside[i : i + _CHUNK] |= here & (chunk >= least)
    chunk = chunk[here]
    if chunk.size:
      total += np.bincount(chunk, minlength=_BUCKETS)
  return total


def _halves(
  plan: leafwise.Plan,
  index: int,
  count: int,
  item: engine.Item,
  buckets: np.ndarray,
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields `(j, halves)`: uint16 of each array of keys of a leaf.

  Args:
    plan: what is computed.
    index: of the stage.
    count: how many arrays of keys there are.
    item: the leaf.
    buckets: `_EVERY` for the upper halves of an array's keys; else a bucket:
      the lower halves of the keys in it, `_NONE` for all others.
  """
  work = item.work
  given = (item.leaf, work.base, work.sources, item.state, item.carries)
  once = max(1, min(count, _TOGETHER // max(2 * item.leaf.size, 1)))
  for first in range(0, count, once):
    which = tuple(range(first, min(first + once, count)))
    # One at a time of a large leaf: all would be as much memory again.
    arrays = _halves_jit(plan, index, which)(*given, buckets)
    for j, array in zip(which, arrays, strict=True):
      yield j, np.asarray(array).reshape(-1)


@functools.lru_cache(maxsize=512)
def _halves_jit(
  plan: leafwise.Plan, index: int, which: tuple[int, ...]
) -> Callable[..., Any]:
  @jax.jit
  def halves(leaf, base, sources, state, shared, buckets):
    keys = leafwise.keys(plan, index, leaf, base, sources, state, shared)
    out = []
    for j in which:
      key = keys[j].astype(jnp.uint32)
      upper = key >> jnp.uint32(16)
      # One program for both: it takes longer to compile than to run.
      first = buckets[j] == jnp.uint32(_EVERY)
      half = jnp.where(first, upper, key).astype(jnp.uint16)
      seen = first | (upper == buckets[j])
      out.append(jnp.where(seen, half, jnp.uint16(_NONE)))
    return tuple(out)

  return halves
