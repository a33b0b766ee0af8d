"""Task vectors with coefficients of a formula: Model Stock, MetaGPT, LiNeS."""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

import jax.numpy as jnp

from patchjax.merging import gram
from patchjax.merging.methods import options
from patchjax.merging.methods.lengths import root
from patchjax.patches import transform
from patchjax.patches.perleaf import PerLeaf
from patchjax.patches.transform import Transform

Array = Any


def model_stock(
  *,
  filter_wise: bool = False,
  average: Literal["cosines", "angles"] = "cosines",
  flavour: Literal["paper", "mergekit"] = "paper",
) -> Transform:
  """Returns the point between the base and the mean that angles suggest.

  Model Stock (Jang et al. 2024, https://arxiv.org/abs/2403.19522, equations 4
  and 6): `t mean_i x_i + (1 - t) base`, `t = k cos / (1 + (k - 1) cos)`, with
  the cosine of the angle between two contributors' task vectors. t is 0 where
  the denominator vanishes.

  Args:
    filter_wise: whether each row, along the last axis, has an angle of its
      own, as in the paper's code; otherwise each leaf.
    average: what is averaged over pairs of more than two contributors: their
      cosines, as in mergekit, or their angles, as in FusionBench. (The paper
      compares two; it says nothing of the mean.)
    flavour: "mergekit" divides dot products by no less than 1e-6, which
      lowers the cosine, and so t, of short task vectors.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([0, 0])}
    >>> a, b = {"w": np.float32([3, 4])}, {"w": np.float32([5, 0])}
    >>> print(pj.merge(base, [a, b], pj.merging.model_stock())["w"].round(4))
    [3.  1.5]
  """
  options.check("average", average, ("cosines", "angles"))
  options.check_flavour(flavour)
  step = _STOCK_ROWS if filter_wise else _STOCK
  return Transform.of(step, {}, average=average, flavour=flavour)


def _stock_share(lengths, dots, average, flavour):
  """Returns t / k from lengths of the k, and dot products of the pairs."""
  k = len(lengths)
  if k < 2:
    raise ValueError(f"model_stock needs at least 2 contributors, got {k}")
  like = lengths[0]

  def number(x):
    return jnp.full_like(like, x)

  floor = number(1e-6 if flavour == "mergekit" else 1e-30)
  cosines = []
  for (i, j), dot in dots.items():
    cosine = dot / jnp.maximum(lengths[i] * lengths[j], floor)
    cosines.append(jnp.clip(cosine, number(-1), number(1)))
  if average == "angles":
    cosines = list(map(jnp.arccos, cosines))
  mean = functools.reduce(jnp.add, cosines) / number(len(cosines))
  if average == "angles":
    mean = jnp.cos(mean)
  below = number(1) + number(k - 1) * mean
  singular = jnp.abs(below) < number(1e-6)
  share = mean / jnp.where(singular, number(1), below)
  return jnp.where(singular, number(0), share)


def _pairs(k):
  return [(i, j) for i in range(k) for j in range(i + 1, k)]


def _stock(dots, state, k, *, average, flavour):
  del state
  lengths = [root(dots[i, i]) for i in range(k)]
  products = {(i, j): dots[i, j] for i, j in _pairs(k)}
  return (_stock_share(lengths, products, average, flavour),) * k


def _stock_rows(leaf, deltas, base, state, shared, *, average, flavour):
  del base, state, shared
  k = len(deltas)

  def dot(x, y):
    return jnp.sum(x * y, axis=-1, keepdims=True) if leaf.shape else x * y

  lengths = [root(dot(d, d)) for d in deltas]
  products = {(i, j): dot(deltas[i], deltas[j]) for i, j in _pairs(k)}
  share = _stock_share(lengths, products, average, flavour)
  return transform.rounded(share * functools.reduce(jnp.add, deltas))


_STOCK = gram.combination("model_stock", _stock, space=lambda **_: "deltas")
_STOCK_ROWS = transform.register_step(
  transform.Step("model_stock_rows", _stock_rows, reducing=True)
)


def metagpt(*, scale: Any = 1.0) -> Transform:
  """Returns the base plus task vectors, each by its share of squared length.

  MetaGPT (Zhou et al. 2024, https://arxiv.org/abs/2406.11385, equation 17):
  `base + sum_i c_i tau_i`, `c_i = ||tau_i||^2 / sum_j ||tau_j||^2` over whole
  models, which minimizes the mean loss to second order where task vectors are
  orthogonal. One contributor is the result.

  Args:
    scale: multiplies all coefficients; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (0, 1, 3))
    >>> print(pj.merge(base, [a, b], pj.merging.metagpt())["w"].round(4))
    [2.8]
  """
  return Transform.of(_METAGPT, {"scale": scale})


