"""One pass of a search for the k-th key: counts, and what they leave."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from patchjax.patches import placement
from patchjax.patches.aiming import aimed, sketch
from patchjax.patches.counting import carried, count_each, number_of
from patchjax.patches.selection import (
  AT,
  EVEN,
  FOUND,
  OVER,
  PHASE,
  SPAN,
  UNDER,
  WORDS,
  Search,
  alone,
  bits_of,
  next_word,
  put,
)
from patchjax.patches.tying import last_kept, seen_whole, settled

Array = Any

_MOST = 4294967040.0
"""The largest float32 that is a `uint32`."""


def count_at_least(
  keys: Sequence[Array],
  leaf: placement.Leaf,
  states: Search,
  each: int = 1,
  *,
  ties: bool = False,
) -> Array:
  """Returns how many keys are at or above each search's thresholds.

  Of ties that are seen whole: where each search ends, `uint32[len(states)]`.

  Args:
    keys: arrays of unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is in the model.
    states: the searches.
    each: how many of them are in each array; they share one read of it.
    ties: whether the words after the first are searched, or the first.

  Returns:
    limbs `int32[len(states), 2, 5]`.
  """
  if ties and seen_whole(leaf, states):
    return last_kept(keys, leaf, states, each)
  index = leaf.index(states.phase) if ties else None
  place = alone(leaf, states)
  masks = []
  for i, key in enumerate(keys):
    masks.append([])
    for state in (states[i * each + j] for j in range(each)):
      words = [state.words[j] for j in range(WORDS)]
      if index is None:
        masks[i] += [key >= word.astype(key.dtype) for word in words]
      else:
        ranked = _ranked(key, place, index, state)
        # Words count from 1 on: 0 is for what is below all ties.
        masks[i] += [ranked > word for word in words]
  counts = count_each(masks, local=leaf.local)
  return counts.reshape(2, len(keys) * each, WORDS).swapaxes(0, 1)


def _ranked(
  keys: Array,
  leaf: placement.Leaf,
  index: tuple[Array, Array],
  state: Search,
) -> Array:
  """Returns the word of each entry that is searched now, `uint32`.

  Once per read, so that each threshold costs one comparison. One more than
  the word, for entries that tie with what is found so far; the others are 0
  below and the largest number above. A leaf that a search ends in early may
  have words of 0.
  """
  keys = keys.astype(jnp.uint32)
  row, column = index
  rows, columns = placement.extents(leaf.shape)
  below, above = jnp.uint32(0), jnp.uint32(0xFFFFFFFF)
  found, one = state.found, jnp.uint32(1)
  row = jnp.uint32(rows - 1) - row if rows > 1 else below
  column = jnp.uint32(columns - 1) - column
  last = jnp.where(row > found[2], above, below)
  last = jnp.where(row == found[2], column + one, last)
  tie = jnp.where(state.phase == jnp.int32(2), row + one, last)
  side = jnp.where(leaf.after > found[1], above, below)
  tie = jnp.where(leaf.after == found[1], tie, side)
  tie = jnp.where(state.phase == jnp.int32(1), leaf.after + one, tie)
  ranked = jnp.where(keys > found[0], above, below)
  return jnp.where(keys == found[0], tie, ranked)


def narrow(counts: Array, state: Search) -> Search:
  """Returns the search after a pass over the keys.

  Args:
    counts: limbs `int32[2, 5]` summed over leaves and shards.
    state: the search before; one that is over stays as it is.
  """
  known = _narrowed(counts, state, state.found[0], {0: None})
  known = jnp.where(state.in_keys, known, state.known)
  return dataclasses.replace(state, known=known)


def narrow_ties(counts: Array, state: Search) -> Search:
  """Returns the search after a pass over what ties.

  Args:
    counts: from `count_at_least`, summed over leaves and shards.
    state: the search before; one that is over stays as it is.
  """
  if not counts.ndim:
    return settled(counts, state)
  phases = {i: state.phase == jnp.int32(i) for i in (1, 2, 3)}
  nought = jnp.uint32(0)
  least = sum(
    jnp.where(is_, state.found[i], nought) for i, is_ in phases.items()
  )
  known = _narrowed(counts, state, least, phases)
  known = jnp.where(state.in_ties, known, state.known)
  return dataclasses.replace(state, known=known)


def _narrowed(
  counts: Array, state: Search, least: Array, phases: dict[int, Any]
) -> Array:
  """Returns what is known after a pass over the word of one of some phases.

  Written with elementwise operations on scalars and one last array: all of it
  is compiled for every loop, and none of it takes time.
  """
  one, nought = jnp.uint32(1), jnp.uint32(0)
  most = least + state.span
  # Thresholds are in no order: the highest with k keys, the lowest without.
  more = number_of(carried(counts) - state.k[:, None])
  low, high, over, under = least, most, state.over, state.under
  for i in range(WORDS):
    word, surplus = state.words[i], more[i]
    enough = surplus >= jnp.float32(0)
    low = jnp.where(enough, jnp.maximum(low, word), low)
    over = jnp.where(enough, jnp.minimum(over, surplus), over)
    high = jnp.where(enough, high, jnp.minimum(high, word - one))
    under = jnp.where(enough, under, jnp.minimum(under, -surplus))
  span = high - low
  settled = span == nought
  even = ~state.even & (span > _sixth(state.span))
  parts = {}
  phase, full = state.phase.astype(jnp.uint32), span
  for i, here in phases.items():
    following, width = next_word(state.widths, i)
    moves = settled if here is None else settled & here
    phase = jnp.where(moves, jnp.uint32(following), phase)
    full = jnp.where(moves, jnp.uint32(width), full)
    at = state.found[i]
    parts[FOUND + i] = low if here is None else jnp.where(here, low, at)
  if state.early:
    end = jnp.uint32(len(state.widths))
    phase = jnp.where(over == jnp.float32(0), end, phase)
  least = jnp.where(settled, nought, low)
  words = _next_words(least, full, over, under, even)
  parts |= {
    PHASE: phase,
    SPAN: full,
    OVER: bits_of(over),
    UNDER: bits_of(under),
    EVEN: even.astype(jnp.uint32),
  }
  lane = lax.iota(jnp.int32, 16)
  is_word = (lane >= AT) & (lane < AT + WORDS)
  return put(jnp.where(is_word, words, state.known), parts)


def _next_words(
  least: Array, span: Array, over: Array, under: Array, even: Array
) -> Array:
  """Returns thresholds in `least + 1 .. least + span`, where they belong."""
  one, span = jnp.uint32(1), jnp.maximum(span, jnp.uint32(1))
  place = lax.iota(jnp.int32, 16) - jnp.int32(AT)
  at = place.astype(jnp.uint32)
  # As if keys were spread evenly over what is left: k lies about there, and
  # almost certainly not further from it than two standard deviations, which
  # are at most the span divided by the root of how many keys are left.
  left = jnp.clip(over + under, 1.0, _MOST)
  part = jnp.clip((over + jnp.float32(0.5)) / left, 0.0, 1.0)
  digits = jnp.uint32(32) - lax.clz(left.astype(jnp.uint32))
  away = jnp.maximum(span >> (digits >> one), one).astype(jnp.float32)
  far = part * span.astype(jnp.float32)
  far = far + away * (place - jnp.int32(1)).astype(jnp.float32)
  far = jnp.clip(far, 1.0, _MOST).astype(jnp.uint32)
  most = least + span
  differ = jnp.uint32(31) - lax.clz((least ^ most) | one)
  round_ = ((most >> differ) << differ) - least
  far = jnp.where(place > jnp.int32(2), round_ + at - jnp.uint32(3), far)
  cut = even | (span <= jnp.uint32(WORDS))
  far = jnp.where(cut, jnp.minimum(_sixth(span), span) * (at + one), far)
  return least + jnp.clip(far, one, span)


def _sixth(span: Array) -> Array:
  """Returns about a sixth of a span, and 1 of a small one; never 0.

  Without a division: those are compiled apart from what is around them.
  """
  two, three = jnp.uint32(2), jnp.uint32(3)
  eighth = span >> three
  return eighth + (eighth >> two) + (eighth >> jnp.uint32(4)) + jnp.uint32(1)


@dataclasses.dataclass(frozen=True)
class Round:
  """Passes of one kind.

  Attributes:
    count: `(arrays of keys, leaf, searches, each)`, an array with an entry a
      search, to be summed over leaves and shards.
    narrow: `(its part of the sum, search)`, the search after the pass.
    open: `(search)`, whether it needs such a pass.
    once: whether there is one at most.
  """

  count: Callable[..., Array]
  narrow: Callable[[Array, Search], Search]
  open: Callable[[Search], Array]
  once: bool = False

  def after(self, counts: Array, state: Search) -> tuple[Search, Array]:
    """Returns the searches after a pass, and whether it was the last.

    Args:
      counts: of all of them, summed over leaves and shards.
      state: the searches, stacked.
    """
    state = jax.vmap(self.narrow)(counts, state)
    last = jnp.asarray(True) if self.once else ~self.needed(state)
    return state, last

  def needed(self, state: Search) -> Array:
    """Returns whether any of the searches, stacked, needs such a pass."""
    return self.open(state).any()


def rounds(*, exact: bool) -> tuple[Round, ...]:
  """Returns the kinds of passes of a search, in their order.

  Args:
    exact: whether ties are broken.
  """
  return _ROUNDS if exact else _ROUNDS[:2]


_ROUNDS = (
  Round(sketch, aimed, lambda state: state.in_keys, once=True),
  Round(count_at_least, narrow, lambda state: state.in_keys),
  Round(
    functools.partial(count_at_least, ties=True),
    narrow_ties,
    lambda state: state.in_ties,
  ),
)
