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


def keep_varied(*, density: Any, beside: bool = False) -> transform.Transform:
  """Returns the step that keeps entries of large variance over contributors.

  The first step of SCE (Wan et al. 2024, https://arxiv.org/abs/2408.07990,
  section 3.2): of a leaf in which n entries have a population variance that is
  not 0, the `floor(density n)` of the largest stay in all task vectors; of
  equal ones the first. With a density of 1 all entries stay.

  Args:
    density: share that is kept, in (0, 1]; one number; traced; has no
      derivative.
    beside: whether the whole task vectors go on beside what is kept of them:
      k arrays, and then k more, for a next step that needs both.

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
  return transform.Transform.of(_VARIED, {"density": density}, beside=beside)


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


def _keys(deltas):
  if len(deltas) == 1:
    return jnp.zeros(deltas[0].shape, jnp.uint32)
  return ordering.magnitude_keys(variance(deltas))


def _start(state, shapes, k, *, beside):
  del k, beside
  (shape,) = shapes
  share = shares.selecting(jnp.asarray(state["density"]).astype(jnp.float32))
  # The rank of all entries, until it is known how many of them vary.
  size = counting.limbs(math.prod(shape))
  search = selection.search(size, shapes, exact=True)
  return share, selection.stacked([search])


def _kept(leaf, deltas, state, *, beside):
  del leaf, state, beside
  return (_keys(deltas),)


def _vary(leaf, kept, state, carry, *, beside):
  del state, carry, beside
  (keys,) = kept
  counts = counting.count_true((keys > jnp.uint32(0),), local=leaf.local)
  return counts[:, 0]


def _ranked(vary, carry):
  share, (search,) = carry
  rank = ranks.part(share, counting.carried(vary))
  search = selection.of_rank(search, rank)
  return (share, selection.stacked([search])), jnp.asarray(True)


def _counts(*, beside):
  del beside
  return (
    transform.Count(_vary, _ranked, once=True),
    *map(_counted, narrowing.rounds(exact=True)),
  )


def _counted(kind: narrowing.Round) -> transform.Count:
  def reduce(leaf, kept, state, carry, *, beside):
    del state, beside
    return kind.count(kept, leaf, carry[1])

  def finish(total, carry):
    searches, done = kind.after(total, carry[1])
    return (carry[0], searches), done

  def needed(carry):
    return kind.needed(carry[1])

  return transform.Count(reduce, finish, needed=needed)


def _update(leaf, deltas, base, state, carry, *, beside):
  del base, state
  share, (search,) = carry
  keep = selection.keep_keys(_keys(deltas), leaf, search)
  keep = keep | (share >= jnp.float32(1))
  kept = tuple(jnp.where(keep, d, jnp.zeros_like(d)) for d in deltas)
  return (*kept, *deltas) if beside else kept


_VARIED = transform.register_step(
  transform.Step(
    name="keep_varied",
    update=_update,
    start=_start,
    counts=_counts,
    kept=_kept,
    scope=lambda **_: "leaf",
  )
)
