"""Statistics for merges that are timed, made of the models' own numbers.

They are no information of any data: both sides can make the same ones.
`peers/torch_statistical.py` has them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

import patchjax as pj
from patchjax.statistics import Fisher, Gram, LinearLayer

_LAYER = LinearLayer((0,), (1,))


def fisher(models: Sequence[Any]) -> pj.Transform:
  """Returns Fisher merging, with the models' squares for diagonals."""
  fishers = []
  for model in models:
    leaves = pj.trees.named_leaves(model)
    squares = {n: jnp.square(_wide(x)) for n, x in leaves.items()}
    fishers.append(Fisher(squares, 1, "exact"))
  return pj.merging.fisher(fishers=fishers, normalize=False)


def regmean(models: Sequence[Any]) -> pj.Transform:
  """Returns RegMean, with the models' own inner products for Gram matrices."""
  return pj.merging.regmean(grams=_grams(models))


def mats(models: Sequence[Any]) -> pj.Transform:
  """Returns MaTS with the same, ten steps."""
  return pj.merging.mats(statistics=_grams(models), iterations=10)


def _grams(models: Sequence[Any]) -> list[Gram]:
  found = []
  for model in models:
    values = {}
    for name, leaf in pj.trees.named_leaves(model).items():
      if leaf.ndim == 2 and 16 <= leaf.shape[0] <= 8192:
        x = _wide(leaf)
        eye = jnp.float32(1e-4) * jnp.eye(len(x), dtype=jnp.float32)
        values[name] = (x @ x.T / x.shape[1] + eye)[None]
    layers = tuple((name, _LAYER) for name in values)
    found.append(Gram(values, dict.fromkeys(values, 1), 1, layers))
  return found


def _wide(x: Any) -> Any:
  return jnp.asarray(x).astype(jnp.float32)
