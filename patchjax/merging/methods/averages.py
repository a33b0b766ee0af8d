"""Weighted sums: of parameters, of task vectors, of one contributor."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from patchjax.merging import steps
from patchjax.merging.methods import options
from patchjax.patches import transform
from patchjax.patches.transform import Transform, chain
from patchjax.trees.errors import SelectionError


def linear(*, weights: Any = 1.0, normalize: bool = True) -> Transform:
  """Returns the weighted mean of the contributors' parameters.

  `sum_i w_i x_i / sum_i w_i`: a model soup (Wortsman et al. 2022,
  https://arxiv.org/abs/2203.05482, section 2), or FedAvg with example counts
  as weights. No base is needed, nor read where one is given; `combine` takes
  the same mean of task vectors.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.
    normalize: whether to divide by the sum of the weights. Without it the sum
      of parameters is meant, and patches cannot be combined.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1])}, {"w": np.float32([4])}
    >>> pj.merge(None, [a, b], pj.merging.linear(weights=[3, 1]))["w"].tolist()
    [1.75]
  """
  return steps.weighted_sum(
    weights=options.numbers(weights),
    normalize=normalize,
    space=None if normalize else "params",
  )


def task_arithmetic(
  *, weights: Any = 1.0, scale: Any = 1.0, normalize: bool = False
) -> Transform:
  """Returns `base + scale * sum_i w_i (x_i - base)`.

  Ilharco et al. 2023 (https://arxiv.org/abs/2212.04089, section 2); their
  scale on eight vision tasks is 0.3 to 0.4.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.
    scale: lambda; traced, differentiable.
    normalize: whether to divide by the sum of the weights.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (1, 2, 4))
    >>> method = pj.merging.task_arithmetic(scale=0.5)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [3.0]
  """
  total = steps.weighted_sum(
    weights=options.numbers(weights), normalize=normalize
  )
  return chain(total, steps.scale(scale))


def passthrough(*, scale: Any = None) -> Transform:
  """Returns the only contributor's parameters, times a number.

  For some leaves of a merge, in a mapping of selectors to methods; named as
  in mergekit (https://arxiv.org/abs/2403.13257).

  Args:
    scale: the number, or one a leaf (`per_leaf`); traced, differentiable. By
      default parameters are copied to the bit.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> tuned = {"w": np.float32([3])}
    >>> pj.merge(None, [tuned], pj.merging.passthrough(scale=2))["w"].tolist()
    [6.0]
  """
  return Transform.of(_PASS, {"scale": scale})


def _pass(leaf, deltas, base, state, shared):
  del leaf, base, shared
  if len(deltas) != 1:
    raise SelectionError(
      f"passthrough takes one contributor, got {len(deltas)}; choose which"
    )
  (x,) = deltas
  if "scale" not in state:
    return x
  return transform.rounded(x * jnp.asarray(state["scale"]).astype(x.dtype))


_PASS = transform.register_step(
  transform.Step(
    name="passthrough",
    update=_pass,
    reducing=True,
    space=lambda: "params",
    carries_nonfinite=True,
  )
)