def _metagpt(dots, state, k):
  del k
  squares = jnp.diagonal(dots)
  mass = jnp.sum(squares)
  none = mass == jnp.zeros_like(mass)
  scale = jnp.asarray(state["scale"]).astype(dots.dtype)
  return scale * squares / jnp.where(none, jnp.ones_like(mass), mass)


_METAGPT = gram.combination(
  "metagpt", _metagpt, space=lambda **_: "deltas", scope=lambda **_: "tree"
)


def lines(
  *, alpha: Any = None, beta: Any = 0.5, layer: str | None = None
) -> Transform:
  """Returns the base plus the sum of task vectors, scaled up with depth.

  LiNeS (Wang et al. 2025, https://arxiv.org/abs/2410.17146, equation 3): in
  block l of L the sum is multiplied by `alpha + beta l / (L - 1)`; leaves of
  no block by alpha. To edit one model alone the paper takes
  `beta = 1 - alpha`; for merges `alpha = 1 / k`, and searches beta. After
  other methods: `pj.chain(pj.merging.ties(), pj.merging.scale_by_depth(...))`.

  Args:
    alpha: the scale of the first block; by default 1/k.
    beta: what the last block has more. Both traced, differentiable.
    layer: see `scale_by_depth`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a = ({"h": [np.float32([x])] * 3} for x in (0, 1))
    >>> method = pj.merging.lines(alpha=0.5, beta=0.5)
    >>> [x.tolist() for x in pj.merge(base, [a], method)["h"]]
    [[0.5], [0.75], [1.0]]
  """
  from patchjax.merging import steps

  return transform.chain(
    scale_by_depth(alpha=alpha, beta=beta, layer=layer), steps.weighted_sum()
  )


LAYER = r"(?:^|[/._])(\d+)(?=[/._]|$)"
"""The first number that stands alone between separators of a name."""


def scale_by_depth(
  *, alpha: Any = None, beta: Any = 0.5, layer: str | None = None
) -> Transform:
  """Returns the step that multiplies deltas by `alpha + beta l / (L - 1)`.

  l is the index of the leaf's block, of L; `lines` is made of it (LiNeS,
  https://arxiv.org/abs/2410.17146).

  Args:
    alpha: for the first block and for leaves of none; by default 1/k for the
      k deltas that the step gets.
    beta: what the last block has more.
    layer: a regular expression whose first group, where it is found in a text
      name, is the index of the block; by default the first number between
      separators: `layers/3/kernel`, `model.layers.3.mlp`, `block_3/kernel`.

  Example:
    >>> import patchjax as pj
    >>> pj.chain(pj.merging.mean(), pj.merging.scale_by_depth(alpha=0.5))
    chain(mean(), scale_by_depth(alpha=0.5, beta=0.5, layer=...))
  """
  numbers = {"alpha": alpha, "beta": beta}
  layer = LAYER if layer is None else layer
  if re.compile(layer).groups < 1:
    raise ValueError(
      f"layer must have a group for the index, got {layer!r}; "
      r"for example r'block(\d+)'"
    )
  return Transform.of(_DEPTH, numbers, layer=layer)


def _depth_init(numbers, shapes, *, layer):
  found = {name: re.search(layer, name) for name in shapes}
  blocks = {name: int(m.group(1)) for name, m in found.items() if m}
  last = max(blocks.values(), default=0)
  depth = {name: blocks.get(name, 0) / max(last, 1) for name in shapes}
  return {**numbers, "depth": PerLeaf(depth)}


def _depth(leaf, deltas, base, state, shared, *, layer):
  del leaf, base, shared, layer
  alpha = state.get("alpha", 1 / len(deltas))
  alpha, beta, depth = (
    jnp.asarray(x).astype(deltas[0].dtype)
    for x in (alpha, state["beta"], state["depth"])
  )
  scale = alpha + transform.rounded(beta * depth)
  return tuple(transform.rounded(scale * d) for d in deltas)


_DEPTH = transform.register_step(
  transform.Step(
    "scale_by_depth", _depth, init=_depth_init, carries_nonfinite=True
  )
)
