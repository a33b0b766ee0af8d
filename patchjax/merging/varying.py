"""keep_varied: keep the entries in which contributors differ most."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from patchjax.merging import ranks
from patchjax.patches import (
  counting,
  narrowing,
  ordering,
  selection,
  shares,
  transform,
)


def keep_varied(*, density: Any) -> transform.Transform:
  """Returns the step that keeps entries of large variance over contributors.

  The first step of SCE (Wan et al. 2024, https://arxiv.org/abs/2408.07990,
  section 3.2): of a leaf in which n entries have a population variance that is
  not 0, the `floor(density n)` of the largest stay in all task vectors; of
  equal ones the first. With a density of 1 all entries stay.

  Args:
    density: share that is kept, in (0, 1]; one number; traced; has no
      derivative.

  Raises:
    SelectionError: if the density is outside (0, 1].

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a = ({"w": np.float32(x)} for x in ([0, 0, 0], [1, 2, 3]))
    >>> b = {"w": np.float32([5, 2, 4])}
    >>> step = pj.chain(pj.merging.keep_varied(density=0.5), pj.merging.mean())
    >>> pj.merge(base, [a, b], step)["w"].tolist()
    [3.0, 0.0, 0.0]
  """
  if isinstance(density, int | float):
    shares.check_density(density)
  return transform.Transform.of(_VARIED, {"density": density})


def variance(deltas: tuple[Any, ...]) -> Any:
  """Returns the population variance over contributors in each entry.

  It is 0 exactly where all are equal: differences to the first are taken.

  Args:
    deltas: arrays of one shape.
  """
  moved = [d - deltas[0] for d in deltas[1:]]
  part = jnp.asarray(1 / len(deltas), deltas[0].dtype)
  mean = transform.rounded(functools.reduce(jnp.add, moved) * part)
  squares = [transform.rounded(jnp.square(d - mean)) for d in moved]
  squares.append(transform.rounded(jnp.square(mean)))
  return transform.rounded(functools.reduce(jnp.add, squares) * part)


def keys(leaf, deltas, state, **options):
  """Returns the keys that entries are cut by: of their variances."""
  del leaf, state, options
  if len(deltas) == 1:
    return (jnp.zeros(deltas[0].shape, jnp.uint32),)
  return (ordering.magnitude_keys(variance(deltas)),)


def start(state, shapes, k, **options):
  """Returns the first carry: the share that is kept, and the search."""
  del k, options
  (shape,) = shapes
  share = shares.selecting(jnp.asarray(state["density"]).astype(jnp.float32))
  # The rank of all entries, until it is known how many of them vary.
  size = counting.limbs(math.prod(shape))
  search = selection.search(size, shapes, exact=True)
  return share, selection.stacked([search])


def _vary(leaf, kept, state, carry, **options):
  del state, carry, options
  (found,) = kept
  counts = counting.count_true((found > jnp.uint32(0),), local=leaf.local)
  return counts[:, 0]


def _ranked(vary, carry):
  share, (search,), *others = carry
  rank = ranks.part(share, counting.carried(vary))
  search = selection.of_rank(search, rank)
  return (share, selection.stacked([search]), *others), jnp.asarray(True)


def _counted(kind: narrowing.Round) -> transform.Count:
  def reduce(leaf, kept, state, carry, **options):
    del state, options
    return kind.count(kept, leaf, carry[1])

  def finish(total, carry):
    share, searches, *others = carry
    searches, done = kind.after(total, searches)
    return (share, searches, *others), done

  def needed(carry):
    return kind.needed(carry[1])

  return transform.Count(reduce, finish, needed=needed)


COUNTS = (
  # In a loop, if only of one pass: before it the keys are computed and stored,
  # outside they would be computed again.
  transform.Count(_vary, _ranked),
  *map(_counted, narrowing.rounds(exact=True)),
)
"""What finds the cut; carries may hold more than `start` makes."""


def kept_of(leaf, deltas, carry, found=None):
  """Returns task vectors without the entries that vary too little.

  Args:
    leaf: where they are.
    deltas: task vectors, one a contributor.
    carry: what was counted.
    found: `keys` of them, where they are at hand.
  """
  share, (search,), *_ = carry
  (key,) = keys(leaf, deltas, None) if found is None else found
  keep = selection.keep_keys(key, leaf, search)
  keep = keep | (share >= jnp.float32(1))
  return tuple(jnp.where(keep, d, jnp.zeros_like(d)) for d in deltas)


def _update(leaf, deltas, base, state, carry):
  del base, state
  return kept_of(leaf, deltas, carry)


_VARIED = transform.register_step(
  transform.Step(
    name="keep_varied",
    update=_update,
    start=start,
    counts=lambda: COUNTS,
    kept=keys,
    scope=lambda: "leaf",
  )
)
