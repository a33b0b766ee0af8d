"""Where a search among ties ends, in one read: the last that is kept.

What 16-bit models differ by has few values, so that a cut almost always goes
through keys that many entries share. How many of them each row has says in
which row the last one is that is kept, and that row alone says where in it.
Only where an array is whole: on a mesh this would send numbers for each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from patchjax.patches import counting, placement
from patchjax.patches.selection import FOUND, PHASE, Search, put

Array = Any

_ROW = 1 << 20
"""Entries of the longest row that is looked at as often as it has digits."""


def seen_whole(leaf: placement.Leaf, states: Search) -> bool:
  """Returns whether searches are of one leaf, that lies on one device.

  Args:
    leaf: where the leaf is.
    states: the searches.
  """
  return (
    leaf.single
    and not leaf.manual
    and not states.widths[1]
    and 0 < leaf.size < placement.ROW_LIMIT
    and 0 < len(leaf.shape)
    and leaf.shape[-1] <= _ROW
  )


def last_kept(
  keys: Sequence[Array], leaf: placement.Leaf, states: Search, each: int = 1
) -> Array:
  """Returns the last word of what each search finds, for `settled`.

  Args:
    keys: arrays of unsigned integers of the leaf's shape.
    leaf: where the leaf is: `seen_whole`.
    states: the searches, whose first words are found.
    each: how many of them are in each array.

  Returns:
    `uint32[len(states)]`.
  """
  columns = leaf.shape[-1]
  rows = leaf.size // columns
  tables = [key.reshape(rows, columns) for key in keys]
  cuts = [state.found[0].astype(keys[0].dtype) for state in states]
  above, ties = _by_rows(tables, cuts, each)
  # The size is below 2**31, and so is every count.
  rank = (states.k[:, 0] << jnp.int32(counting.LIMB)) + states.k[:, 1]
  row, rank = _place(ties, rank - jnp.sum(above, axis=1))
  in_row = jnp.stack(
    [
      lax.dynamic_index_in_dim(tables[i // each], row[i], keepdims=False) == cut
      for i, cut in enumerate(cuts)
    ]
  )
  column, _ = _place(in_row.astype(jnp.int32), rank)
  last = jnp.int32(leaf.size - 1) - (row * jnp.int32(columns) + column)
  return last.astype(jnp.uint32)


def _by_rows(
  tables: Sequence[Array], cuts: Sequence[Array], each: int
) -> tuple[Array, Array]:
  """Returns how many entries of rows are above each cut, and at it.

  Args:
    tables: keys.
    cuts: some for each table.
    each: how many.
  """
  above, ties = [], []
  for i, table in enumerate(tables):
    of_table = cuts[i * each : (i + 1) * each]
    masks = [table > cut for cut in of_table] + [
      table == cut for cut in of_table
    ]
    # All in one reduction, with several operands: as in `counting`.
    counts = lax.reduce(
      tuple(mask.astype(jnp.int32) for mask in masks),
      (jnp.int32(0),) * len(masks),
      lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
      (1,),
    )
    above += counts[:each]
    ties += counts[each:]
  return jnp.stack(above), jnp.stack(ties)


def _place(counts: Array, rank: Array) -> tuple[Array, Array]:
  """Returns where the one of a rank is, from 1, and its rank there.

  By bisection: a cumulative sum is compiled to several loops.

  Args:
    counts: `int32[m, n]`, how many there are at each of n places.
    rank: `int32[m]`, of those that are sought.
  """
  count, length = counts.shape
  turns = max(1, (length - 1).bit_length())
  places = lax.broadcasted_iota(jnp.int32, counts.shape, 1)

  def digit(i, carry):
    place, less = carry
    next_ = place + (jnp.int32(1 << (turns - 1)) >> i.astype(jnp.int32))
    before = jnp.where(places < next_[:, None], counts, jnp.int32(0))
    before = jnp.sum(before, axis=1)
    up = (next_ < jnp.int32(length)) & (before < rank)
    return jnp.where(up, next_, place), jnp.where(up, before, less)

  nought = jnp.zeros(count, jnp.int32)
  place, less = lax.fori_loop(0, turns, digit, (nought, nought))
  return place, rank - less


def settled(last: Array, state: Search) -> Search:
  """Returns a search among ties at its end.

  Args:
    last: from `last_kept`, of this search.
    state: the search; one that is over stays as it is.
  """
  end = jnp.uint32(len(state.widths))
  known = put(state.known, {FOUND + 3: last, PHASE: end})
  known = jnp.where(state.in_ties, known, state.known)
  return dataclasses.replace(state, known=known)
