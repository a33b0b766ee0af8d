"""compete: task vectors weighed against each other, entry by entry (PCB)."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp

from patchjax.merging import ranks
from patchjax.patches import ordering, selection, shares, transform
from patchjax.patches.counting import limbs
from patchjax.patches.rank_cuts import cuts

_TAIL = 1e-4
"""Share of the magnitudes that is clamped, at either end."""


def compete(
  *, density: Any = 0.1, scope: Literal["tree", "leaf"] = "tree"
) -> transform.Transform:
  """Returns the steps that average entries by how well they compete.

  See `methods.pcb`. The first clamps magnitudes and scores entries; the
  second, which reduces, cuts the scores and averages.

  Args:
    density: share of the entries of a contributor that have a weight.
    scope: what the shares are of.
  """
  if scope not in ("tree", "leaf"):
    raise ValueError(f"scope must be 'tree' or 'leaf', got {scope!r}")
  if isinstance(density, int | float):
    shares.check_density(density)
  return transform.chain(
    transform.Transform.of(_SCORE, {}, scope=scope),
    transform.Transform.of(_WEIGH, {"density": density}, scope=scope),
  )


def _size(shapes):
  return sum(math.prod(shape) for shape in shapes)


def _score_keys(leaf, deltas, state, *, scope):
  del leaf, state, scope
  return tuple(map(ordering.magnitude_keys, deltas))


def _score_ranks(state, shapes, k, *, scope):
  del state, scope
  size = _size(shapes)
  low, high = int(size * _TAIL), int(size * (1 - _TAIL) - 1)
  # Ranks count from the largest.
  return (limbs(size - max(low, 0)), limbs(size - max(high, 0))) * k


def _score(leaf, deltas, base, state, searches, *, scope):
  """The scores of the k contributors, and then their clamped task vectors."""
  del leaf, base, state, scope
  joint = functools.reduce(jnp.add, deltas)
  scores, clamped = [], []
  for i, d in enumerate(deltas):
    low, high = (
      ordering.magnitude_of(selection.cut_key(search)).astype(d.dtype)
      for search in searches[2 * i : 2 * i + 2]
    )
    size = jnp.clip(jnp.abs(d), low, high)
    unit = (size - low) / _or_one(high - low)
    within = jnp.exp(
      transform.rounded(jnp.square(unit) * jnp.asarray(len(deltas), d.dtype))
    )
    across = jnp.tanh(transform.rounded(d * joint))
    scores.append(transform.rounded(within * across))
    clamped.append(jnp.sign(d) * size)
  return (*scores, *clamped)


def _or_one(x):
  return jnp.where(x == jnp.zeros_like(x), jnp.ones_like(x), x)


_SCORE = transform.register_step(
  transform.Step(
    name="score_competition",
    update=_score,
    scope=lambda *, scope: scope,
    **cuts(_score_keys, _score_ranks, each=2, bits=31),
  )
)


def _weigh_keys(leaf, deltas, state, *, scope):
  del leaf, state, scope
  return tuple(map(ordering.ordered_bits, deltas[: len(deltas) // 2]))


def _weigh_ranks(state, shapes, k, *, scope):
  del scope
  size = _size(shapes)
  found = []
  for density in transform.per_contributor(state["density"], k):
    below = shares.entries_of(1 - density, size, zero=True)
    rank = ranks.minus(limbs(size), below)
    one = limbs(1)
    # The largest score too: weights go up to 1.
    found += [ranks.plus(ranks.minus(rank, one), one), one]
  return tuple(found)


def _weigh(leaf, deltas, base, state, searches, *, scope):
  del leaf, base, state, scope
  k = len(deltas) // 2
  scores, clamped = deltas[:k], deltas[k:]
  total = mass = jnp.zeros_like(clamped[0])
  for i, (score, d) in enumerate(zip(scores, clamped, strict=True)):
    cut, top = (
      ordering.value_of(selection.cut_key(search)).astype(d.dtype)
      for search in searches[2 * i : 2 * i + 2]
    )
    weight = jnp.maximum(score - cut, jnp.zeros_like(d)) / _or_one(top - cut)
    total = total + transform.rounded(weight * d)
    mass = mass + weight
  return total / jnp.maximum(mass, jnp.asarray(1e-12, mass.dtype))


_WEIGH = transform.register_step(
  transform.Step(
    name="weigh_competition",
    update=_weigh,
    reducing=True,
    scope=lambda *, scope: scope,
    **cuts(_weigh_keys, _weigh_ranks, each=2, keep=True),
  )
)
