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
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.patches import placement
from patchjax.patches.counting import (
  LIMB,
  at_least,
  carried,
  count_each,
  limbs,
  number_of,
)

Array = Any

_WORDS = 5
"""Thresholds of a pass: they share one read of the data."""

_BUCKETS = 10
"""Bits of a key that the histogram of a sample tells apart."""

_K, _FOUND, _PHASE, _SPAN, _OVER, _UNDER, _AT, _EVEN = 0, 2, 6, 7, 8, 9, 10, 15
"""Where what a search knows is in its array."""

_MOST = 4294967040.0
"""The largest float32 that is a `uint32`."""

_SAMPLE = 1 << 14
"""Keys that are looked at before the first pass, if there are more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """A search for the k-th largest key, between two passes; or several.

  All that changes is in one array, and is written by one operation: each
  array more of a loop takes longer to compile than all passes to run.

  Attributes:
    known: `uint32[..., 16]`; its parts are the properties below, of the same
      leading axes.
    widths: bits of each of the words of a key, static.
    early: whether the search may end, static, as soon as exactly k keys are
      at or above `found`, which then is a cut and perhaps no key.
    stride: of how many keys one is looked at before the first pass, static.
  """

  known: Array
  widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  early: bool = dataclasses.field(metadata={"static": True})
  stride: int = dataclasses.field(metadata={"static": True})

  @property
  def k(self) -> Array:
    """The rank that is sought: limbs `int32[..., 2]`."""
    return self.known[..., _K:_FOUND].astype(np.int32)

  @property
  def found(self) -> Array:
    """Words of the least key that the k-th can be, `uint32[..., 4]`.

    Magnitude, and the complements of leaf position, row and index; words that
    are not searched yet are 0.
    """
    return self.known[..., _FOUND:_PHASE]

  @property
  def phase(self) -> Array:
    """Which word is being searched."""
    return self.known[..., _PHASE].astype(np.int32)

  @property
  def span(self) -> Array:
    """How much larger than in `found` that word is at most."""
    return self.known[..., _SPAN]

  @property
  def over(self) -> Array:
    """How many more than k keys are at or above `found`, `float32`."""
    return _float(self.known[..., _OVER])

  @property
  def under(self) -> Array:
    """And how many less than k are above all that is left."""
    return _float(self.known[..., _UNDER])

  @property
  def words(self) -> Array:
    """Thresholds of the next pass, `uint32[..., 5]`, all in what is left."""
    return self.known[..., _AT : _AT + _WORDS]

  @property
  def even(self) -> Array:
    """Whether they cut what is left in equal parts."""
    return self.known[..., _EVEN] != np.uint32(0)

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
    return (self[i] for i in range(self.known.shape[0]))

  def __getitem__(self, which: int) -> Search:
    return dataclasses.replace(self, known=self.known[which])


def _float(bits: Array) -> Array:
  if isinstance(bits, jax.Array):
    return lax.bitcast_convert_type(bits, jnp.float32)
  return np.asarray(bits).view(np.float32)


def _bits(number: Array) -> Array:
  if isinstance(number, jax.Array):
    return lax.bitcast_convert_type(number, jnp.uint32)
  return np.asarray(number, np.float32).view(np.uint32)


def _put(known: Array, parts: dict[int, Any]) -> Array:
  """Returns what is known with some numbers replaced."""
  if not isinstance(known, jax.Array) and not any(
    isinstance(part, jax.Array) for part in parts.values()
  ):
    known = known.copy()
    for at, part in parts.items():
      known[at] = part
    return known
  known = jnp.asarray(known)
  lane = lax.iota(jnp.int32, known.shape[0])
  for at, part in parts.items():
    known = jnp.where(lane == jnp.int32(at), jnp.asarray(part), known)
  return known


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
  known = np.zeros(16, np.uint32)
  known[_K:_FOUND] = limbs(size)
  known[_SPAN] = span
  known[_UNDER] = _bits(np.float32(size))
  steps = np.arange(1, _WORDS + 1, dtype=np.uint32)
  known[_AT : _AT + _WORDS] = np.uint32(span // (_WORDS + 1)) * steps
  known[_EVEN] = 1
  every = Search(
    known=known,
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
  xp = jnp
  if not isinstance(k, Tracer) and not isinstance(every.known, Tracer):
    # On the host: nothing small to compile outside jit.
    xp, k = np, np.asarray(k)
  over = number_of(every.k - k, xp)
  # Nothing is kept, or all: that is no question.
  trivial = (k == 0).all() | ((over == xp.float32(0)) & every.early)
  end = xp.uint32(len(every.widths))
  parts = {
    _K: k[0].astype(xp.uint32),
    _K + 1: k[1].astype(xp.uint32),
    _PHASE: xp.where(trivial, end, xp.uint32(0)),
    _OVER: _bits(over),
    _UNDER: _bits(number_of(k, xp)),
  }
  return dataclasses.replace(every, known=_put(every.known, parts))


def stacked(searches: Sequence[Search]) -> Search:
  """Returns several searches as one.

  Args:
    searches: for keys of as many bits, in the same leaves.
  """
  known = [search.known for search in searches]
  traced = any(isinstance(x, jax.Array) for x in known)
  stack = jnp.stack if traced else np.stack
  return dataclasses.replace(searches[0], known=stack(known))


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
    _AT + i: jnp.clip(word.astype(jnp.uint32), least, most)
    for i, word in enumerate(words)
  }
  known = _put(state.known, {**parts, _EVEN: jnp.uint32(0)})
  known = jnp.where(use, known, state.known)
  return dataclasses.replace(state, known=known)


def _sum_min_max(a, b):
  return a[0] + b[0], jnp.minimum(a[1], b[1]), jnp.maximum(a[2], b[2])


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


# ---------------------------------------------------------------------------
# A pass.


def count_at_least(
  keys: Sequence[Array],
  leaf: placement.Leaf,
  states: Search,
  each: int = 1,
  *,
  ties: bool = False,
) -> Array:
  """Returns how many keys are at or above each search's thresholds.

  Args:
    keys: arrays of unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is in the model.
    states: the searches.
    each: how many of them are in each array; they share one read of it.
    ties: whether the words after the first are searched, or the first.

  Returns:
    limbs `int32[len(states), 2, 5]`.
  """
  index = leaf.index(states.found) if ties else None
  alone = _alone(leaf, states)
  masks = []
  for i, key in enumerate(keys):
    masks.append([])
    for state in (states[i * each + j] for j in range(each)):
      words = [state.words[j] for j in range(_WORDS)]
      if index is None:
        masks[i] += [key >= word.astype(key.dtype) for word in words]
      else:
        ranked = _ranked(key, alone, index, state)
        # Words count from 1 on: 0 is for what is below all ties.
        masks[i] += [ranked > word for word in words]
  counts = count_each(masks, local=leaf.local)
  return counts.reshape(2, len(keys) * each, _WORDS).swapaxes(0, 1)


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
    counts: see `narrow`.
    state: the search before; one that is over stays as it is.
  """
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
  for i in range(_WORDS):
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
    following, width = _after(state.widths, i)
    moves = settled if here is None else settled & here
    phase = jnp.where(moves, jnp.uint32(following), phase)
    full = jnp.where(moves, jnp.uint32(width), full)
    at = state.found[i]
    parts[_FOUND + i] = low if here is None else jnp.where(here, low, at)
  if state.early:
    end = jnp.uint32(len(state.widths))
    phase = jnp.where(over == jnp.float32(0), end, phase)
  least = jnp.where(settled, nought, low)
  words = _next_words(least, full, over, under, even)
  parts |= {
    _PHASE: phase,
    _SPAN: full,
    _OVER: _bits(over),
    _UNDER: _bits(under),
    _EVEN: even.astype(jnp.uint32),
  }
  lane = lax.iota(jnp.int32, 16)
  is_word = (lane >= _AT) & (lane < _AT + _WORDS)
  return _put(jnp.where(is_word, words, state.known), parts)


