"""Cuts by rank in every row of a leaf: a row is what its last axis holds.

The search of `patches.selection`, for all rows side by side: a pass counts,
for five thresholds a row, the keys at or above each. Rows whose last axis is
cut over devices are counted where they lie; what is sent are counts, five
integers a row. Of equal keys the first in a row counts as the largest, so that
exactly as many are above a cut as its rank says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement
from patchjax.trees.errors import SelectionError

Array = Any

_WAYS = 6
_ABOVE = 0xFFFFFFFF


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSearch:
  """A search for the k-th largest key of every row, between two passes.

  Attributes:
    rank: k, `int32[]`; nothing is above a cut of rank 0.
    key: the keys found so far, `uint32` of the shape of the rows.
    tie: and, of the entries with just that key, the complement of the column
      of the last that is above the cut.
    settled: which rows are done.
    phase: 0 while keys are searched, 1 for ties, 2 at the end; `int32[]`.
    step: width of the range that is left, `uint32[]`.
    length: of a row, static.
    bits: of the keys, static.
  """

  rank: Array
  key: Array
  tie: Array
  settled: Array
  phase: Array
  step: Array
  length: int = dataclasses.field(metadata={"static": True})
  bits: int = dataclasses.field(metadata={"static": True})

  @property
  def done(self) -> Array:
    """Whether all rows are settled."""
    return self.phase >= jnp.int32(2)


def length_of(shape: tuple[int, ...]) -> int:
  """Returns how long the rows of a leaf are; a scalar is a row of one.

  Args:
    shape: of the leaf.

  Raises:
    SelectionError: if a row is too long to be counted in 32 bits.
  """
  length = shape[-1] if shape else 1
  if length >= 1 << 31:
    raise SelectionError(
      f"a row of {length} entries is too long: at most 2**31 - 1; select "
      "over the leaf instead (scope='leaf')"
    )
  return length


def search(rank: Array, shape: tuple[int, ...], bits: int = 31) -> RowSearch:
  """Returns a search at its beginning.

  Args:
    rank: limbs of the rank, the same in every row.
    shape: of the leaf.
    bits: of the keys.
  """
  rows = shape[:-1]
  high, low = rank[0], rank[1]
  return RowSearch(
    rank=high * 4096 + low,
    key=np.zeros(rows, np.uint32),
    tie=np.zeros(rows, np.uint32),
    settled=np.zeros(rows, bool),
    phase=np.int32(0),
    step=np.uint32(1 << bits),
    length=length_of(shape),
    bits=bits,
  )


def _words(state: RowSearch) -> tuple[list[Array], Array]:
  """The five words a row to compare with, and the largest of that kind."""
  sixth = (state.step + jnp.uint32(_WAYS - 1)) // jnp.uint32(_WAYS)
  first = state.phase == jnp.int32(0)
  start = jnp.where(first, state.key, state.tie)
  top = jnp.where(first, (1 << state.bits) - 1, max(state.length - 1, 0))
  words = [start + sixth * jnp.uint32(j) for j in range(1, _WAYS)]
  return words, top.astype(jnp.uint32)


def _columns(leaf: placement.Leaf, shape: tuple[int, ...]) -> Array:
  """Complements of the global column of each entry, counted from 1."""
  length = length_of(leaf.shape)
  if not shape:
    return jnp.uint32(1)
  column = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  if leaf.manual and leaf.axes and leaf.axes[-1]:
    start = lax.axis_index(leaf.axes[-1]).astype(jnp.uint32)
    column = column + start * jnp.uint32(shape[-1])
  return jnp.uint32(length) - column


def _own(leaf: placement.Leaf, x: Array, shape: tuple[int, ...]) -> Array:
  """The numbers of the rows that are on this shard, with an axis of one."""
  if not shape:
    return x
  rows = shape[:-1]
  if leaf.manual and rows:
    x = lax.dynamic_slice(x, _starts(leaf, rows), rows)
  return x[..., None]


def _starts(leaf: placement.Leaf, rows: tuple[int, ...]) -> list[Array]:
  return [
    lax.axis_index(names).astype(jnp.int32) * jnp.int32(size)
    if names
    else jnp.int32(0)
    for names, size in zip(leaf.axes, rows)
  ]


def placed(leaf: placement.Leaf, x: Array) -> Array:
  """Returns numbers of a shard's rows among zeros for those of others.

  Args:
    leaf: where the leaf is.
    x: an array that begins with the axes of this shard's rows.
  """
  rows = leaf.shape[:-1]
  if not leaf.manual or not rows:
    return x
  shape = rows + x.shape[len(rows) :]
  starts = _starts(leaf, x.shape[: len(rows)])
  starts += [jnp.int32(0)] * (x.ndim - len(rows))
  return lax.dynamic_update_slice(jnp.zeros(shape, x.dtype), x, starts)


def count(
  keys: Array, leaf: placement.Leaf, states: tuple[RowSearch, ...]
) -> Array:
  """Returns how many keys of each row are at or above each threshold.

  Args:
    keys: `uint32` of the leaf's (or shard's) shape.
    leaf: where the leaf is.
    states: the searches; all of them share one read of the keys.

  Returns:
    `int32[*rows, len(states), 5]` of all rows of the leaf; those of other
    shards are 0.
  """
  shape = keys.shape
  column = _columns(leaf, shape)
  masks = []
  for state in states:
    words, _ = _words(state)
    found = _own(leaf, state.key, shape)
    # In the second phase an entry is ranked by its column, if it ties.
    second = jnp.where(keys == found, column, jnp.uint32(0))
    second = jnp.where(keys > found, jnp.uint32(_ABOVE), second)
    first = state.phase == jnp.int32(0)
    ranked = jnp.where(first, keys, second)
    more = jnp.where(first, jnp.uint32(0), jnp.uint32(1))
    masks += [ranked >= _own(leaf, word + more, shape) for word in words]
  if not shape:
    counts = jnp.stack([mask.astype(jnp.int32) for mask in masks])
    return counts.reshape(len(states), _WAYS - 1)
  ones = tuple(mask.astype(jnp.int32) for mask in masks)
  partial = lax.reduce(
    ones,
    (jnp.int32(0),) * len(ones),
    lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
    (len(shape) - 1,),
  )
  counts = jnp.stack(lax.optimization_barrier(tuple(partial)), axis=-1)
  counts = counts.reshape(*shape[:-1], len(states), _WAYS - 1)
  return placed(leaf, counts)


def narrow(counts: Array, state: RowSearch) -> RowSearch:
  """Returns the search after a pass.

  Args:
    counts: `int32[*rows, 5]`, summed over shards.
    state: the search before.
  """
  words, top = _words(state)
  words = jnp.stack(words, axis=-1)
  enough = (counts >= state.rank) & (words <= top)
  moved = jnp.sum(enough, axis=-1, dtype=jnp.int32)
  sixth = (state.step + jnp.uint32(_WAYS - 1)) // jnp.uint32(_WAYS)
  far = moved.astype(jnp.uint32) * sixth
  first = state.phase == jnp.int32(0)
  open_ = ~state.settled
  key = jnp.where(open_ & first, state.key + far, state.key)
  tie = jnp.where(open_ & ~first, state.tie + far, state.tie)
  hit = ((counts == state.rank) & enough).any(axis=-1)
  trivial = (state.rank <= 0) | (state.rank >= state.length)
  # The last word that passed is the cut, where just enough are above it.
  at = jnp.maximum(moved - 1, 0)[..., None]
  exact = jnp.take_along_axis(counts, at, axis=-1)[..., 0] == state.rank
  settled = state.settled | trivial | (hit & exact)
  over = sixth <= jnp.uint32(1)
  phase = state.phase + over.astype(jnp.int32)
  phase = jnp.where(settled.all(), jnp.int32(2), phase)
  width = jnp.uint32(1 << max(state.length - 1, 1).bit_length())
  step = jnp.where(over, width, sixth)
  new = dataclasses.replace(
    state, key=key, tie=tie, settled=settled, phase=phase, step=step
  )
  return jax.tree.map(lambda a, b: jnp.where(state.done, a, b), state, new)


def above(keys: Array, leaf: placement.Leaf, state: RowSearch) -> Array:
  """Returns the mask of the entries above the cut: `rank` in every row.

  Args:
    keys: the same that were counted.
    leaf: where the leaf is.
    state: the finished search.
  """
  return placement.on_shards(_above, keys, leaf, state)


def _above(keys, leaf, state):
  shape = keys.shape
  found, tie = (_own(leaf, x, shape) for x in (state.key, state.tie))
  ties = (keys == found) & (_columns(leaf, shape) > tie)
  mask = ((keys > found) | ties) & (state.rank > jnp.int32(0))
  return mask | (state.rank >= jnp.int32(state.length))
