"""Methods that elect a sign for each entry, and merge what agrees with it."""

from __future__ import annotations

from typing import Any, Literal

from patchjax.merging import steps
from patchjax.merging.methods import options
from patchjax.merging.rescaling import keep_l1
from patchjax.patches.transform import Transform, chain
from patchjax.patches.trimming import trim


def ties(
  *,
  density: Any = 0.2,
  scale: Any = 1.0,
  weights: Any = None,
  scope: Literal["tree", "leaf"] | None = None,
  method: Literal["total", "frequency"] = "total",
  weights_in_election: bool | None = None,
  exact_k: bool | None = None,
  one_more: bool | Literal["if_none"] | None = None,
  normalize: bool = True,
  rescale: bool = False,
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
    normalize: whether what agrees is averaged, or only added.
    rescale: whether what is kept of a leaf is scaled to the L1 norm the leaf
      had, an option of mergekit's; needs scope "leaf".
    flavour: "paper", equal to the paper's code: scope "tree", one entry more,
      weights at the mean, a zero sum takes the majority sign. "mergekit":
      scope "leaf", exactly k entries but at least one, weights in the
      election, a zero sum counts as positive. Arguments that are given win.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros(4, np.float32)}
    >>> a, b = {"w": np.float32([4, 3, 1, 0])}, {"w": np.float32([2, -5, 0, 1])}
    >>> method = pj.merging.ties(density=0.5)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [3.0, -5.0, 1.0, 1.0]
  """
  options.check_flavour(flavour)
  paper = flavour == "paper"
  if weights_in_election is None:
    weights_in_election = not paper
  if exact_k is None:
    exact_k = not paper
  if one_more is None:
    one_more = not exact_k if paper else "if_none"
  weights = options.numbers(weights)
  trimmed = trim(
    density=options.numbers(density),
    scope=scope or ("tree" if paper else "leaf"),
    exact_k=exact_k,
    one_more=one_more,
  )
  joined = steps.disjoint_mean(weights=weights, in_sum=not weights_in_election)
  if not normalize:
    joined = steps.weighted_sum(
      weights=1.0 if weights is None or weights_in_election else weights
    )
  return chain(
    keep_l1(trimmed) if rescale else trimmed,
    steps.elect_sign(
      method=method,
      zero="majority" if paper else "positive",
      weights=weights if weights_in_election else None,
    ),
    joined,
    steps.scale(scale),
  )
