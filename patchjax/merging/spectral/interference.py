"""WUDI: the merged matrix that each task's own inputs see least changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from patchjax.merging import inputs, running, steps
from patchjax.merging.methods import options
from patchjax.merging.spectral import matrices as mats
from patchjax.merging.spectral.matrices import Layout
from patchjax.patches import meshes, transform
from patchjax.patches.diff import diff
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform, chain
from patchjax.trees.names import flatten

Array = Any


def wudi(
  *,
  solver: Literal["closed", "adam"] = "closed",
  scale: Any = 1.0,
  ridge: Any = 0.0,
  learning_rate: Any = 1e-5,
  iterations: int = 300,
  others: Literal["base", "mean"] = "base",
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns WUDI: the merge that interferes least with each task.

  Cheng et al. 2025 (https://arxiv.org/abs/2503.08099, equation 12). The rows
  of a task vector d_i span about the inputs that its task has, so the merged
  task vector t is to act on them as d_i does: it minimises
  `sum_i |(t - d_i) d_i^T|^2 / |d_i|^2`.

  The authors' code (nathanielyvo/WUDI-Merging) takes 300 steps of Adam from
  the sum of the task vectors; no entry moves by much more than 300 times the
  learning rate, and that is far from the minimum. "closed" is the minimum:
  `t G = R` with `G = sum_i d_i^T d_i / |d_i|^2` and
  `R = sum_i d_i d_i^T d_i / |d_i|^2`, solved by the singular values of the
  task vectors below each other, and of all minima the one nearest to the
  sum. In directions that no task has much of it may be long; `ridge` keeps it
  near the sum there. `wudi_difference` says how far the two are apart. Tasks
  whose inputs are orthogonal are recovered exactly by both. Derivatives of
  "closed" in the contributors are NaN where singular values are equal.

  Args:
    solver: "closed", or "adam": the authors' steps.
    scale: of the result; traced, differentiable; 1 in the paper.
    ridge: of "closed": adds `ridge * mean eigenvalue of G * |t - sum_i d_i|^2`
      to what is minimised; traced, differentiable. 0 for WUDI itself.
    learning_rate: of Adam; traced. 1e-5 in the code.
    iterations: of Adam; static. 300 in the code.
    others: what becomes of leaves with fewer than two axes: they stay at the
      base, as all but weights of linear layers do in the authors' code, or
      get the mean, as in FusionBench. Choose leaves (of embeddings, say) by
      a mapping of selectors to methods.
    layout: which axes of a leaf are inputs: "in_out" of a kernel of flax,
      "out_in" in PyTorch.
    in_axes: how many axes of a leaf are inputs.
    batch_axes: how many leading axes only number matrices; by default all but
      the last `in_axes + 1`.

  Raises:
    ValueError: if an option is unknown, or the number of steps is negative.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> a, b = ({"w": np.float32(x)} for x in ([[1, 2], [0, 0]],
    ...                                        [[0, 0], [3, 4]]))
    >>> np.round(pj.merge(base, [a, b], pj.merging.wudi())["w"], 4).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
  """
  options.check("solver", solver, ("closed", "adam"))
  options.check("others", others, ("base", "mean"))
  if iterations < 0:
    raise ValueError(f"iterations must not be negative, got {iterations}")
  axes = mats.view(layout, in_axes, batch_axes)
  if solver == "closed":
    step = Transform.of(_CLOSED, {"ridge": ridge}, others=others, **axes)
  else:
    numbers = {"learning_rate": learning_rate}
    step = Transform.of(
      _ADAM, numbers, iterations=iterations, others=others, **axes
    )
  return chain(step, steps.scale(scale))


def _normed(tasks: tuple[Array, ...]) -> list[Array]:
  """Task vectors of length one, or none."""
  found = []
  for x in tasks:
    square = jnp.sum(x * x, (-2, -1), keepdims=True)
    none = square == jnp.zeros_like(square)
    found.append(x / jnp.sqrt(jnp.where(none, jnp.ones_like(square), square)))
  return found


def _closed(leaf, deltas, base, state, shared, *, others, **axes):
  del base, shared

  def function(tasks, ridge):
    # The sum, and how far from it the minimum is. Nothing is squared: with d
    # the task vectors of length one below each other, d = U S V^T and
    # G = V S^2 V^T.
    outs = tasks[0].shape[-2]
    units = _normed(tasks)
    total = functools.reduce(jnp.add, tasks)
    u, s, vt = mats.svd(jnp.concatenate(units, -2))
    left = functools.reduce(
      jnp.add,
      (
        mats.dot(x - total, mats.dot(mats.transposed(unit), part))
        for x, unit, part in zip(
          tasks, units, jnp.split(u, len(tasks), -2), strict=True
        )
      ),
    )
    shape = outs * len(tasks), tasks[0].shape[-1]
    there = s > mats.floor_of(s, shape)
    square = jnp.sum(s * s, -1, keepdims=True)
    mean = square / jnp.asarray(tasks[0].shape[-1], s.dtype)
    safe = jnp.where(there, s * s, jnp.ones_like(s))
    safe = safe + jnp.asarray(ridge).astype(s.dtype) * mean
    factors = jnp.where(there, s / safe, jnp.zeros_like(s))
    return total + mats.dot(left * factors[..., None, :], vt)

  ridge = state["ridge"]
  return mats.merged(function, leaf, deltas, axes, ridge, others=others)


