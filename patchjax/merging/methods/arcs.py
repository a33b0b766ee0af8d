"""Slerp and nuslerp: along the great circle between two contributors.

Each leaf is one vector. The result is a combination of the two with
coefficients that depend on lengths and the angle alone, so one read of the
leaves for their Gram matrix is enough, and one for the sum.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp

from patchjax.merging import gram
from patchjax.merging.methods import lengths, options
from patchjax.merging.methods.lengths import like, root
from patchjax.patches import transform
from patchjax.patches.transform import Transform

Array = Any


def slerp(*, t: Any = 0.5, from_base: bool = False) -> Transform:
  """Returns the point at t on the great circle between two contributors.

  `sin((1-t) W) / sin W * x_0 + sin(t W) / sin W * x_1`, W the angle between
  them (Shoemake 1985, https://doi.org/10.1145/325334.325242, section 3.3), for
  each leaf as one vector. The arc is that of the directions, and the leaves
  are not normalized: so in mergekit and in what is commonly called slerp of
  models. Where `|cos W| > 0.9995` the interpolation is linear.

  Args:
    t: 0 is the first contributor, 1 the second; one number, or one a leaf
      (`per_leaf`); traced, differentiable.
    from_base: whether the first is the base, and there is one contributor.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([2, 0])}, {"w": np.float32([0, 2])}
    >>> print(pj.merge(None, [a, b], pj.merging.slerp())["w"].round(4))
    [1.4142 1.4142]
  """
  return Transform.of(_SLERP_BASE if from_base else _SLERP, {"t": t})


def _exactly(k: int, wanted: int, what: str) -> None:
  if k != wanted:
    raise ValueError(f"{what} takes {wanted} contributors, got {k}")


def _great_circle(t: Array, cosine: Array, linear: Array) -> tuple:
  """Returns the coefficients of both ends of an arc, or of a line."""
  # Nothing that is not taken may be infinite: its derivative would be NaN.
  angle = jnp.arccos(jnp.where(linear, jnp.zeros_like(cosine), cosine))
  sine, rest = jnp.sin(angle), jnp.ones_like(t) - t
  first = jnp.where(linear, rest, jnp.sin(rest * angle) / sine)
  second = jnp.where(linear, t, jnp.sin(t * angle) / sine)
  return first, second


def _slerp_ends(dots, state):
  sizes = lengths.of(dots)
  # A length that is no more than this counts as 1.
  sizes = jnp.where(sizes > like(1e-8, dots), sizes, jnp.ones_like(sizes))
  one = like(1, dots)
  cosine = jnp.clip(dots[0, 1] / (sizes[0] * sizes[1]), -one, one)
  linear = jnp.abs(cosine) > like(0.9995, dots)
  return _great_circle(like(state["t"], dots), cosine, linear)


def _slerp(dots, state, k):
  _exactly(k, 2, "slerp between contributors")
  return _slerp_ends(dots, state)


def _slerp_from_base(dots, state, k):
  _exactly(k, 1, "slerp from the base")
  first, second = _slerp_ends(dots, state)
  return second, first  # the base's coefficient is last


_SLERP = gram.combination("slerp", _slerp)
_SLERP_BASE = gram.combination(
  "slerp_from_base", _slerp_from_base, with_base=True
)


def nuslerp(
  *,
  weights: Any = 1.0,
  flatten: bool = True,
  row_wise: bool = False,
  task_vectors: bool = False,
  flavour: Literal["paper", "mergekit"] = "paper",
) -> Transform:
  """Returns slerp of two contributors, by weights: `t = w_2 / (w_1 + w_2)`.

  mergekit's method (https://github.com/arcee-ai/mergekit, "NuSLERP"); there
  is no paper. It is linear only where the two are parallel, and t is 1/2
  where the weights cancel.

  Args:
    weights: one a contributor; traced, differentiable.
    flatten: whether a leaf is one vector. Otherwise each of its columns is
      one, along the first axis.
    row_wise: without `flatten`, whether it is each of its rows, along the
      last axis.
    task_vectors: whether what is turned are the contributors' task vectors,
      and the base is added; so in mergekit if a base is given.
    flavour: "paper" is what mergekit's documentation says; "mergekit", what
      its code does: there `row_wise` has the opposite meaning.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}
    >>> method = pj.merging.nuslerp(weights=[2, 1])
    >>> merged = pj.merge(None, [a, b], method)["w"]
    >>> np.float64(merged).round(3).tolist()
    [0.866, 0.5]
  """
  options.check_flavour(flavour)
  numbers = {"weights": options.numbers(weights)}
  space = "deltas" if task_vectors else "params"
  if flatten:
    return Transform.of(_NUSLERP, numbers, space=space)
  rows = row_wise if flavour == "paper" else not row_wise
  return Transform.of(_NUSLERP_AXIS, numbers, space=space, rows=rows)


def _given_space(*, space="params", **others):
  del others
  return space


def _share(state, k):
  """Weight of the second of two, as a share of both."""
  _exactly(k, 2, "nuslerp")
  first, second = gram.weights_of(state, k)
  mass = first + second
  cancel = jnp.abs(mass) < like(1e-6, mass)
  share = second / jnp.where(cancel, jnp.ones_like(mass), mass)
  return jnp.where(cancel, like(0.5, share), share)


def _nuslerp_ends(share, squares, product):
  floor = like(1e-7, product)
  first, second = (jnp.maximum(root(square), floor) for square in squares)
  one = like(1, product)
  cosine = product / (first * second)
  cosine = jnp.clip(cosine, -one, one)
  linear = one - cosine * cosine <= like(1e-16, product)
  return _great_circle(like(share, product), cosine, linear)


def _nuslerp(dots, state, k, *, space):
  del space
  squares = (dots[0, 0], dots[1, 1])
  return _nuslerp_ends(_share(state, k), squares, dots[0, 1])


def _nuslerp_axis(leaf, vectors, base, state, shared, *, space, rows):
  del base, shared, space
  share = _share(state, len(vectors))
  a, b = vectors
  axis = None if not leaf.shape else -1 if rows else 0

  def dot(x, y):
    return jnp.sum(x * y, axis=axis, keepdims=True)

  ends = _nuslerp_ends(share, (dot(a, a), dot(b, b)), dot(a, b))
  return functools.reduce(
    jnp.add, (transform.rounded(c * x) for c, x in zip(ends, vectors))
  )


_NUSLERP = gram.combination("nuslerp", _nuslerp, space=_given_space)
_NUSLERP_AXIS = transform.register_step(
  transform.Step(
    name="nuslerp_axis",
    update=_nuslerp_axis,
    reducing=True,
    space=_given_space,
  )
)
