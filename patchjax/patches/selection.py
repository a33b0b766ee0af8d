"""The k-th largest magnitude, exactly, without a sort or a gather.

The bit pattern of a float without its sign is an unsigned integer that orders
magnitudes. A k-ary search over those integers needs only counts: a pass
counts, for five thresholds at once, the entries at or above each, and keeps
one sixth of the range. Twelve passes settle float32, six the 16-bit floats.
Counting adds integers, so the answer has the same bits however an array is
cut over devices, and a pass sends ten integers, never parameters. (Sorting
costs some sixty times as much, and on a mesh gathers the array.)

Counts are pairs of int32 limbs `[2, ...]`, `high * 2**12 + low`, so that a
model of more than `2**31` entries is counted exactly with 64-bit types off.

Where ties must be broken, an entry's key goes on after its magnitude with the
position of its leaf and its own index, both complemented: the lowest wins.
The search then refines those words in turn, only if a tie straddles the cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.patches import placement
from patchjax.trees.errors import DtypeError, SelectionError

Array = Any

_WAYS = 6
"""Parts a pass cuts the range in: five counts share one read of the data."""

_LIMB = 12
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


# ---------------------------------------------------------------------------
# k from a density.


def limbs(count: int) -> np.ndarray:
  """Returns a host integer as limbs `int32[2]` (high, low)."""
  return np.array([count >> _LIMB, count & ((1 << _LIMB) - 1)], np.int32)


def entries_of(density: Any, size: int) -> Array:
  """Returns `k = floor(density * size)` as limbs `int32[2, ...]`.

  A Python number gives `int(density * size)`. An array (a traced density, a
  grid under `vmap`) is taken as the decimal of up to six digits that it
  rounds, or else with a tolerance of about half a unit in its last place:
  `float32(0.7) * 10` is 7, although float32(0.7) lies below 0.7.

  Args:
    density: share of entries, in (0, 1]; a number or an array.
    size: the number of entries.

  Raises:
    SelectionError: if a density that can be seen is outside (0, 1], or if a
      derivative with respect to it is taken.

  Example:
    >>> import jax.numpy as jnp
    >>> entries_of(0.5, 10).tolist(), entries_of(jnp.float32(0.7), 10).tolist()
    ([0, 5], [0, 7])
  """
  if isinstance(density, int | float):
    check_density(density)
    return limbs(int(density * size))
  if not isinstance(density, Tracer):
    check_density(density)
  if size >= 1 << (_LIMB + 30):
    raise SelectionError(f"cannot count {size} entries: at most 2**42 - 1")
  return _entries(size, jnp.asarray(density).astype(jnp.float32))


def check_density(density: Any) -> None:
  """Raises SelectionError unless the density lies in (0, 1]."""
  value = np.asarray(density, np.float64)
  if not ((value > 0) & (value <= 1)).all():
    raise SelectionError(
      f"density must be in (0, 1], got {density}: it is the share of "
      "entries that is kept"
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entries(size: int, density: Array) -> Array:
  scaled = density * jnp.float32(1e6)
  decimal = jnp.round(scaled)
  is_decimal = jnp.abs(scaled - decimal) <= scaled * jnp.float32(2.0**-23)
  binary = (density * jnp.float32(2.0**30)).astype(jnp.uint32)
  binary = jnp.minimum(binary + (binary >> jnp.uint32(24)), jnp.uint32(1 << 30))
  return jnp.where(
    is_decimal,
    _scaled_floor(decimal.astype(jnp.uint32), size, 10**6),
    _scaled_floor(binary, size, 1 << 30),
  )


def _entries_jvp(size, primals, tangents):
  if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
    raise SelectionError(
      "a density has no derivative: it selects entries by rank. "
      "Differentiate the smooth numbers (weights, scale, t) and hold the "
      "density fixed (close over it), or vmap over a grid of densities"
    )
  out = _entries(size, *primals)
  return out, np.zeros(out.shape, jax.dtypes.float0)


_entries.defjvp(_entries_jvp, symbolic_zeros=True)


def _scaled_floor(numerator: Array, size: int, denominator: int) -> Array:
  """Returns `floor(numerator * size / denominator)` as limbs.

  `numerator <= denominator <= 2**30`, so that no step leaves uint32.
  """
  whole, rest = divmod(size, denominator)

  def divide(i, carry):
    quotient, remainder = carry
    bit = (numerator >> (jnp.uint32(30) - i.astype(jnp.uint32))) & jnp.uint32(1)
    remainder = remainder * jnp.uint32(2) + bit * jnp.uint32(rest)
    digit = remainder // jnp.uint32(denominator)
    remainder = remainder - digit * jnp.uint32(denominator)
    return quotient * jnp.uint32(2) + digit, remainder

  zero = jnp.zeros_like(numerator)
  small, _ = lax.fori_loop(0, 31, divide, (zero, zero))
  mask = jnp.uint32((1 << _LIMB) - 1)
  low = (numerator & mask) * jnp.uint32(whole)
  high = (numerator >> jnp.uint32(_LIMB)) * jnp.uint32(whole)
  high = high + (low >> jnp.uint32(_LIMB)) + (small >> jnp.uint32(_LIMB))
  low = (low & mask) + (small & mask)
  return carried(jnp.stack([high, low]).astype(jnp.int32))


# ---------------------------------------------------------------------------
# Counting.


def carried(count: Array) -> Array:
  """Returns limbs `int32[2, ...]` with the low one brought under `2**12`."""
  high, low = count[0], count[1]
  return jnp.stack(
    [
      high + (low >> jnp.int32(_LIMB)),
      low & jnp.int32((1 << _LIMB) - 1),
    ]
  )


def at_least(count: Array, k: Array) -> Array:
  """Returns `count >= k` for carried limbs."""
  same = (count[0] == k[0]) & (count[1] >= k[1])
  return (count[0] > k[0]) | same


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a shape of rows to reduce: several, for several cores."""
  size = math.prod(shape)
  for rows in (64, 16):
    if size % rows == 0 and size >= 1 << 16:
      return (rows, size // rows)
  return (1, size) if len(shape) < 2 else (size // shape[-1], shape[-1])


def count_true(masks: tuple[Array, ...], *, local: bool) -> Array:
  """Counts the true entries of several masks of one shape in one read.

  The counts are the operands of one variadic reduction: XLA fuses that with
  what computes the masks, where a plain sum of a mask takes twenty times as
  long on a CPU.

  Args:
    masks: boolean arrays of one shape.
    local: whether the arrays lie on one device (also inside `shard_map`) and
      so may be reshaped freely.

  Returns:
    carried limbs `int32[2, len(masks)]`.
  """
  shape = masks[0].shape
  if not math.prod(shape):
    return jnp.zeros((2, len(masks)), jnp.int32)
  if local:
    masks = tuple(mask.reshape(_rows(shape)) for mask in masks)
  elif not shape:
    masks = tuple(mask.reshape(1) for mask in masks)
  ones = tuple(mask.astype(jnp.int32) for mask in masks)
  # One operand alone is the slow case again: its twin costs nothing.
  last = ones[0].ndim - 1
  operands = ones if len(ones) > 1 else (*ones, *ones)
  partial = lax.reduce(
    operands,
    (jnp.int32(0),) * len(operands),
    lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
    (last,),
  )[: len(ones)]
  # Fused with the next sum, the reduction would run on one core.
  partial = lax.optimization_barrier(partial)
  if math.prod(shape) < 1 << 31:
    total = jnp.stack([jnp.sum(p, dtype=jnp.int32) for p in partial])
    return jnp.stack(
      [
        total >> jnp.int32(_LIMB),
        total & jnp.int32((1 << _LIMB) - 1),
      ]
    )
  return jnp.stack([limb_sum(p) for p in partial], axis=1)


def limb_sum(x: Array) -> Array:
  """Sums non-negative int32 of any number and size into carried limbs."""

  def add(a, b):
    low = a[1] + b[1]
    high = a[0] + b[0] + (low >> jnp.int32(_LIMB))
    return high, low & jnp.int32((1 << _LIMB) - 1)

  pair = (x >> jnp.int32(_LIMB), x & jnp.int32((1 << _LIMB) - 1))
  zero = jnp.int32(0)
  return jnp.stack(lax.reduce(pair, (zero, zero), add, tuple(range(x.ndim))))


# ---------------------------------------------------------------------------
# The search.


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
    widths: bits of the magnitude, then (for exactly k) of the leaf's
      position, the row and the index; see `key_widths`.
    early: whether any cut with k keys above will do, or the k-th key itself
      is wanted.
  """
  return Search(
    # On the host where k is: nothing small to compile outside jit.
    k=k,
    found=np.zeros(4, np.uint32),
    phase=np.int32(0),
    step=np.uint32(1 << widths[0]),
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
  sizes = (len(shapes), max(rows), max(columns))
  return (bits, *(max(size - 1, 1).bit_length() for size in sizes))


def thresholds(state: Search) -> tuple[Array, Array]:
  """Returns the five words to compare with, and which of them are in range."""
  top = jnp.asarray([(1 << w) - 1 for w in state.widths], jnp.uint32)
  phase = jnp.minimum(state.phase, jnp.int32(len(state.widths) - 1))
  step = (state.step + jnp.uint32(_WAYS - 1)) // jnp.uint32(_WAYS)
  words = state.found[phase] + step * jnp.arange(1, _WAYS, dtype=jnp.uint32)
  return jnp.minimum(words, top[phase]), words <= top[phase]


def count_keys(x: Array, leaf: placement.Leaf, state: Search) -> Array:
  """Returns how many keys of a leaf are at or above each threshold.

  Args:
    x: the leaf's floats (its shard, inside `shard_map`).
    leaf: where the leaf is in the model.
    state: the search.

  Returns:
    limbs `int32[2, 5]` of this leaf or shard alone; sums over leaves and
    shards go to `narrow`.
  """
  words, _ = thresholds(state)
  bits = magnitude_bits(x)
  if len(state.widths) == 1:
    masks = [bits >= word.astype(bits.dtype) for word in words]
  else:
    # The word that is searched is replaced; those after it are still 0.
    here = jnp.arange(4) == state.phase
    index = leaf.index()
    masks = [
      _not_below(bits, leaf, index, jnp.where(here, word, state.found))
      for word in words
    ]
  return count_true(tuple(masks), local=leaf.local)


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
  step = (state.step + jnp.uint32(_WAYS - 1)) // jnp.uint32(_WAYS)
  moved = jnp.sum(enough, dtype=jnp.int32)
  last = len(state.widths) - 1
  phase = jnp.minimum(state.phase, jnp.int32(last))
  found = state.found.at[phase].add(step * moved.astype(jnp.uint32))
  settled = step <= jnp.uint32(1)
  following = jnp.minimum(state.phase + jnp.int32(1), jnp.int32(last))
  width = jnp.asarray([1 << w for w in state.widths], jnp.uint32)[following]
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
  bits = magnitude_bits(x)
  some = at_least(state.k, jnp.asarray(limbs(1)))
  if len(state.widths) == 1:
    mask = bits >= state.found[0].astype(bits.dtype)
  else:
    mask = _not_below(bits, leaf, leaf.index(), state.found)
  return mask & some


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
