"""The k-th largest key, exactly, without a sort or a gather.

Keys are unsigned integers that order what is selected (see `ordering`). A
pass counts, for five thresholds at once, the keys at or above each, and the
search goes on between the two that have k between them. Counting adds
integers, so the answer has the same bits however an array is cut over
devices, and a pass sends ten integers, never parameters. (Sorting costs some
sixty times as much, and on a mesh gathers the array.)

What costs is the number of passes, since each reads all there is. So the
thresholds are aimed: first with a histogram of a few thousand keys, then by
what the counts say of where k lies, a little to either side of it. Two more
stand on either side of the roundest number in the range, since keys that
many entries share (of differences of 16-bit numbers, say) are round. Three or
four passes do, where cutting in sixths takes twelve; a pass that has not cut
off five sixths is followed by one that does, whatever the keys are.

Where ties must be broken, an entry's key goes on after its magnitude with the
position of its leaf and its own index, both complemented: the lowest wins.
The search then refines those words in turn, only if a tie straddles the cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement
from patchjax.patches.counting import (
  LIMB,
  at_least,
  carried,
  count_true,
  limbs,
  number_of,
)

Array = Any

_WORDS = 5
"""Thresholds of a pass: they share one read of the data."""

_BUCKETS = 12
"""Bits of a key that the histogram of a sample tells apart."""

_SAMPLE = 1 << 14
"""Keys that are looked at before the first pass, if there are more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """A search for the k-th largest key, between two passes.

  Attributes:
    k: limbs `int32[2]` of the rank that is sought.
    found: words of the least key that the k-th can be, `uint32[4]`: magnitude,
      and the complements of leaf position, row and index; words that are not
      searched yet are 0.
    phase: which word is being searched, `int32[]`.
    span: that word is at most so much larger than in `found`, `uint32[]`.
    over: how many more than k keys are at or above `found`, `float32[]`.
    under: and how many less than k are above all that is left.
    words: thresholds of the next pass, `uint32[5]`, all in what is left.
    even: whether they cut what is left in equal parts, `bool[]`.
    widths: bits of each of the words, static.
    early: whether the search may end, static, as soon as exactly k keys are
      at or above `found`, which then is a cut and perhaps no key.
    stride: of how many keys one is looked at before the first pass, static.
  """

  k: Array
  found: Array
  phase: Array
  span: Array
  over: Array
  under: Array
  words: Array
  even: Array
  widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  early: bool = dataclasses.field(metadata={"static": True})
  stride: int = dataclasses.field(metadata={"static": True})

  @property
  def done(self) -> Array:
    """Whether the threshold is found."""
    return self.phase >= np.int32(len(self.widths))

  @property
  def in_ties(self) -> Array:
    """Whether the first word is found, and ties are to be broken."""
    return ~self.done & (self.phase > np.int32(0))

  @property
  def in_keys(self) -> Array:
    """Whether the first word is still to be found."""
    return self.phase == np.int32(0)

  def __iter__(self) -> Iterator[Search]:
    """Goes over several searches whose arrays are stacked."""
    return (self[i] for i in range(self.phase.shape[0]))

  def __getitem__(self, which: Any) -> Search:
    return jax.tree.map(lambda x: x[which], self)


