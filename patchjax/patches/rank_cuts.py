"""Steps that cut by rank: `cuts` makes their counting functions.

Of two functions, for the keys of a leaf and for the ranks of the cuts, they
give a `Step` the finished searches (`selection`) when it updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patchjax.patches import narrowing, selection, transform

Array = Any


def cuts(
  keys: Callable[..., Any],
  ranks: Callable[..., Any],
  *,
  each: int = 1,
  keep: bool = False,
  bits: int = 32,
  exact: Callable[..., bool] | None = None,
  early: bool = False,
) -> dict[str, Any]:
  """Returns the counting functions of a step that cuts keys by rank.

  The step's `update` gets, as `shared`, the finished searches, one for each
  rank in their order: for `keep_keys`, and `cut_key` with `value_of`
  or `magnitude_of`. Nothing is sorted or gathered, and the bits of the answer
  do not depend on how arrays are cut over devices.

  Args:
    keys: `(leaf, deltas, state, **options)`, a tuple of arrays of unsigned
      integers, of the leaf's shape (`magnitude_keys`, `ordered_bits`). For a
      step that needs the base, `(leaf, deltas, base, state, **options)`.
    ranks: `(state, shapes, k, **options)`, the limbs of the rank for each of
      them, counted from 1 at the largest key (`shares.entries_of`).
    each: how many cuts are made of each array; as many ranks stand beside
      each other, and share one read.
    keep: whether the keys are kept between passes, where these are over one
      leaf: for keys that take more to compute than to read.
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
    >>> from patchjax.patches.ordering import ordered_bits, value_of
    >>> from patchjax.patches.selection import cut_key
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
    found = ranks(state, shapes, k, **options)
    settings = {"bits": bits, "exact": _is(exact, options), "early": early}
    return selection.stacked(
      [selection.search(rank, shapes, **settings) for rank in found]
    )

  def counts(**options):
    found = narrowing.rounds(exact=_is(exact, options))
    return tuple(_counted(None if keep else keys, kind, each) for kind in found)

  return {
    "start": start,
    "counts": counts,
    "kept": keys if keep else None,
    "keys": keys,
    "each": each,
    "ranks": ranks,
    "key_bits": bits,
    "exact": exact,
  }


def _is(exact: Callable[..., bool] | None, options: dict[str, Any]) -> bool:
  return exact is not None and exact(**options)


def _counted(
  keys: Callable[..., Any] | None, kind: narrowing.Round, each: int
) -> transform.Count:
  """Returns the passes of one kind over the keys of a leaf."""

  def reduce(leaf, found, *rest, **options):
    *seen, searches = rest
    if keys is not None:
      found = keys(leaf, found, *seen, **options)
    return kind.count(found, leaf, searches, each)

  return transform.Count(reduce, kind.after, needed=kind.needed)
