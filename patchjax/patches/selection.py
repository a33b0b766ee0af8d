"""The k-th largest magnitude, exactly, without a sort or a gather.

The bit pattern of a float without its sign is an unsigned integer that orders
magnitudes. A k-ary search over those integers needs only counts: a pass
counts, for five thresholds at once, the entries at or above each, and keeps
one sixth of the range. Twelve passes settle float32, six the 16-bit floats.
Counting adds integers, so the answer has the same bits however an array is
cut over devices, and a pass sends ten integers, never parameters. (Sorting
costs some sixty times as much, and on a mesh gathers the array.)

Where ties must be broken, an entry's key goes on after its magnitude with the
position of its leaf and its own index, both complemented: the lowest wins.
The search then refines those words in turn, only if a tie straddles the cut.

Any other unsigned keys do as well. `ordered_bits` orders floats with their
sign, and `cuts` makes of two functions, for the keys of a leaf and for the
ranks, what a `Step` needs to have the cuts at hand when it updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement
from patchjax.patches.counting import at_least, carried, count_true, limbs
from patchjax.trees.errors import DtypeError, SelectionError

Array = Any

_WAYS = 6
"""Parts a pass cuts the range in: five counts share one read of the data."""

_WORDS = {4: ("uint32", 31), 2: ("uint16", 15)}


def magnitude_bits(x: Array) -> Array:
  """Returns unsigned integers that order the magnitudes of `x`.

  Both zeros are 0, denormals keep their order, and NaN comes above infinity.

  Args:
    x: float32, bfloat16 or float16 array.

  Raises:
    DtypeError: for other dtypes.

  Example:
    >>> import jax.numpy as jnp
    >>> magnitude_bits(jnp.float16([-0.0, 2.0, -2.0, jnp.inf])).tolist()
    [0, 16384, 16384, 31744]
  """
  dtype = np.dtype(x.dtype)
  if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in _WORDS:
    raise DtypeError(
      f"magnitudes are selected in float32, bfloat16 or float16, got "
      f"{dtype}; cast first, e.g. x.astype('float32')"
    )
  word, bits = _WORDS[dtype.itemsize]
  pattern = lax.bitcast_convert_type(x, jnp.dtype(word))
  return pattern & jnp.asarray((1 << bits) - 1, word)


def magnitude_keys(x: Array) -> Array:
  """Returns the magnitudes of floats as `uint32` keys of 31 bits.

  64-bit floats are ranked as float32: rounding keeps the order, and what it
  makes equal is kept together. Derivatives stop here.

  Args:
    x: array of floats.

  Example:
    >>> import jax.numpy as jnp
    >>> key = magnitude_keys(jnp.float32([-2.0]))
    >>> magnitude_of(key).tolist()
    [2.0]
  """
  return magnitude_bits(lax.stop_gradient(x).astype(jnp.float32))


def magnitude_of(key: Array) -> Array:
  """Returns the float32 magnitude of a key from `magnitude_keys`."""
  return lax.bitcast_convert_type(jnp.asarray(key), jnp.float32)


def ordered_bits(x: Array) -> Array:
  """Returns `uint32` keys that order floats with their sign.

  -0.0 comes just below 0.0; NaN comes above all, or below all if its sign
  bit is set. Derivatives stop here.

  Args:
    x: array of floats; 64-bit floats are ranked as float32.

  Example:
    >>> import jax.numpy as jnp
    >>> keys = ordered_bits(jnp.float32([-1.5, -0.0, 0.0, 2.0]))
    >>> bool((keys[:-1] < keys[1:]).all()), value_of(keys).tolist()
    (True, [-1.5, -0.0, 0.0, 2.0])
  """
  x = lax.stop_gradient(x).astype(jnp.float32)
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(pattern >= sign, ~pattern, pattern | sign)


def value_of(key: Array) -> Array:
  """Returns the float32 of a key from `ordered_bits`."""
  key = jnp.asarray(key)
  sign = jnp.uint32(1 << 31)
  pattern = jnp.where(key >= sign, key ^ sign, ~key)
  return lax.bitcast_convert_type(pattern, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """A search for the k-th largest key, between two passes.

  Attributes:
    k: limbs `int32[2]` of the rank that is sought.
    found: words of the key settled so far, `uint32[4]`: magnitude, and the
      complements of leaf position, row and index; words not settled are 0.
    phase: which word is being searched, `int32[]`.
    step: width of the range left for that word, `uint32[]`.
    widths: bits of each of the words, static.
    early: whether the search may end, static, as soon as exactly k keys are
      at or above `found`, which then is a cut and perhaps no key.
  """

  k: Array
  found: Array
  phase: Array
  step: Array
  widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  early: bool = dataclasses.field(metadata={"static": True})

  @property
  def done(self) -> Array:
    """Whether the threshold is found."""
    return self.phase >= jnp.int32(len(self.widths))


def search(
  k: Array, widths: tuple[int, ...] = (31,), *, early: bool = True
) -> Search:
  """Returns a search for rank `k` (limbs) at its beginning.

  Args:
    k: limbs of the rank; of rank 0 nothing is kept.
    widths: bits of the key, then (for exactly k) of the leaf's
      position, the row and the index; see `key_widths`.
    early: whether any cut with k keys above will do, or the k-th key itself
      is wanted.
  """
  return Search(
    # On the host where k is: nothing small to compile outside jit.
    k=k,
    found=np.zeros(4, np.uint32),
    phase=np.int32(0),
    step=np.uint32(_full(widths[0])),
    widths=widths,
    early=early,
  )


def key_widths(
  shapes: list[tuple[int, ...]], bits: int = 31
) -> tuple[int, ...]:
  """Returns the widths of the words that tell any two entries apart.

  Args:
    shapes: of the leaves, in order.
    bits: of the magnitude.
  """
  rows, columns = zip(*map(placement.extents, shapes), strict=True)
  words = (max(size - 1, 1).bit_length() for size in (max(rows), max(columns)))
  # A leaf that is searched alone has no others before or after it.
  leaves = (len(shapes) - 1).bit_length()
  return (bits, leaves, *words)


def thresholds(state: Search) -> tuple[Array, Array]:
  """Returns the five words to compare with, and which of them are in range."""
  top = jnp.asarray([(1 << w) - 1 for w in state.widths], jnp.uint32)
  phase = jnp.minimum(state.phase, jnp.int32(len(state.widths) - 1))
  found = state.found[phase]
  words = found + _sixth(state.step) * jnp.arange(1, _WAYS, dtype=jnp.uint32)
  # Of 32 bits words may go round: those are out of range too.
  in_range = (words <= top[phase]) & (words >= found)
  return jnp.where(in_range, words, top[phase]), in_range


def _full(width: int) -> int:
  """Returns how many words there are of some bits, as far as it fits."""
  # A range of 2**32 does not; one less is cut in the same sixths.
  return min(1 << width, 0xFFFFFFFF)


def _sixth(step: Array) -> Array:
  """Returns a range's sixth, rounded up; the range is not empty."""
  return (step - jnp.uint32(1)) // jnp.uint32(_WAYS) + jnp.uint32(1)


