"""The steps merges are made of: elect_sign, the means and sums, scale.

Each returns a transform for `pj.chain`; `trim` is in `patchjax.patches`, since
encodings use it too. Deltas are the contributors' task vectors
`f32(x) - f32(base)`; where nothing but means is computed, their parameters.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from patchjax.patches import counting, transform


def elect_sign(
  *,
  method: Literal["total", "frequency"] = "total",
  zero: Literal["majority", "positive"] = "majority",
  weights: Any = None,
) -> transform.Transform:
  """Returns the step that drops entries against the elected sign.

  Second step of TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708).

  Args:
    method: "total": the sign of the sum of the contributors' entries;
      "frequency": the sign of the sum of their signs.
    zero: the sign of an entry whose sum is zero. "majority": the sign most
      entries of the whole model have (and minus if that is a tie too), as in
      the paper's code, for one more pass; "positive", as in mergekit.
    weights: one a contributor, to multiply the entries before the election
      *and after it* (mergekit does, for TIES); by default none.

  Example:
    >>> import patchjax as pj
    >>> pj.merging.elect_sign()
    elect_sign(method='total', zero='majority')
  """
  if method not in ("total", "frequency"):
    raise ValueError(f"method must be 'total' or 'frequency', got {method!r}")
  if zero not in ("majority", "positive"):
    raise ValueError(f"zero must be 'majority' or 'positive', got {zero!r}")
  return transform.Transform.of(
    _ELECT, {"weights": weights}, method=method, zero=zero
  )


def _weighted(deltas, weights):
  return tuple(
    transform.rounded(d * _as(w, d)) for d, w in zip(deltas, weights)
  )


def _by_weight(deltas, state):
  if "weights" not in state:
    return deltas
  weights = transform.per_contributor(state["weights"], len(deltas))
  return _weighted(deltas, weights)


def _as(number, like):
  return jnp.asarray(number).astype(like.dtype)


def balance(deltas: Any, state: Any, *, method: str) -> Any:
  """Returns the sums whose signs are elected.

  Args:
    deltas: of the contributors, one array each.
    state: of the step `elect_sign`.
    method: see `elect_sign`.
  """
  return _balance(_by_weight(deltas, state), method)


def _balance(deltas, method):
  votes = deltas if method == "total" else tuple(map(jnp.sign, deltas))
  return functools.reduce(jnp.add, votes)


def _elect_start(state, shapes, k, *, method, zero):
  del state, shapes, method, zero
  return np.asarray(k == 0)


def _elect_reduce(leaf, deltas, state, carry, *, method, zero):
  del carry, zero
  sums = balance(deltas, state, method=method)
  masks = (sums > _as(0, sums), sums < _as(0, sums))
  return counting.count_true(masks, local=leaf.local)


def _elect_finish(total, carry):
  del carry
  total = counting.carried(total)
  positive, negative = total[:, 0], total[:, 1]
  more = counting.at_least(positive, negative) & (positive != negative).any()
  return more, jnp.asarray(True)


def _elect(leaf, deltas, base, state, shared, *, method, zero):
  del leaf, base
  deltas = _by_weight(deltas, state)
  sums = _balance(deltas, method)
  nought = _as(0, sums)
  tied = jnp.asarray(True) if zero == "positive" else shared
  up = (sums > nought) | ((sums == nought) & tied)
  return tuple(
    jnp.where(jnp.where(up, d > nought, d < nought), d, jnp.zeros_like(d))
    for d in deltas
  )


_ELECT = transform.register_step(
  transform.Step(
    name="elect_sign",
    update=_elect,
    start=_elect_start,
    counts=transform.one_count(_elect_reduce, _elect_finish),
    scope=lambda *, method, zero: "none" if zero == "positive" else "tree",
  )
)


def disjoint_mean(
  *, weights: Any = None, in_sum: bool = True
) -> transform.Transform:
  """Returns the step that averages, in each entry, those that are not zero.

  Third step of TIES: `sum_i w_i d_i / sum_i w_i [d_i != 0]`, and 0 where all
  are zero.

  Args:
    weights: w, one a contributor; by default 1.
    in_sum: whether the entries are still to be multiplied by the weights, or
      already were (`elect_sign(weights=...)`).
  """
  return transform.Transform.of(_DISJOINT, {"weights": weights}, in_sum=in_sum)


def _disjoint(leaf, deltas, base, state, shared, *, in_sum):
  del leaf, base, shared
  weights = transform.per_contributor(state.get("weights", 1.0), len(deltas))
  zero = jnp.zeros_like(deltas[0])
  mass = functools.reduce(
    jnp.add,
    (
      jnp.where(d != _as(0, d), _as(w, d), zero)
      for d, w in zip(deltas, weights, strict=True)
    ),
  )
  total = functools.reduce(
    jnp.add, _by_weight(deltas, state) if in_sum else deltas
  )
  # The inner `where` keeps 0/0 out of the derivative as well.
  safe = jnp.where(mass != _as(0, mass), mass, jnp.ones_like(mass))
  return total / safe


_DISJOINT = transform.register_step(
  transform.Step(name="disjoint_mean", update=_disjoint, reducing=True)
)


def weighted_sum(
  *,
  weights: Any = 1.0,
  normalize: bool = False,
  space: Literal["deltas", "params"] | None = None,
) -> transform.Transform:
  """Returns the step `sum_i w_i d_i`.

  Args:
    weights: w, one a contributor or one for all.
    normalize: whether to divide by the sum of the weights.
    space: what is summed: task vectors ("deltas") or parameters. By default
      task vectors; where weights are normalized the sums are the same, and
      whatever the other steps of a chain need is taken.
  """
  if space not in ("deltas", "params", None):
    raise ValueError(f"space must be 'deltas' or 'params', got {space!r}")
  options = {"normalize": normalize} | ({"space": space} if space else {})
  return transform.Transform.of(_SUM, {"weights": weights}, **options)


def _sum(leaf, deltas, base, state, shared, *, normalize, space=None):
  del leaf, base, shared, space
  weights = transform.per_contributor(state["weights"], len(deltas))
  weights = tuple(_as(w, deltas[0]) for w in weights)
  if normalize:
    # Weights are divided, not their sum: an array divided by a number is
    # compiled to a product in some places and to a quotient in others.
    mass = functools.reduce(jnp.add, weights)
    weights = tuple(w / mass for w in weights)
  return functools.reduce(jnp.add, _weighted(deltas, weights))


def _sum_space(*, normalize, space=None):
  return space or ("either" if normalize else "deltas")


_SUM = transform.register_step(
  transform.Step(
    name="weighted_sum",
    update=_sum,
    reducing=True,
    space=_sum_space,
    carries_nonfinite=True,
  )
)


def mean() -> transform.Transform:
  """Returns the step that averages the contributors' deltas."""
  return transform.Transform.of(_MEAN, {})


def _mean(leaf, deltas, base, state, shared):
  del leaf, base, state, shared
  total = functools.reduce(jnp.add, deltas)
  return transform.rounded(total * _as(1 / len(deltas), total))


_MEAN = transform.register_step(
  transform.Step(
    name="mean",
    update=_mean,
    reducing=True,
    space=lambda: "either",
    carries_nonfinite=True,
  )
)


def scale(scale: Any) -> transform.Transform:
  """Returns the step that multiplies deltas by a number.

  Args:
    scale: the papers' lambda; traced and differentiable. Before the reducing
      step it may be one a contributor.

  Example:
    >>> import patchjax as pj
    >>> pj.merging.scale(0.5)
    scale(scale=0.5)
  """
  return transform.Transform.of(_SCALE, {"scale": scale})


def _scale(leaf, deltas, base, state, shared):
  del leaf, base, shared
  scales = transform.per_contributor(state["scale"], len(deltas))
  return _weighted(deltas, scales)


_SCALE = transform.register_step(
  transform.Step(name="scale", update=_scale, carries_nonfinite=True)
)
