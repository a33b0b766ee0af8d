"""The entries of largest magnitude: of an array, or of several together."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import leafwise, narrowing, ordering, placement, selection
from patchjax.patches.counting import limbs
from patchjax.trees.errors import DtypeError, SelectionError

Array = Any


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
  word = ordering.magnitude_bits(jnp.zeros((), x.dtype)).dtype
  key = selection.cut_key(state).astype(word)
  return lax.bitcast_convert_type(key, x.dtype)


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


def _search_array(x: Array, k: Any, *, exact: bool) -> selection.Search:
  if not hasattr(k, "shape"):
    k = limbs(k)
  bits = ordering.bits_of(x.dtype)
  start = selection.search(k, [x.shape], bits=bits, exact=exact, early=exact)
  return _passes(lax.stop_gradient(x), placement.leaf_of(x), start)


@jax.jit
def _passes(
  x: Array, leaf: placement.Leaf, state: selection.Search
) -> selection.Search:
  state = selection.stacked([state])
  for kind in narrowing.rounds(exact=len(state.widths) > 1):

    def one_pass(x, state, kind=kind):
      counts = placement.sum_over_shards(_counted(kind), x, leaf, state)
      return kind.after(counts, state)

    state = leafwise.repeated(one_pass, x, state, kind.open(state).any())
  return state[0]


def _counted(kind: narrowing.Round) -> Any:
  def count(x, leaf, states):
    return kind.count((ordering.magnitude_bits(x),), leaf, states)

  return count


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
  places = {
    name: placement.leaf_of(leaves[name], i, len(order))
    for i, name in enumerate(order)
  }
  shapes = [leaves[name].shape for name in order]
  bits = ordering.bits_of(kinds.pop())
  start = selection.search(limbs(k), shapes, bits=bits, exact=True)
  state = selection.stacked([start])
  for number, kind in enumerate(narrowing.rounds(exact=True)):
    done = not kind.open(state).any()
    while not done:
      total = None
      for name in order:
        total = _count_leaf(leaves[name], places[name], state, total, number)
      state, done = jax.device_get(_after(total, state, number))
  state = state[0]
  return {name: _keep(x, places[name], state) for name, x in leaves.items()}


@functools.partial(jax.jit, static_argnums=4)
def _count_leaf(x, leaf, state, total, number):
  count = _counted(narrowing.rounds(exact=True)[number])
  counts = placement.sum_over_shards(count, x, leaf, state)
  return counts if total is None else counts + total


@functools.partial(jax.jit, static_argnums=2)
def _after(counts, state, number):
  return narrowing.rounds(exact=True)[number].after(counts, state)


@jax.jit
def _keep(x, leaf, state):
  return selection.keep_keys(ordering.magnitude_bits(x), leaf, state)