def count_keys(x: Array, leaf: placement.Leaf, state: Search) -> Array:
  """Returns how many magnitudes of a leaf are at or above each threshold.

  Args:
    x: the leaf's floats (its shard, inside `shard_map`).
    leaf: where the leaf is in the model.
    state: the search.

  Returns:
    limbs `int32[2, 5]` of this leaf or shard alone; sums over leaves and
    shards go to `narrow`.
  """
  return count_at_least(magnitude_bits(x), leaf, (state,))[0]


def count_at_least(
  keys: Array, leaf: placement.Leaf, states: tuple[Search, ...]
) -> Array:
  """Returns how many keys are at or above each search's thresholds.

  Args:
    keys: unsigned integers of the leaf's (or shard's) shape.
    leaf: where the leaf is in the model.
    states: the searches; all of them share one read of the keys.

  Returns:
    limbs `int32[len(states), 2, 5]`.
  """
  masks = []
  index: tuple[Array, Array] | None = None
  for state in states:
    leaf = _alone(leaf, state)
    words, _ = thresholds(state)
    if len(state.widths) == 1:
      masks += [keys >= word.astype(keys.dtype) for word in words]
      continue
    index = leaf.index() if index is None else index
    ranked = _ranked(keys, leaf, index, state)
    # Keys as they are, or from 1 on: 0 is for what is below all ties.
    more = (state.phase > jnp.int32(0)).astype(jnp.uint32)
    masks += [ranked >= word + more for word in words]
  counts = count_true(tuple(masks), local=leaf.local)
  return counts.reshape(2, len(states), _WAYS - 1).swapaxes(0, 1)


