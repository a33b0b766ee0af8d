"""Means of more contributors on the sphere: multislerp and karcher.

Each leaf is one vector. As in `arcs`, the coefficients come from the Gram
matrix of the contributors: a mean on the sphere stays in their span.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from patchjax.merging import gram
from patchjax.merging.methods import lengths, options
from patchjax.merging.methods.lengths import like
from patchjax.patches.transform import Transform

STEP_RESOLVED = 2e-6
"""Steps to the mean that can be told from none."""


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
    >>> print(pj.merge(None, [a, b], pj.merging.multislerp())["w"].round(4))
    [1.4142 1.4142]
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
  epsilon = like(state["epsilon"], dots)
  sizes = lengths.of(dots)
  # Of the mean direction, before it is normalized.
  shares = weights / (sizes + epsilon)
  length = lengths.of_sum(shares, dots)
  none = length < jnp.maximum(epsilon, like(lengths.RESOLVED, dots))
  scale = jnp.sum(weights * sizes)
  round_ = shares * scale / jnp.where(none, jnp.ones_like(length), length)
  if k == 2:
    return jnp.where(none, weights, round_)
  # Nothing but zeros has no direction, and needs none.
  lost = none & (sizes > like(0, dots)).any()
  straight = jnp.where(lost, like(jnp.nan, dots), like(0, dots))
  return jnp.where(none, straight, round_)


def _space(*, space="params", **others):
  del others
  return space


_MULTISLERP = gram.combination("multislerp", _multislerp, space=_space)


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

  Angles come from a Gram matrix in float32, which tells none below 5e-4 from
  zero: with a smaller tolerance, as by default, no contributor is left out of
  a step. The length of a step is known to about 1e-6.

  Args:
    weights: one a contributor, or one for all, divided by their sum; mergekit
      has equal ones. Traced, differentiable.
    iterations: how many steps at most; static.
    tolerance: see above; traced.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1, 0])}, {"w": np.float32([0, 3])}
    >>> print(pj.merge(None, [a, b], pj.merging.karcher())["w"].round(4))
    [1.4142 1.4142]
  """
  numbers = {"weights": options.numbers(weights), "tolerance": tolerance}
  return Transform.of(_KARCHER, numbers, iterations=iterations)


def _karcher(dots, state, k, *, iterations):
  if k == 1:
    return (jnp.ones((), dots.dtype),)
  one, zero = like(1, dots), like(0, dots)
  tolerance = like(state["tolerance"], dots)
  share = gram.weights_of(state, k, normalize=True).astype(dots.dtype)
  sizes = lengths.of(dots)
  known = sizes > tolerance
  safe = jnp.where(known, sizes, jnp.ones_like(sizes))
  # From here on in terms of the unit vectors of those that have a direction.
  units = dots / (safe[:, None] * safe[None, :])
  part = jnp.where(known, share, jnp.zeros_like(share))
  mass = jnp.sum(part)
  part = part / jnp.where(mass == zero, one, mass)
  one_first = (jnp.arange(k) == jnp.argmax(known)).astype(dots.dtype)
  length = lengths.of_sum(part, units)
  lost = length < jnp.maximum(tolerance, like(lengths.RESOLVED, dots))
  start = jnp.where(lost, one_first, part / jnp.where(lost, one, length))
  # The start is parallel to `sum_i a_i u_i`, so that the pulls of a flat
  # space, which are all but some parts in a thousand, cancel: what is left is
  # computed without them, or it would be lost in rounding. For that, the mean
  # is `alpha start + nu`, and its weights `length start + rest`.
  length = jnp.where(lost, zero, length)
  rest = jnp.where(lost, part, jnp.zeros_like(part))
  told = tolerance > like(STEP_RESOLVED, dots)

  def step(carry, _):
    alpha, nu, done = carry
    mean = alpha * start + nu
    cosine = jnp.clip(jnp.sum(units * mean[None, :], axis=1), -one, one)
    flat = jnp.abs(cosine) >= one
    angle = jnp.arccos(jnp.where(flat, zero, cosine))
    angle = jnp.where(flat, jnp.where(cosine > zero, zero, jnp.pi), angle)
    near = (angle < tolerance) & (tolerance > like(lengths.RESOLVED, dots))
    # angle / sin(angle), which is 1 at 0.
    bend = jnp.where(flat, one, angle / jnp.where(flat, one, jnp.sin(angle)))
    bend = jnp.where(near, zero, bend)
    pull = rest + part * (bend - one)
    back = jnp.sum(pull * cosine)
    same = jnp.sum(start * cosine)
    to_start = length * (one - same * alpha) - back * alpha
    to_rest = pull - (length * same + back) * nu
    size = lengths.of_sum(to_start * start + to_rest, units)
    done = done | (told & (size < tolerance))
    still = size == zero
    sinc = jnp.sin(size) / jnp.where(still, one, size)
    sinc = jnp.where(still, one, sinc)
    new = jnp.cos(size) * alpha + sinc * to_start
    new_nu = jnp.cos(size) * nu + sinc * to_rest
    norm = lengths.of_sum(new * start + new_nu, units)
    norm = jnp.where(norm == zero, one, norm)
    new = (
      jnp.where(done, alpha, new / norm),
      jnp.where(done, nu, new_nu / norm),
    )
    return (*new, done), None

  carry = (one, jnp.zeros_like(start), jnp.asarray(False))
  (alpha, nu, _), _ = lax.scan(step, carry, length=iterations)
  out = (alpha * start + nu) / safe * jnp.sum(share * sizes)
  return jnp.where(known, out, jnp.zeros_like(out))


_KARCHER = gram.combination("karcher", _karcher)
