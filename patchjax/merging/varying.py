"""keep_varied: keep the entries in which contributors differ most."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from patchjax.merging import ranks
from patchjax.patches import counting, selection, shares, transform


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
  return selection.magnitude_keys(variance(deltas))


def _start(state, shapes, k, *, beside):
  del k, beside
  (shape,) = shapes
  widths = selection.key_widths(shapes)
  # The rank of all entries, until it is known how many of them vary.
  rank = shares.entries_of(state["density"], int(np.prod(shape)))
  share = jnp.asarray(state["density"]).astype(jnp.float32)
  return np.asarray(True), share, selection.search(rank, widths)


def _reduce(leaf, deltas, state, carry, *, beside):
  del state, beside
  keys = _keys(deltas)
  first = jnp.asarray(carry[0])
  counts = selection.count_at_least(keys, leaf, (carry[2],))[0]
  vary = counting.count_true((keys > jnp.uint32(0),), local=leaf.local)
  return counts, jnp.where(first, vary[:, 0], jnp.zeros_like(vary[:, 0]))


def _finish(total, carry, *, beside):
  del beside
  counts, vary = total
  first, share, search = carry
  rank = ranks.part(share, counting.carried(vary))
  rank = jnp.where(first, rank, search.k)
  search = selection.narrow(counts, dataclasses.replace(search, k=rank))
  return (jnp.asarray(False), share, search), search.done


def _update(leaf, deltas, base, state, carry, *, beside):
  del base, state
  _, share, search = carry
  keep = selection.keep_keys(_keys(deltas), leaf, search)
  keep = keep | (share >= jnp.float32(1))
  kept = tuple(jnp.where(keep, d, jnp.zeros_like(d)) for d in deltas)
  return (*kept, *deltas) if beside else kept


_VARIED = transform.register_step(
  transform.Step(
    name="keep_varied",
    update=_update,
    start=_start,
    reduce=_reduce,
    finish=_finish,
    scope=lambda **_: "leaf",
  )
)