def _ranked(
  keys: Array,
  leaf: placement.Leaf,
  index: tuple[Array, Array],
  state: Search,
) -> Array:
  """Returns the word of each entry that is searched now, `uint32`.

  Once per read, so that each threshold costs one comparison. After the first
  phase it is one more than the word, for entries that tie with what is found
  so far; the others are 0 below and the largest number above.
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
  ranked = jnp.where(keys == found[0], tie, ranked)
  return jnp.where(state.phase == jnp.int32(0), keys, ranked)


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


def narrow(counts: Array, state: Search) -> Search:
  """Returns the search after a pass.

  Args:
    counts: limbs `int32[2, 5]` summed over leaves and shards.
    state: the search before.
  """
  counts = carried(counts)
  _, in_range = thresholds(state)
  enough = at_least(counts, state.k[:, None]) & in_range
  step = _sixth(state.step)
  moved = jnp.sum(enough, dtype=jnp.int32)
  last = len(state.widths) - 1
  phase = jnp.minimum(state.phase, jnp.int32(last))
  found = state.found.at[phase].add(step * moved.astype(jnp.uint32))
  settled = step <= jnp.uint32(1)
  following = jnp.minimum(state.phase + jnp.int32(1), jnp.int32(last))
  width = jnp.asarray([_full(w) for w in state.widths], jnp.uint32)[following]
  phase = state.phase + settled.astype(jnp.int32)
  if state.early:
    at = jnp.maximum(moved - jnp.int32(1), jnp.int32(0))
    hit = (moved > jnp.int32(0)) & (counts[:, at] == state.k).all()
    phase = jnp.where(hit, jnp.int32(last + 1), phase)
  new = dataclasses.replace(
    state, found=found, phase=phase, step=jnp.where(settled, width, step)
  )
  return jax.tree.map(lambda a, b: jnp.where(state.done, a, b), state, new)


def keep(x: Array, leaf: placement.Leaf, state: Search) -> Array:
  """Returns the mask of the entries a finished search selects.

  Args:
    x: the same floats that were counted.
    leaf: where the leaf is in the model.
    state: the finished search.

  Returns:
    a boolean array: entries with a magnitude of at least the k-th largest,
    or exactly k of them if the search had all its words. None for k = 0.
  """
  return keep_keys(magnitude_bits(x), leaf, state)


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


def settled(k: Array, key: Any, bits: int = 32) -> Search:
  """Returns the finished search whose k-th key was found in another way.

  Args:
    k: limbs of the rank.
    key: the k-th largest key.
    bits: of the keys.
  """
  start = search(k, (bits,), early=False)
  found = jnp.asarray(start.found).at[0].set(jnp.asarray(key, jnp.uint32))
  return dataclasses.replace(start, found=found, phase=np.int32(1))


def resumed(start: Search, key: int, count: int) -> Search:
  """Returns a search whose k-th key was found in another way.

  Ties at the cut, where they are to be broken, are still to be searched.

  Args:
    start: the search at its beginning.
    key: the k-th largest key.
    count: how many keys are at or above it.
  """
  found, phase = np.zeros(4, np.uint32), 1
  found[0] = key
  if start.early and (limbs(count) == start.k).all():
    phase = len(start.widths)
  following = start.widths[min(phase, len(start.widths) - 1)]
  return dataclasses.replace(
    start,
    found=found,
    phase=np.int32(phase),
    step=np.uint32(_full(following)),
  )


# ---------------------------------------------------------------------------
# Steps that cut by rank.


def cuts(
  keys: Callable[..., Any],
  ranks: Callable[..., Any],
  *,
  bits: int = 32,
  exact: Callable[..., bool] | None = None,
  early: bool = False,
) -> dict[str, Any]:
  """Returns the counting functions of a step that cuts keys by rank.

  The step's `update` gets, as `shared`, a tuple of finished searches, one for
  each array of keys: for `keep_keys`, and `cut_key` with `value_of` or
  `magnitude_of`. Nothing is sorted or gathered, and the bits of the answer do
  not depend on how arrays are cut over devices.

  Args:
    keys: `(leaf, deltas, state, **options)`, a tuple of arrays of unsigned
      integers, of the leaf's shape (`magnitude_keys`, `ordered_bits`). The
      same array may stand there several times, for several ranks: it is read
      once. For a step that needs the base, `(leaf, deltas, base, state,
      **options)`.
    ranks: `(state, shapes, k, **options)`, the limbs of the rank for each of
      them, counted from 1 at the largest key (`shares.entries_of`).
    bits: of the keys.
    exact: `(**options) -> bool`, whether ties at a cut are broken, by the
      order of names, then by index, so that exactly that many are kept.
    early: whether any cut with that many keys above it will do: for masks,
      where the k-th key itself is not asked for.

  Returns:
    keyword arguments of `Step`.

  Example:
    >>> import jax.numpy as jnp, numpy as np, patchjax as pj
    >>> from patchjax.patches.counting import limbs
    >>> def keys(leaf, deltas, state):
    ...   return tuple(map(ordered_bits, deltas))
    >>> def ranks(state, shapes, k):
    ...   return (limbs(2),) * k
    >>> def less_second(leaf, deltas, base, state, searches):
    ...   seconds = [value_of(cut_key(search)) for search in searches]
    ...   return tuple(d - s for d, s in zip(deltas, seconds))
    >>> step = pj.patches.Step("less_second", less_second, **cuts(keys, ranks))
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0] * 3, [5, 1, 3]))
    >>> pj.merge(base, [tuned], pj.Transform.of(step, {}))["w"].tolist()
    [2.0, -2.0, 0.0]
  """

  def start(state, shapes, k, **options):
    widths = (bits,)
    if exact is not None and exact(**options):
      widths = key_widths(shapes, bits)
    found = ranks(state, shapes, k, **options)
    return tuple(search(rank, widths, early=early) for rank in found)

  def reduce(leaf, deltas, *rest, **options):
    *seen, searches = rest
    found = keys(leaf, deltas, *seen, **options)
    parts: list[Array] = [None] * len(found)
    for i, key in enumerate(found):
      if parts[i] is not None:
        continue
      alike = [j for j in range(i, len(found)) if found[j] is key]
      states = tuple(searches[j] for j in alike)
      for j, part in zip(alike, count_at_least(key, leaf, states)):
        parts[j] = part
    return jnp.stack(parts)

  def finish(total, searches, **options):
    del options
    searches = tuple(
      narrow(count, search)
      for count, search in zip(total, searches, strict=True)
    )
    return searches, jnp.stack([search.done for search in searches]).all()

  return {
    "start": start,
    "reduce": reduce,
    "finish": finish,
    "keys": keys,
    "ranks": ranks,
    "key_bits": bits,
    "exact": exact,
  }


# ---------------------------------------------------------------------------
# Whole arrays and trees.


def kth_magnitude(x: Array, k: Any) -> Array:
  """Returns the k-th largest magnitude of an array, exactly.

  Works inside and outside jit, vmap and grad (which sees a constant), on any
  mesh: the passes add integers.

  Args:
    x: float32, bfloat16 or float16 array; NaN counts as above infinity.
    k: rank from 1; an int, or limbs `int32[2]`.

  Returns:
    a scalar of the dtype of `x`.

  Example:
    >>> import jax.numpy as jnp
    >>> kth_magnitude(jnp.float32([3., -5., 1., 4.]), 2)
    Array(4., dtype=float32)
  """
  state = _search_array(x, k, exact=False)
  word, _ = _WORDS[np.dtype(x.dtype).itemsize]
  return lax.bitcast_convert_type(state.found[0].astype(word), x.dtype)


def top_k_mask(x: Array, k: Any, *, exact: bool = True) -> Array:
  """Returns the mask of the k entries of largest magnitude.

  Args:
    x: float32, bfloat16 or float16 array.
    k: an int, or limbs `int32[2]`.
    exact: whether ties at the k-th are broken by lowest index; otherwise all
      of them are kept.

  Example:
    >>> import jax.numpy as jnp
    >>> top_k_mask(jnp.float32([1., -2., 2., 2.]), 2).tolist()
    [False, True, True, False]
  """
  state = _search_array(x, k, exact=exact)
  return _keep(lax.stop_gradient(x), placement.leaf_of(x), state)


def _search_array(x: Array, k: Any, *, exact: bool) -> Search:
  if not hasattr(k, "shape"):
    k = limbs(k)
  bits = _WORDS.get(np.dtype(x.dtype).itemsize, ("", 31))[1]
  widths = key_widths([x.shape], bits) if exact else (bits,)
  start = search(k, widths, early=exact)
  return _passes(lax.stop_gradient(x), placement.leaf_of(x), start)


@jax.jit
def _passes(x: Array, leaf: placement.Leaf, start: Search) -> Search:
  def body(state):
    # Without the barrier the bits are computed once, before the loop, and
    # kept: memory of the array's size, and slower.
    x_, state_ = lax.optimization_barrier((x, state))
    counts = placement.sum_over_shards(count_keys, x_, leaf, state_)
    return narrow(counts, state_)

  return lax.while_loop(lambda state: ~state.done, body, start)


def top_k_masks(leaves: Mapping[str, Array], k: int) -> dict[str, Array]:
  """Returns masks of exactly the k largest magnitudes over several arrays.

  Runs eagerly, a jitted function a leaf, so that nothing of the size of the
  tree is made. Ties go to the first names in alphabetical order, then to the
  lowest index: the order of the mapping does not matter.

  Args:
    leaves: arrays by name, all float32, all bfloat16, or all float16.
    k: how many entries to select, at most all.

  Raises:
    SelectionError: if there are fewer than k entries.
  """
  size = sum(math.prod(x.shape) for x in leaves.values())
  if not 0 <= k <= size:
    raise SelectionError(f"cannot select {k} of {size} entries")
  order = sorted(leaves)
  kinds = {np.dtype(x.dtype) for x in leaves.values()}
  if len(kinds) != 1:
    raise DtypeError(
      "magnitudes of one dtype can be ranked together, got "
      f"{', '.join(sorted(map(str, kinds))) or 'no leaves'}; cast them first"
    )
  bits = _WORDS.get(kinds.pop().itemsize, ("", 31))[1]
  widths = key_widths([leaves[name].shape for name in order], bits)
  places = {
    name: placement.leaf_of(leaves[name], i, len(order))
    for i, name in enumerate(order)
  }
  state = search(limbs(k), widths)
  while not bool(state.done):
    counts = np.zeros((2, _WAYS - 1), np.int32)
    for name in order:
      counts = _count_leaf(leaves[name], places[name], state, counts)
    state = _narrow(counts, state)
  return {name: _keep(x, places[name], state) for name, x in leaves.items()}


@jax.jit
def _count_leaf(x, leaf, state, counts):
  return counts + placement.sum_over_shards(count_keys, x, leaf, state)


_narrow = jax.jit(narrow)


_keep = jax.jit(keep)