_CLOSED = transform.register_step(
  transform.Step(name="least_interference", update=_closed, reducing=True)
)

# PyTorch's. Optax's own counts steps in an integer, which strict promotion of
# dtypes refuses.
_BETAS = (0.9, 0.999)


def _adam(leaf, deltas, base, state, shared, *, iterations, others, **axes):
  del base, shared

  def function(tasks, rate):
    units = _normed(tasks)
    gram = functools.reduce(
      jnp.add, (mats.dot(mats.transposed(unit), unit) for unit in units)
    )
    right = functools.reduce(
      jnp.add,
      (
        mats.dot(x, mats.dot(mats.transposed(unit), unit))
        for x, unit in zip(tasks, units, strict=True)
      ),
    )
    total = functools.reduce(jnp.add, tasks)

    def number(x):
      return jnp.asarray(x).astype(total.dtype)

    def step(_, carry):
      found, first, second, powers = carry
      gradient = number(2) * (mats.dot(found, gram) - right)
      first = number(0.9) * first + number(0.1) * gradient
      second = number(0.999) * second + number(0.001) * gradient * gradient
      powers = tuple(x * number(b) for x, b in zip(powers, _BETAS, strict=True))
      mean, square = (
        x / (number(1) - power)
        for x, power in zip((first, second), powers, strict=True)
      )
      move = mean / (jnp.sqrt(square) + number(1e-8))
      return found - number(rate) * move, first, second, powers

    zero = jnp.zeros_like(total)
    carry = total, zero, zero, (number(1), number(1))
    return jax.lax.fori_loop(0, iterations, step, carry)[0]

  rate = state["learning_rate"]
  return mats.merged(function, leaf, deltas, axes, rate, others=others)


_ADAM = transform.register_step(
  transform.Step(name="less_interference", update=_adam, reducing=True)
)


# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WudiDifference:
  """How far the two solvers of WUDI are apart on a leaf.

  Attributes:
    distance: between them, as a share of the length of the closed form.
    start: what WUDI minimises, at the sum of the task vectors.
    adam: and after the steps of Adam.
    closed: and at the minimum.
  """

  distance: float
  start: float
  adam: float
  closed: float


def wudi_difference(
  base: Any,
  contributors: Sequence[Any],
  *,
  ridge: float = 0.0,
  learning_rate: float = 1e-5,
  iterations: int = 300,
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
  only: Any = None,
) -> dict[str, WudiDifference]:
  """Returns how far the closed form of WUDI is from the authors' steps.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    ridge: see `wudi` (https://arxiv.org/abs/2503.08099).
    learning_rate: see `wudi`.
    iterations: see `wudi`.
    layout: see `wudi`.
    in_axes: see `wudi`.
    batch_axes: see `wudi`.
    only: selector of the leaves.

  Returns:
    The difference for each leaf that is a matrix, by text name.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in (
    ...     np.zeros((2, 2)), [[1, 2], [0, 1]], [[2, 0], [1, 1]]))
    >>> found = pj.merging.wudi_difference(base, [a, b])["w"]
    >>> found.closed < found.adam < found.start
    True
  """
  patches = [
    one if isinstance(one, Patch) else diff(base, one) for one in contributors
  ]
  axes: dict[str, Any] = mats.view(layout, in_axes, batch_axes)
  named = inputs.floats_of(flatten(base)[0], only)
  shapes = {n: tuple(x.shape) for n, x in named.items()}
  names = [n for n in shapes if mats.sizes(shapes[n], **axes) is not None]
  if not names:
    return {}
  ways = (
    steps.weighted_sum(),
    wudi(
      solver="adam",
      learning_rate=learning_rate,
      iterations=iterations,
      layout=layout,
      in_axes=in_axes,
      batch_axes=batch_axes,
    ),
    wudi(ridge=ridge, layout=layout, in_axes=in_axes, batch_axes=batch_axes),
  )
  merges = [
    running.combine(patches, how, base=base, only=names) for how in ways
  ]

  def compared(tasks, found):
    tasks = tuple(mats.matrices(x, **axes) for x in tasks)
    found = [mats.matrices(x, **axes) for x in found]
    losses = [_interference(x, tasks) for x in found]
    gap, length = (
      jnp.sqrt(jnp.sum(x * x)) for x in (found[1] - found[2], found[2])
    )
    return gap / jnp.where(length > 0, length, 1.0), losses

  one_leaf = jax.jit(lambda *args: meshes.number_on_mesh(compared, *args))

  result = {}
  for name in names:
    if name not in merges[0].deltas:
      continue
    one: list[Any] = [
      running.combine([patch], steps.mean(), base=base, only=[name])
      for patch in patches
      if name in patch.deltas
    ]
    tasks = [_numbers(patch, name) for patch in one]
    found = [_numbers(merge, name) for merge in merges]
    distance, losses = one_leaf(tasks, found)
    result[name] = WudiDifference(float(distance), *map(float, losses))
  return result


def _interference(merged: Array, tasks: tuple[Array, ...]) -> Array:
  """What WUDI minimises."""
  total = jnp.zeros((), merged.dtype)
  for x, unit in zip(tasks, _normed(tasks), strict=True):
    gap = mats.dot(merged - x, mats.transposed(unit))
    total = total + jnp.sum(gap * gap)
  return total


def _numbers(combined: Any, name: str) -> Array:
  """Returns a leaf's delta in a patch that `combine` made: they are dense."""
  return combined.deltas[name].code.values