def _next_words(
  least: Array, span: Array, over: Array, under: Array, even: Array
) -> Array:
  """Returns thresholds in `least + 1 .. least + span`, where they belong."""
  one, span = jnp.uint32(1), jnp.maximum(span, jnp.uint32(1))
  place = lax.iota(jnp.int32, 16) - jnp.int32(_AT)
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
  cut = even | (span <= jnp.uint32(_WORDS))
  far = jnp.where(cut, jnp.minimum(_sixth(span), span) * (at + one), far)
  return least + jnp.clip(far, one, span)


def _sixth(span: Array) -> Array:
  """Returns about a sixth of a span, and 1 of a small one; never 0.

  Without a division: those are compiled apart from what is around them.
  """
  two, three = jnp.uint32(2), jnp.uint32(3)
  eighth = span >> three
  return eighth + (eighth >> two) + (eighth >> jnp.uint32(4)) + jnp.uint32(1)


def _after(widths: tuple[int, ...], phase: int) -> tuple[int, int]:
  """Returns the next phase whose word has any bits, and its largest word."""
  later = range(phase + 1, len(widths))
  following = next((i for i in later if widths[i]), len(widths))
  return following, (1 << (*widths, 0)[following]) - 1


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
    last = jnp.asarray(True) if self.once else ~self.open(state).any()
    return state, last


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
  words = np.clip(words, 1, max(span, 1))
  parts = {
    _FOUND: key,
    _PHASE: phase,
    _SPAN: span,
    _OVER: _bits(np.float32(count - k)),
    _UNDER: _bits(np.float32(k - above)),
    **{_AT + i: word for i, word in enumerate(words)},
  }
  return dataclasses.replace(start, known=_put(start.known, parts))
