"""Statistics of few examples, drawn towards something simpler."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from patchjax.patches.meshes import on_leaf_mesh
from patchjax.statistics.fisher import Fisher
from patchjax.statistics.kinds import arrays_of

Array = Any


def shrink(statistic: Any, examples: Any) -> Any:
  """Returns a statistic shrunk by its sample size.

  `(n S + n0 T) / (n + n0)` for a statistic S of n examples, leaf by leaf: as
  if n0 examples more had said T, which is the same in every direction. T is
  the mean of a Fisher diagonal, and for a Gram matrix or a Kronecker factor
  the mean of its diagonal times the identity: so none is singular.

  Args:
    statistic: a `Fisher`, `Gram` or `KFac`.
    examples: n0, zero or more; traced, differentiable.

  Raises:
    TypeError: if it is none of these.

  Example:
    >>> import numpy as np
    >>> fisher = Fisher({"w": np.float32([0, 2])}, 3, "sample")
    >>> shrink(fisher, 1).values["w"].tolist()
    [0.25, 1.75]
  """
  if isinstance(examples, int | float) and not examples:
    return statistic
  # The axes of a leaf are no matrices to a diagonal.
  matrix = None if isinstance(statistic, Fisher) else (1, 2)
  shrunk = {
    field: _all(getattr(statistic, field), statistic.n, examples, matrix)
    for field in arrays_of(statistic)
  }
  return dataclasses.replace(statistic, **shrunk)


def _all(values, n, examples, matrix) -> dict[str, Array]:
  """Shrinks each array, or the matrices over two axes of it."""

  def one(x):
    target, axes = jnp.ones_like(x), tuple(range(x.ndim))
    if matrix is not None:
      eye, axes = jnp.eye(x.shape[-1], dtype=x.dtype), matrix
      target = jnp.broadcast_to(eye, x.shape)
    share = jnp.asarray(examples).astype(x.dtype)
    share = share / (share + jnp.asarray(n).astype(x.dtype))
    level = jnp.sum(x * target, axes, keepdims=True)
    level = level / jnp.sum(target, axes, keepdims=True)
    return x + share * (jnp.broadcast_to(level, x.shape) * target - x)

  return {
    name: on_leaf_mesh(one, x, x) if x.size else x for name, x in values.items()
  }
