"""The majority sign of a model that is trimmed, without a read of its own.

TIES elects a sign in each entry by what the trim keeps, and gives an entry
whose sum is zero the sign that most entries have. Where the trim cuts is known
after two reads (`cutting`). In the second of them it is known up to a bucket:
what is above it stays, what is below goes. So an entry votes at once, but for
those of which something lies in the bucket, about one in a hundred for each
contributor:

  * where that is one contributor's, the vote is known for both cases, and the
    place in the bucket at which it turns: turns are added up by such places;
  * where it is several contributors', the entry is kept as it is, and votes
    when the cut is known.

All of it is exact. If too many entries would have to be kept (of contributors
that are all alike), nothing is known in the end, and the model is read again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging import steps
from patchjax.patches import counting, engine, leafwise, selection, transform

_PLACES = 1 << 16
_ROOM = 32 << 20  # bytes of entries that are kept
_TOGETHER = 1 << 18  # entries that are looked at together


def applies(plan: leafwise.Plan, index: int) -> bool:
  """Returns whether a stage trims for an election by the stage after it.

  Args:
    plan: what is computed.
    index: of the stage.
  """
  if index + 1 >= len(plan.stages):
    return False
  (step, options), (after, others) = plan.stages[index : index + 2]
  return (
    step.name == "trim"
    and not dict(options)["exact_k"]
    and after.name == "elect_sign"
    and transform.scope_of(step, options) == "tree"
    and transform.scope_of(after, others) == "tree"
    and all(
      transform.scope_of(step, options) != "leaf"
      for step, options in plan.stages[:index]
    )
  )


class Votes:
  """The votes of all entries, while the trim's second read goes on.

  Args:
    plan: what is computed.
    index: of the stage that trims.
    contributors: how many there are.
  """

  def __init__(self, plan: leafwise.Plan, index: int, contributors: int):
    self._plan = plan
    self._index = index
    self._sum = 0
    # What is added if the cut is at or below a place.
    self._turns = np.zeros((contributors, _PLACES), np.int64)
    self._kept: list[tuple[Any, Any, list[np.ndarray]]] = []
    self._room = _ROOM

  def see(
    self,
    item: engine.Item,
    inside: np.ndarray,
    least: selection.Search,
    most: selection.Search,
  ) -> None:
    """Counts the votes of a leaf.

    Args:
      item: the leaf.
      inside: whether any contributor's entry is in its bucket, boolean.
      least: searches as if they ended at the first key of the bucket.
      most: and at its last.
    """
    leaf, state, work = item.leaf, item.state, item.work
    if leaf.size >= 1 << 31:
      self._room = -1  # more than an index can tell apart
    if self._room < 0:
      return
    given = (leaf, work.base, work.sources, state, item.carries)
    counts = _sure_jit(self._plan, self._index)(*given, most)
    self._sum += _difference(counts)
    where = np.flatnonzero(inside)
    look = _open_jit(self._plan, self._index)
    once = min(_TOGETHER, _padded(leaf.size))
    several = []
    for i in range(0, where.size, once):
      here = where[i : i + once]
      at = np.pad(here, (0, once - here.size)).astype(np.uint32)
      found = (np.asarray(x) for x in look(*given, at, least, most))
      turn, which, place, sure, *entries = (x[: here.size] for x in found)
      one = (which >= 0) & (turn != 0)
      spot = which[one].astype(np.int64) * _PLACES + place[one]
      np.add.at(self._turns.reshape(-1), spot, turn[one].astype(np.int64))
      more = which < -1
      self._sum -= int(sure[more].sum(dtype=np.int64))
      several.append([x[more] for x in entries])
      self._room -= sum(x.nbytes for x in several[-1])
      if self._room < 0:
        self._kept.clear()
        return
    if several:
      parts = [np.concatenate(x) for x in zip(*several, strict=True)]
      if parts[0].size:
        self._kept.append((leaf, state, parts))

  def difference(self, found: selection.Search) -> int | None:
    """Returns how many more votes are positive; None if it is not known.

    Args:
      found: the finished searches.
    """
    if self._room < 0:
      return None
    total = self._sum
    for turns, search in zip(self._turns, found, strict=True):
      place = int(selection.cut_key(search)) & (_PLACES - 1)
      total += int(turns[place:].sum())
    decide = _decided_jit(self._plan, self._index)
    for leaf, state, entries in self._kept:
      more = _padded(entries[0].size) - entries[0].size
      whole = tuple(np.pad(x, (0, more)) for x in entries)
      total += _difference(decide(leaf, whole, state, found))
    return total


def _padded(size: int) -> int:
  """Returns a size of which there are few, so that there are few programs."""
  return max(1024, 1 << (size - 1).bit_length())


def _difference(counts: Any) -> int:
  """Returns by how many the first of two counts is the larger."""
  high, low = np.asarray(counts).astype(np.int64)
  total = (high << counting.LIMB) + low
  return int(total[0] - total[1])


def _given(plan, index, leaf, base, sources, state, shared):
  """Returns what the stage that trims is given."""
  method = transform.Transform(({},) * len(plan.stages), plan.stages)
  return transform.run_prefix(
    method,
    index,
    leaf,
    leafwise.vectors(plan, base, sources, leaf.shape),
    leafwise.widened(base),
    state,
    shared,
  )


def _trimmed(plan, index, leaf, deltas, state, searches):
  """Returns what the trim leaves, and the sums whose signs are the votes."""
  (step, options), (_, others) = plan.stages[index : index + 2]
  kept = step.update(
    leaf, deltas, None, state[index], searches, **dict(options)
  )
  method = dict(others)["method"]
  return kept, steps.balance(kept, state[index + 1], method=method)


def _counted(balance, leaf):
  nought = jnp.zeros((), balance.dtype)
  masks = (balance > nought, balance < nought)
  return counting.count_true(masks, local=leaf.local)


def _sign(balance):
  nought = jnp.zeros((), balance.dtype)
  one = (balance > nought).astype(jnp.int32)
  return one - (balance < nought).astype(jnp.int32)


@functools.lru_cache(maxsize=512)
def _sure_jit(plan: leafwise.Plan, index: int) -> Callable[..., Any]:
  @jax.jit
  def sure(leaf, base, sources, state, shared, most):
    deltas = _given(plan, index, leaf, base, sources, state, shared)
    _, balance = _trimmed(plan, index, leaf, deltas, state, most)
    return _counted(balance, leaf)

  return sure


@functools.lru_cache(maxsize=512)
def _open_jit(plan: leafwise.Plan, index: int) -> Callable[..., Any]:
  """Of some entries: how the vote turns, whose entry turns it (-1: nobody's,
  -2: several contributors'), where, the vote before, and the entries."""

  @jax.jit
  def look(leaf, base, sources, state, shared, at, least, most):
    deltas = _given(plan, index, leaf, base, sources, state, shared)
    deltas = tuple(
      x.reshape(-1).at[at].get(mode="promise_in_bounds") for x in deltas
    )
    kept, high = _trimmed(plan, index, leaf, deltas, state, least)
    sure, low = _trimmed(plan, index, leaf, deltas, state, most)
    step, options = plan.stages[index]
    assert step.keys is not None
    keys = step.keys(leaf, deltas, state[index], **dict(options))
    which, place = jnp.full(at.shape, -1, jnp.int32), jnp.zeros_like(at)
    for i, (x, y, key) in enumerate(zip(kept, sure, keys, strict=True)):
      first = jnp.where(which == jnp.int32(-1), jnp.int32(i), jnp.int32(-2))
      which = jnp.where(x != y, first, which)
      lower = key.astype(jnp.uint32) & jnp.uint32(_PLACES - 1)
      place = jnp.where(x != y, lower, place)
    return _sign(high) - _sign(low), which, place, _sign(low), *deltas

  return look


@functools.lru_cache(maxsize=512)
def _decided_jit(plan: leafwise.Plan, index: int) -> Callable[..., Any]:
  @jax.jit
  def decided(leaf, deltas, state, searches):
    _, balance = _trimmed(plan, index, leaf, deltas, state, searches)
    return _counted(balance, leaf)

  return decided
