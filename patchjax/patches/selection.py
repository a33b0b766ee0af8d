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
The search then refines those words in turn, only if a tie straddles the cut;
or, where one array lies whole on a device, looks at it once more (`tying`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
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
  limbs,
  number_of,
)

Array = Any

WORDS = 5
"""Thresholds of a pass: they share one read of the data."""

K, FOUND, PHASE, SPAN, OVER, UNDER, AT, EVEN = 0, 2, 6, 7, 8, 9, 10, 15
"""Where what a search knows is in its array."""

SAMPLE = 1 << 14
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
    return self.known[..., K:FOUND].astype(np.int32)

  @property
  def found(self) -> Array:
    """Words of the least key that the k-th can be, `uint32[..., 4]`.

    Magnitude, and the complements of leaf position, row and index; words that
    are not searched yet are 0.
    """
    return self.known[..., FOUND:PHASE]

  @property
  def phase(self) -> Array:
    """Which word is being searched."""
    return self.known[..., PHASE].astype(np.int32)

  @property
  def span(self) -> Array:
    """How much larger than in `found` that word is at most."""
    return self.known[..., SPAN]

  @property
  def over(self) -> Array:
    """How many more than k keys are at or above `found`, `float32`."""
    return _float(self.known[..., OVER])

  @property
  def under(self) -> Array:
    """And how many less than k are above all that is left."""
    return _float(self.known[..., UNDER])

  @property
  def words(self) -> Array:
    """Thresholds of the next pass, `uint32[..., 5]`, all in what is left."""
    return self.known[..., AT : AT + WORDS]

  @property
  def even(self) -> Array:
    """Whether they cut what is left in equal parts."""
    return self.known[..., EVEN] != np.uint32(0)

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


def bits_of(number: Array) -> Array:
  """Returns the bit patterns of numbers as float32, `uint32`."""
  if isinstance(number, jax.Array):
    return lax.bitcast_convert_type(number, jnp.uint32)
  return np.asarray(number, np.float32).view(np.uint32)


def put(known: Array, parts: dict[int, Any]) -> Array:
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
  known[K:FOUND] = limbs(size)
  known[SPAN] = span
  known[UNDER] = bits_of(np.float32(size))
  steps = np.arange(1, WORDS + 1, dtype=np.uint32)
  known[AT : AT + WORDS] = np.uint32(span // (WORDS + 1)) * steps
  known[EVEN] = 1
  every = Search(
    known=known,
    widths=key_widths(shapes, bits) if exact else (bits,),
    early=early,
    # An odd one: rows are even in length, and all columns shall be seen.
    stride=(size // SAMPLE) | 1,
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
    K: k[0].astype(xp.uint32),
    K + 1: k[1].astype(xp.uint32),
    PHASE: xp.where(trivial, end, xp.uint32(0)),
    OVER: bits_of(over),
    UNDER: bits_of(number_of(k, xp)),
  }
  return dataclasses.replace(every, known=put(every.known, parts))


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


def next_word(widths: tuple[int, ...], phase: int) -> tuple[int, int]:
  """Returns the next phase whose word has any bits, and its largest word."""
  later = range(phase + 1, len(widths))
  following = next((i for i in later if widths[i]), len(widths))
  return following, (1 << (*widths, 0)[following]) - 1


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
    mask = _not_below(keys, alone(leaf, state), leaf.index(), state.found)
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


def alone(leaf: placement.Leaf, state: Search) -> placement.Leaf:
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
  phase, span = next_word(start.widths, 0)
  if start.early and count == k:
    phase = len(start.widths)
  words = span // (WORDS + 1) * np.arange(1, WORDS + 1) + 1
  words = np.clip(words, 1, max(span, 1))
  parts = {
    FOUND: key,
    PHASE: phase,
    SPAN: span,
    OVER: bits_of(np.float32(count - k)),
    UNDER: bits_of(np.float32(k - above)),
    **{AT + i: word for i, word in enumerate(words)},
  }
  return dataclasses.replace(start, known=put(start.known, parts))
