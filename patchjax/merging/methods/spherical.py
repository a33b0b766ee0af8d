"""Means on spheres: slerp, nuslerp, multislerp, karcher.

Each leaf is one vector. What these methods give is a combination of the
contributors with coefficients that depend on lengths and angles alone, so one
read of the leaves for their Gram matrix is enough, and one for the sum.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from patchjax.merging import gram
from patchjax.merging.methods import options
from patchjax.patches import transform
from patchjax.patches.transform import Transform

Array = Any

RESOLVED = 5e-4
"""Angles, and sums of unit vectors, that float32 products tell from zero."""


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
    >>> pj.merge(None, [a, b], pj.merging.slerp())["w"].round(4).tolist()
    [1.4142, 1.4142]
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


def _like(number: Any, dots: Array) -> Array:
  return jnp.asarray(number).astype(dots.dtype)


def _lengths(dots: Array) -> Array:
  """Square roots of the diagonal, with a derivative of 0 at 0."""
  squares = jnp.diagonal(dots)
  some = squares > _like(0, dots)
  root = jnp.sqrt(jnp.where(some, squares, jnp.ones_like(squares)))
  return jnp.where(some, root, jnp.zeros_like(root))


def _slerp_ends(dots, state):
  lengths = _lengths(dots)
  # A length that is no more than this counts as 1.
  lengths = jnp.where(
    lengths > _like(1e-8, dots), lengths, jnp.ones_like(lengths)
  )
  one = _like(1, dots)
  cosine = jnp.clip(dots[0, 1] / (lengths[0] * lengths[1]), -one, one)
  linear = jnp.abs(cosine) > _like(0.9995, dots)
  return _great_circle(_like(state["t"], dots), cosine, linear)


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
    >>> pj.merge(None, [a, b], method)["w"].round(4).tolist()
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
  cancel = jnp.abs(mass) < _like(1e-6, mass)
  share = second / jnp.where(cancel, jnp.ones_like(mass), mass)
  return jnp.where(cancel, _like(0.5, share), share)


def _nuslerp_ends(share, squares, product):
  floor = _like(1e-7, product)
  lengths = (jnp.maximum(_root(square), floor) for square in squares)
  one = _like(1, product)
  cosine = product / functools.reduce(jnp.multiply, lengths)
  cosine = jnp.clip(cosine, -one, one)
  linear = one - cosine * cosine <= _like(1e-16, product)
  return _great_circle(_like(share, product), cosine, linear)


def _root(square):
  some = square > _like(0, square)
  root = jnp.sqrt(jnp.where(some, square, jnp.ones_like(square)))
  return jnp.where(some, root, jnp.zeros_like(root))


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

  share = jnp.full_like(a, _like(share, a)) if axis is None else share
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


def multislerp(
  *,
  weights: Any = 1.0,
  normalize: bool = True,
  epsilon: Any = 1e-8,
  task_vectors: bool = False,
) -> Transform:
  """Returns the weighted mean direction, times the weighted mean length.

  https://goddard.blog/posts/multislerp-wow-what-a-cool-idea, as in mergekit:
  from `m`, the normalized weighted mean of the unit vectors `u_i`, a step
  along `T = sum_i w_i (u_i - (u_i . m) m)`. That step is zero, whatever the
  weights, since m is parallel to `sum_i w_i u_i`; so the result is
  `m sum_i w_i ||x_i||`, and only `karcher` goes on to the mean on the sphere.

  Where the directions cancel (to less than 5e-4, which is what inner products
  in float32 tell from zero) it is `sum_i w_i x_i` for two contributors; for
  more the result is not finite, which `merge` reports (mergekit raises). One
  contributor is the result.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.
    normalize: whether weights are divided by their sum.
    epsilon: added to lengths before division, and the length of the mean that
      counts as none; traced.
    task_vectors: whether what is turned are the contributors' task vectors,
      and the base is added; so in mergekit if a base is given.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([2, 0])}, {"w": np.float32([0, 2])}
    >>> pj.merge(None, [a, b], pj.merging.multislerp())["w"].round(4).tolist()
    [1.4142, 1.4142]
  """
  numbers = {"weights": options.numbers(weights), "epsilon": epsilon}
  space = "deltas" if task_vectors else "params"
  return Transform.of(_MULTISLERP, numbers, normalize=normalize, space=space)


def _multislerp(dots, state, k, *, normalize, space):
  del space
  if k == 1:
    return (jnp.ones((), dots.dtype),)
  weights = gram.weights_of(state, k, normalize=normalize)
  weights = weights.astype(dots.dtype)
  epsilon = _like(state["epsilon"], dots)
  lengths = _lengths(dots)
  # Of the mean direction, before it is normalized.
  shares = weights / (lengths + epsilon)
  length = _root(_quadratic(shares, dots))
  none = length < jnp.maximum(epsilon, _like(RESOLVED, dots))
  scale = jnp.sum(weights * lengths)
  round_ = shares * scale / jnp.where(none, jnp.ones_like(length), length)
  if k == 2:
    return jnp.where(none, weights, round_)
  # Nothing but zeros has no direction, and needs none.
  lost = none & (lengths > _like(0, dots)).any()
  straight = jnp.where(lost, _like(jnp.nan, dots), _like(0, dots))
  return jnp.where(none, straight, round_)


def _quadratic(x, dots):
  return jnp.sum(x[:, None] * dots * x[None, :])


_MULTISLERP = gram.combination("multislerp", _multislerp, space=_given_space)


def karcher(
  *, weights: Any = 1.0, iterations: int = 10, tolerance: Any = 1e-5
) -> Transform:
  """Returns the Riemannian mean of directions, times the mean length.

  https://arxiv.org/abs/2603.04972, as in mergekit: from the normalized mean
  of the unit vectors, `u <- exp_u(sum_i a_i log_u(u_i))`, until the step is
  shorter than `tolerance`. A contributor no longer than `tolerance` has no
  direction, and counts in the mean length only; one that is nearer to u than
  `tolerance` is left out of the step. Where the directions cancel, u starts
  at the first.

  Angles come from a Gram matrix in float32, which tells no angle below 5e-4
  from zero. At the default tolerance further steps are therefore made, which
  only bring the result nearer to the mean.

  Args:
    weights: one a contributor, or one for all, divided by their sum; mergekit
      has equal ones. Traced, differentiable.
    iterations: how many steps at most; static.
    tolerance: see above; traced.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1, 0])}, {"w": np.float32([0, 3])}
    >>> pj.merge(None, [a, b], pj.merging.karcher())["w"].round(4).tolist()
    [1.4142, 1.4142]
  """
  numbers = {"weights": options.numbers(weights), "tolerance": tolerance}
  return Transform.of(_KARCHER, numbers, iterations=iterations)


def _karcher(dots, state, k, *, iterations):
  if k == 1:
    return (jnp.ones((), dots.dtype),)
  one, zero = _like(1, dots), _like(0, dots)
  tolerance = _like(state["tolerance"], dots)
  share = gram.weights_of(state, k, normalize=True).astype(dots.dtype)
  lengths = _lengths(dots)
  known = lengths > tolerance
  safe = jnp.where(known, lengths, jnp.ones_like(lengths))
  # From here on in terms of the unit vectors of those that have a direction.
  units = dots / (safe[:, None] * safe[None, :])
  part = jnp.where(known, share, jnp.zeros_like(share))
  mass = jnp.sum(part)
  part = part / jnp.where(mass == zero, one, mass)
  first = (jnp.arange(k) == jnp.argmax(known)).astype(dots.dtype)
  length = _root(_quadratic(part, units))
  lost = length < jnp.maximum(tolerance, _like(RESOLVED, dots))
  mean = jnp.where(lost, first, part / jnp.where(lost, one, length))

  def step(carry, _):
    mean, done = carry
    cosine = jnp.clip(jnp.sum(units * mean[None, :], axis=1), -one, one)
    flat = jnp.abs(cosine) >= one
    angle = jnp.arccos(jnp.where(flat, zero, cosine))
    angle = jnp.where(flat, jnp.where(cosine > zero, zero, jnp.pi), angle)
    near = (angle < tolerance) & (tolerance > _like(RESOLVED, dots))
    # angle / sin(angle), which is 1 at 0.
    bend = jnp.where(flat, one, angle / jnp.where(flat, one, jnp.sin(angle)))
    pull = jnp.where(near | ~known, zero, part * bend)
    move = pull - jnp.sum(pull * cosine) * mean
    length = _root(_quadratic(move, units))
    done = done | (length < tolerance)
    still = length == zero
    sinc = jnp.sin(length) / jnp.where(still, one, length)
    new = jnp.cos(length) * mean + jnp.where(still, one, sinc) * move
    size = _root(_quadratic(new, units))
    new = new / jnp.where(size == zero, one, size)
    return (jnp.where(done, mean, new), done), None

  start = (mean, jnp.asarray(False))
  (mean, _), _ = lax.scan(step, start, length=iterations)
  out = mean / safe * jnp.sum(share * lengths)
  return jnp.where(known, out, jnp.zeros_like(out))


_KARCHER = gram.combination("karcher", _karcher)
