"""Merge methods: keyword-only recipes that return a chain of steps."""

from __future__ import annotations

from typing import Any, Literal

from patchjax.merging import steps
from patchjax.patches.transform import Transform, chain
from patchjax.patches.trimming import trim


def linear(*, weights: Any = 1.0) -> Transform:
  """Returns the weighted mean of the contributors' parameters.

  `sum_i w_i x_i / sum_i w_i`, written as the base plus the weighted mean of
  the task vectors, which is the same: a model soup (Wortsman et al. 2022,
  https://arxiv.org/abs/2203.05482), or FedAvg with example counts as weights.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (0, 1, 4))
    >>> pj.merge(base, [a, b], pj.merging.linear(weights=[3, 1]))["w"].tolist()
    [1.75]
  """
  return steps.weighted_sum(weights=_numbers(weights), normalize=True)


def task_arithmetic(*, weights: Any = 1.0, scale: Any = 1.0) -> Transform:
  """Returns `base + scale * sum_i w_i (x_i - base)`.

  Ilharco et al. 2023 (https://arxiv.org/abs/2212.04089); their scale on eight
  vision tasks is 0.3 to 0.4.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.
    scale: lambda; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (1, 2, 4))
    >>> method = pj.merging.task_arithmetic(scale=0.5)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [3.0]
  """
  return chain(
    steps.weighted_sum(weights=_numbers(weights)), steps.scale(scale)
  )


def ties(
  *,
  density: Any = 0.2,
  scale: Any = 1.0,
  weights: Any = None,
  scope: Literal["tree", "leaf"] | None = None,
  method: Literal["total", "frequency"] = "total",
  weights_in_election: bool | None = None,
  exact_k: bool | None = None,
  one_more: bool | None = None,
  flavour: Literal["paper", "mergekit"] = "paper",
) -> Transform:
  """Returns TIES: trim, elect signs, average what agrees.

  Yadav et al. 2023 (https://arxiv.org/abs/2306.01708), with the defaults of
  the paper's code. Each contributor keeps its largest entries; in each entry
  the sign of the sum is elected; entries of that sign are averaged.

  Args:
    density: share of the entries that is kept, one a contributor or one for
      all; traced, may be mapped over; has no derivative.
    scale: lambda; traced, differentiable.
    weights: one a contributor; traced, differentiable. They weigh the mean.
    scope: whether density is a share of the model ("tree") or of each leaf.
    method: how signs are elected, see `elect_sign`.
    weights_in_election: whether weights also multiply before the election.
    exact_k: whether ties at the threshold are broken, see `trim`.
    one_more: whether `floor(density * n) + 1` entries are kept, see `trim`.
    flavour: "paper", equal to the paper's code: scope "tree", one entry more,
      weights at the mean, a zero sum takes the majority sign. "mergekit":
      scope "leaf", exactly k entries, weights in the election, a zero sum
      counts as positive. Arguments that are given win.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros(4, np.float32)}
    >>> a, b = {"w": np.float32([4, 3, 1, 0])}, {"w": np.float32([2, -5, 0, 1])}
    >>> method = pj.merging.ties(density=0.5)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [3.0, -5.0, 1.0, 1.0]
  """
  if flavour not in ("paper", "mergekit"):
    raise ValueError(f"flavour must be 'paper' or 'mergekit', got {flavour!r}")
  paper = flavour == "paper"
  if weights_in_election is None:
    weights_in_election = not paper
  if exact_k is None:
    exact_k = not paper
  if one_more is None:
    one_more = paper and not exact_k
  weights = _numbers(weights)
  return chain(
    trim(
      density=_numbers(density),
      scope=scope or ("tree" if paper else "leaf"),
      exact_k=exact_k,
      one_more=one_more,
    ),
    steps.elect_sign(
      method=method,
      zero="majority" if paper else "positive",
      weights=weights if weights_in_election else None,
    ),
    steps.disjoint_mean(weights=weights, in_sum=not weights_in_election),
    steps.scale(scale),
  )


def _numbers(value: Any) -> Any:
  """A list of numbers as one array: a leaf of the method's pytree."""
  if isinstance(value, list | tuple):
    import jax.numpy as jnp

    return jnp.stack([jnp.asarray(v, jnp.float32) for v in value])
  return value
