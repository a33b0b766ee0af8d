"""keep_between: drop the largest and the smallest entries, by magnitude."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp

from patchjax.merging import ranks, rows
from patchjax.patches import ordering, selection, shares, transform
from patchjax.patches.rank_cuts import cuts

_TOP = (1 << 31) - 1


def keep_between(
  *,
  density: Any,
  gamma: Any = 0.01,
  scope: Literal["row", "leaf", "tree"] = "row",
  fill: bool = False,
) -> transform.Transform:
  """Returns the step that keeps a share of the entries, but not the largest.

  Model Breadcrumbs (Davari and Belilovsky 2024,
  https://arxiv.org/abs/2312.06795): of n entries the `floor(gamma n)` largest
  magnitudes go, the `floor(density n)` next stay, the others go. Exactly that
  many: of equal magnitudes the first in order counts as the larger.

  Args:
    density: share that is kept, in (0, 1], one a contributor or one for all;
      traced; has no derivative.
    gamma: share of the largest that go, in [0, 1].
    scope: what n entries are: those along the last axis ("row", as in the
      paper's code), of a leaf (mergekit), or of the tree.
    fill: whether fewer of the largest go where otherwise fewer than
      `floor(density n)` would stay, and none where the density is 1
      (mergekit). Of equal magnitudes the first then counts as the smaller.

  Raises:
    SelectionError: if a share is outside its range.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0] * 4, [1, -4, 3, 2]))
    >>> middle = pj.merging.keep_between(density=0.5, gamma=0.25)
    >>> pj.merge(base, [tuned], middle)["w"].tolist()
    [0.0, 0.0, 3.0, 2.0]
  """
  if scope not in ("row", "leaf", "tree"):
    raise ValueError(f"scope must be 'row', 'leaf' or 'tree', got {scope!r}")
  for name, value in (("density", density), ("gamma", gamma)):
    if isinstance(value, int | float):
      shares.check_density(value, zero=name == "gamma", name=name)
  step = _ROWS if scope == "row" else _BETWEEN
  options = {"fill": fill} | ({} if scope == "row" else {"scope": scope})
  numbers = {"density": density, "gamma": gamma}
  return transform.Transform.of(step, numbers, **options)


def _bounds(state, size, k, *, fill):
  """Two ranks a contributor: what comes between them is kept.

  Ranks count from the largest magnitude, or with `fill` from the smallest.
  """
  found = []
  densities = transform.per_contributor(state["density"], k)
  gammas = transform.per_contributor(state["gamma"], k)
  for density, gamma in zip(densities, gammas, strict=True):
    kept = shares.entries_of(density, size)
    top = shares.entries_of(gamma, size, zero=True)
    full = shares.limbs(size)
    if fill:
      low = ranks.minus(ranks.minus(full, kept), top)
      found += [low, ranks.plus(low, kept)]
    else:
      found += [top, ranks.at_most(ranks.plus(top, kept), full)]
  return found


def _keys(deltas, fill, top=_TOP):
  keys = map(ordering.magnitude_keys, deltas)
  return tuple(jnp.uint32(top) - key if fill else key for key in keys)


def _between_keys(leaf, deltas, state, *, fill, scope):
  del leaf, state, scope
  # Not from the largest key, but from one above it: keys that many entries
  # share are round, and so they stay, which is where a search looks.
  return _keys(deltas, fill, _TOP + 1)


def _between_ranks(state, shapes, k, *, fill, scope):
  del scope
  size = sum(math.prod(shape) for shape in shapes)
  return tuple(_bounds(state, size, k, fill=fill))


def _between(leaf, deltas, base, state, searches, *, fill, scope):
  del base, state
  if not leaf.shape and not fill and scope == "leaf":
    return deltas
  out = []
  keys = _between_keys(leaf, deltas, None, fill=fill, scope=scope)
  for i, (key, delta) in enumerate(zip(keys, deltas)):
    outer, inner = (
      selection.keep_keys(key, leaf, search)
      for search in searches[2 * i : 2 * i + 2]
    )
    out.append(jnp.where(inner & ~outer, delta, jnp.zeros_like(delta)))
  return tuple(out)


_BETWEEN = transform.register_step(
  transform.Step(
    name="keep_between",
    update=_between,
    scope=lambda *, scope, **_: scope,
    **cuts(
      _between_keys,
      _between_ranks,
      each=2,
      bits=32,
      exact=lambda **_: True,
      early=True,
    ),
  )
)


def _rows_start(state, shapes, k, *, fill):
  (shape,) = shapes
  found = _bounds(state, rows.length_of(shape), k, fill=fill)
  return tuple(rows.search(rank, shape) for rank in found)


def _rows_reduce(leaf, deltas, state, searches, *, fill):
  del state
  return tuple(
    rows.count(key, leaf, searches[2 * i : 2 * i + 2])
    for i, key in enumerate(_keys(deltas, fill))
  )


def _rows_finish(total, searches):
  found = tuple(
    rows.narrow(total[i // 2][..., i % 2, :], search)
    for i, search in enumerate(searches)
  )
  return found, jnp.stack([search.done for search in found]).all()


def _rows_update(leaf, deltas, base, state, searches, *, fill):
  del base, state
  if not leaf.shape:  # A number is no row: it stays.
    return deltas
  out = []
  for i, (key, delta) in enumerate(zip(_keys(deltas, fill), deltas)):
    outer, inner = (
      rows.above(key, leaf, search) for search in searches[2 * i : 2 * i + 2]
    )
    out.append(jnp.where(inner & ~outer, delta, jnp.zeros_like(delta)))
  return tuple(out)


_ROWS = transform.register_step(
  transform.Step(
    name="keep_between_rows",
    update=_rows_update,
    start=_rows_start,
    counts=transform.one_count(_rows_reduce, _rows_finish),
    scope=lambda **_: "leaf",
  )
)