def search(
  k: Array,
  shapes: Sequence[tuple[int, ...]],
  *,
  bits: int = 31,
  exact: bool = False,
  early: bool = True,
) -> Search:
  """Returns a search for rank `k` (limbs) at its beginning.

  Args:
    k: limbs of the rank; of rank 0 nothing is kept.
    shapes: of the leaves that are searched together, in order of names.
    bits: of a key.
    exact: whether exactly k are kept: ties go to the first leaf, then to the
      lowest index.
    early: whether any cut with k keys above will do, or the k-th key itself
      is wanted.
  """
  size = sum(map(math.prod, shapes))
  span = (1 << bits) - 1
  cuts = np.arange(1, _WORDS + 1, dtype=np.uint32)
  every = Search(
    k=limbs(size),
    found=np.zeros(4, np.uint32),
    phase=np.int32(0),
    span=np.uint32(span),
    over=np.float32(0),
    under=np.float32(size),
    words=np.uint32(span // (_WORDS + 1)) * cuts,
    even=np.bool_(True),
    widths=key_widths(shapes, bits) if exact else (bits,),
    early=early,
    # An odd one: rows are even in length, and all columns shall be seen.
    stride=(size // _SAMPLE) | 1,
  )
  return of_rank(every, k)


def of_rank(every: Search, k: Array) -> Search:
  """Returns a search at its beginning for another rank.

  Args:
    every: a search at its beginning, of the rank of all keys.
    k: limbs of the rank.
  """
  # On the host where k is: nothing small to compile outside jit.
  xp = np if isinstance(k, np.ndarray) else jnp
  over = number_of(every.k - k, xp)
  # Nothing is kept, or all: that is no question.
  trivial = (k == 0).all() | ((over == xp.float32(0)) & every.early)
  end = np.int32(len(every.widths))
  return dataclasses.replace(
    every,
    k=k,
    phase=xp.where(trivial, end, np.int32(0)),
    over=over,
    under=number_of(k, xp),
  )


def stacked(searches: Sequence[Search]) -> Search:
  """Returns several searches as one, with an axis more.

  Args:
    searches: for keys of as many bits, in the same leaves.
  """
  host = all(isinstance(x, np.ndarray) for x in jax.tree.leaves(searches))
  stack = np.stack if host else jnp.stack
  return jax.tree.map(lambda *xs: stack(xs), *searches)


def key_widths(
  shapes: Sequence[tuple[int, ...]], bits: int = 31
) -> tuple[int, ...]:
  """Returns the widths of the words that tell any two entries apart.

  Args:
    shapes: of the leaves, in order.
    bits: of the magnitude.
  """
  rows, columns = zip(*map(placement.extents, shapes), strict=True)
  words = ((size - 1).bit_length() for size in (max(rows), max(columns)))
  # A leaf that is searched alone has no others before or after it.
  leaves = (len(shapes) - 1).bit_length()
  return (bits, leaves, *words)


# ---------------------------------------------------------------------------
# Before the first pass: a sample.


def sketch(
  keys: Array, leaf: placement.Leaf, states: tuple[Search, ...]
) -> Array:
  """Returns a histogram of some of a leaf's keys, for `aimed`.

  Args:
    keys: unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is.
    states: the searches, for keys of as many bits.

  Returns:
    `int32[len(states), 4096]`, of this leaf or shard alone; zeros if its
    arrays may lie on several devices, where taking some apart is dear.
  """
  histogram = jnp.zeros(1 << _BUCKETS, jnp.int32)
  if leaf.local and keys.size:
    state = states[0]
    some = keys.reshape(-1)[:: state.stride].astype(jnp.uint32)
    buckets = some >> jnp.uint32(_shift(state))
    histogram = histogram.at[buckets].add(jnp.int32(1), mode="drop")
  return jnp.broadcast_to(histogram, (len(states), 1 << _BUCKETS))


def _shift(state: Search) -> int:
  return max(state.widths[0] - _BUCKETS, 0)


def aimed(histogram: Array, state: Search) -> Search:
  """Returns a search at its beginning, with thresholds near k.

  Args:
    histogram: of a sample, `int32[4096]`, summed over leaves and shards.
    state: the search.
  """
  above = lax.cumsum(histogram, reverse=True)
  size = above[0].astype(jnp.float32)
  of = state.under / jnp.maximum(state.under + state.over, jnp.float32(1))
  rank = size * of
  sigma = jnp.sqrt(rank * (jnp.float32(1) - of)) + jnp.float32(1)
  ranks = rank + sigma * jnp.asarray([4.0, 1.3, -1.3, -4.0], jnp.float32)
  # The last bucket at whose lower end so many are above, and how far in it.
  enough = above[:, None].astype(jnp.float32) >= ranks[None]
  at = jnp.maximum(jnp.sum(enough, axis=0, dtype=jnp.int32) - 1, 0)
  over = above[at].astype(jnp.float32) - ranks
  inside = over / jnp.maximum(histogram[at], 1).astype(jnp.float32)
  width = 1 << _shift(state)
  far = jnp.clip(inside, 0.0, 1.0) * jnp.float32(width)
  words = at.astype(jnp.uint32) * jnp.uint32(width) + far.astype(jnp.uint32)
  # Zeros of sparse task vectors are told from all others.
  words = jnp.concatenate([jnp.ones(1, jnp.uint32), words])
  words = jnp.clip(words, jnp.uint32(1), state.span)
  use = (size > jnp.float32(0)) & (state.phase == jnp.int32(0))
  return dataclasses.replace(
    state,
    words=jnp.where(use, words, state.words),
    even=jnp.where(use, jnp.asarray(False), state.even),
  )


# ---------------------------------------------------------------------------
# A pass.


def count_at_least(
  keys: Array,
  leaf: placement.Leaf,
  states: tuple[Search, ...],
  *,
  ties: bool = False,
) -> Array:
  """Returns how many keys are at or above each search's thresholds.

  Args:
    keys: unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is in the model.
    states: the searches; all of them share one read of the keys.
    ties: whether the words after the first are searched, or the first.

  Returns:
    limbs `int32[len(states), 2, 5]`.
  """
  masks = []
  index = leaf.index([state.found for state in states]) if ties else None
  for state in states:
    words = [state.words[i] for i in range(_WORDS)]
    if index is None:
      masks += [keys >= word.astype(keys.dtype) for word in words]
      continue
    ranked = _ranked(keys, _alone(leaf, state), index, state)
    # Words count from 1 on: 0 is for what is below all ties.
    masks += [ranked > word for word in words]
  counts = count_true(tuple(masks), local=leaf.local)
  return counts.reshape(2, len(states), _WORDS).swapaxes(0, 1)


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
  new, hit = _narrowed(counts, state, state.found[0])
  following, span = _after(state.widths, 0)
  settled = new.span == jnp.uint32(0)
  least = new.found
  new = dataclasses.replace(
    new,
    found=_put(state.found, jnp.int32(0), least),
    phase=jnp.where(settled, jnp.int32(following), state.phase),
    span=jnp.where(settled, jnp.uint32(span), new.span),
  )
  least = jnp.where(settled, jnp.uint32(0), least)
  return _aimed_again(new, state, hit, least, state.in_keys)


def narrow_ties(counts: Array, state: Search) -> Search:
  """Returns the search after a pass over what ties.

  Args:
    counts: see `narrow`.
    state: the search before; one that is over stays as it is.
  """
  least = sum(
    jnp.where(state.phase == jnp.int32(i), state.found[i], jnp.uint32(0))
    for i in (1, 2, 3)
  )
  new, hit = _narrowed(counts, state, least)
  settled = new.span == jnp.uint32(0)
  phase, span, least = state.phase, new.span, new.found
  for i in (1, 2, 3):
    following, full = _after(state.widths, i)
    moves = settled & (state.phase == jnp.int32(i))
    phase = jnp.where(moves, jnp.int32(following), phase)
    span = jnp.where(moves, jnp.uint32(full), span)
  new = dataclasses.replace(
    new, found=_put(state.found, state.phase, least), phase=phase, span=span
  )
  least = jnp.where(settled, jnp.uint32(0), least)
  return _aimed_again(new, state, hit, least, state.in_ties)


def _put(words: Array, at: Array, word: Array) -> Array:
  """Returns the words of a key with one replaced."""
  return jnp.where(jnp.arange(4, dtype=jnp.int32) == at, word, words)


def _after(widths: tuple[int, ...], phase: int) -> tuple[int, int]:
  """Returns the next phase whose word has any bits, and its largest word."""
  later = range(phase + 1, len(widths))
  following = next((i for i in later if widths[i]), len(widths))
  return following, (1 << (*widths, 0)[following]) - 1


def _narrowed(
  counts: Array, state: Search, least: Array
) -> tuple[Search, Array]:
  """Returns the search of one word after a pass, and whether it hit k.

  `found` is the least word that is left. Written with few operations: all of
  it is compiled for every loop, and none of it takes time.
  """
  # Thresholds are in no order: the highest with k keys, the lowest without.
  more = number_of(carried(counts) - state.k[:, None])
  enough = more >= jnp.float32(0)
  most = least + state.span
  low = jnp.max(jnp.where(enough, state.words, least))
  high = jnp.min(jnp.where(enough, most, state.words - jnp.uint32(1)))
  over = jnp.min(jnp.where(enough, more, state.over))
  under = jnp.min(jnp.where(enough, state.under, -more))
  span = high - low
  even = ~state.even & (span > state.span // jnp.uint32(_WORDS + 1))
  new = dataclasses.replace(
    state, found=low, span=span, over=over, under=under, even=even
  )
  return new, over == jnp.float32(0)


def _aimed_again(
  new: Search, old: Search, hit: Array, least: Array, mine: Array
) -> Search:
  """Returns the search with its next thresholds, or as it was."""
  phase = new.phase
  if new.early:
    phase = jnp.where(hit, jnp.int32(len(new.widths)), phase)
  new = dataclasses.replace(new, phase=phase, words=_next_words(new, least))
  return jax.tree.map(lambda a, b: jnp.where(mine, b, a), old, new)


def _next_words(state: Search, least: Array) -> Array:
  """Returns thresholds in `least + 1 .. least + span`."""
  one, span = jnp.uint32(1), jnp.maximum(state.span, jnp.uint32(1))
  steps = jnp.arange(1, _WORDS + 1, dtype=jnp.uint32)
  sixth = (span - one) // jnp.uint32(_WORDS + 1) + one
  # As if keys were spread evenly over what is left: k lies about there, and
  # with two thirds of certainty not further than sigma from it.
  left = jnp.maximum(state.over + state.under, jnp.float32(1))
  part = (state.over + jnp.float32(0.5)) / left
  part = jnp.clip(part, 0.0, 1.0)
  width = span.astype(jnp.float32)
  sigma = jnp.sqrt(part * (jnp.float32(1) - part) / left) * width
  sigma = jnp.maximum(sigma, jnp.float32(1))
  far = part * width + sigma * jnp.asarray([-2, 0, 2, 0, 0], jnp.float32)
  far = jnp.clip(far, 1.0, 4294967040.0).astype(jnp.uint32)
  most = least + span
  differ = jnp.uint32(31) - lax.clz((least ^ most) | one)
  round_ = ((most >> differ) << differ) - least
  far = jnp.where(steps > jnp.uint32(3), round_ + steps - jnp.uint32(4), far)
  cut = state.even | (span <= jnp.uint32(_WORDS))
  far = jnp.where(cut, jnp.minimum(sixth, span) * steps, far)
  return least + jnp.clip(far, one, span)


@dataclasses.dataclass(frozen=True)
class Round:
  """Passes of one kind.

  Attributes:
    count: `(keys, leaf, searches)`, an array with an entry a search, to be
      summed over leaves and shards.
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
    last = jnp.asarray(True) if self.once else ~self.open(state).any()
    return state, last


def rounds(*, exact: bool) -> tuple[Round, ...]:
  """Returns the kinds of passes of a search, in their order.

  Args:
    exact: whether ties are broken.
  """
  return _ROUNDS if exact else _ROUNDS[:2]


def _count_ties(keys, leaf, states):
  return count_at_least(keys, leaf, states, ties=True)


_ROUNDS = (
  Round(sketch, aimed, lambda state: state.in_keys, once=True),
  Round(count_at_least, narrow, lambda state: state.in_keys),
  Round(_count_ties, narrow_ties, lambda state: state.in_ties),
)


# ---------------------------------------------------------------------------
# What a finished search says.


def keep_keys(keys: Array, leaf: placement.Leaf, state: Search) -> Array:
  """Returns the mask of the keys a finished search selects.

  Args:
    keys: the same unsigned integers that were counted.
    leaf: where the leaf is in the model.
    state: the finished search.

  Returns:
    a boolean array: keys of at least the k-th largest, or exactly k of them
    if the search had all its words. None for k = 0.
  """
  some = at_least(state.k, jnp.asarray(limbs(1)))
  if len(state.widths) == 1:
    mask = keys >= state.found[0].astype(keys.dtype)
  else:
    mask = _not_below(keys, _alone(leaf, state), leaf.index(), state.found)
  return mask & some


def _not_below(
  bits: Array, leaf: placement.Leaf, index: tuple[Array, Array], cut: Array
) -> Array:
  """Returns whether keys are at or above a cut, word by word.

  Written with three comparisons an entry, all else on scalars, and without a
  branch: a branch would have its operands computed and stored first.
  """
  bits = bits.astype(jnp.uint32)
  row, column = index
  rows, columns = placement.extents(leaf.shape)
  all_ties = leaf.after > cut[1]
  some_ties = leaf.after == cut[1]
  if rows > 1:
    row = jnp.uint32(rows - 1) - row
    all_ties = all_ties | (some_ties & (row > cut[2]))
    some_ties = some_ties & (row == cut[2])
  else:
    some_ties = some_ties & (cut[2] == jnp.uint32(0))
  # Indices are below 2**31: above them all no tie passes.
  last = jnp.where(some_ties, cut[3], jnp.uint32(0xFFFFFFFF))
  last = jnp.where(all_ties, jnp.uint32(0), last)
  tie = (jnp.uint32(columns - 1) - column) >= last
  return (bits > cut[0]) | ((bits == cut[0]) & tie)


def _alone(leaf: placement.Leaf, state: Search) -> placement.Leaf:
  """Returns the leaf as the only one, if it is the only one searched."""
  if len(state.widths) == 1 or state.widths[1]:
    return leaf
  return dataclasses.replace(leaf, after=np.uint32(0))


def cut_key(state: Search) -> Array:
  """Returns the k-th largest key, `uint32[]`, of a finished search.

  For a search that may end early this is a cut: some number at or below the
  k-th key and above the next.
  """
  return state.found[0]


def resumed(start: Search, key: int, count: int, above: int) -> Search:
  """Returns a search whose k-th key was found in another way.

  Ties at the cut, where they are to be broken, are still to be searched.

  Args:
    start: the search at its beginning.
    key: the k-th largest key.
    count: how many keys are at or above it.
    above: how many are above it.
  """
  k = (int(start.k[0]) << LIMB) + int(start.k[1])
  phase, span = _after(start.widths, 0)
  if start.early and count == k:
    phase = len(start.widths)
  words = span // (_WORDS + 1) * np.arange(1, _WORDS + 1) + 1
  return dataclasses.replace(
    start,
    found=np.array([key, 0, 0, 0], np.uint32),
    phase=np.int32(phase),
    span=np.uint32(span),
    over=np.float32(count - k),
    under=np.float32(k - above),
    words=np.clip(words, 1, max(span, 1)).astype(np.uint32),
  )
