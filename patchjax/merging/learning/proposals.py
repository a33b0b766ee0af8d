"""Candidates for a search: a grid, uniform draws, CMA-ES.

Each is a generator: it yields pytrees of float32 arrays with a first axis over
the candidates, and is sent their scores, larger being better.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Numbers = Any
Proposals = Generator[Numbers, np.ndarray, None]


def grid(values: Mapping[str, Sequence[Any]]) -> Proposals:
  """Returns all combinations of values, at once.

  Args:
    values: for each number, the values to try; a value may be an array.

  Example:
    >>> (found,) = grid({"scale": [0.5, 1], "density": [0.1, 0.2]})
    >>> found["scale"].tolist()
    [0.5, 0.5, 1.0, 1.0]
  """
  if not values or not all(len(tried) for tried in values.values()):
    raise ValueError(f"a grid needs values for each number, got {values}")
  rows = list(itertools.product(*values.values()))
  return _one(
    {
      name: np.stack([np.asarray(row[i], np.float32) for row in rows])
      for i, name in enumerate(values)
    }
  )


def _one(candidates: Numbers) -> Proposals:
  yield candidates


def uniform(
  low: Numbers, high: Numbers, *, count: int, seed: int = 0
) -> Proposals:
  """Returns candidates drawn uniformly from a box, at once.

  Random search covers the few numbers that matter better than a grid of the
  same size (Bergstra and Bengio 2012).

  Args:
    low: pytree of the least values.
    high: pytree of the greatest values.
    count: how many.
    seed: of the draws.

  Example:
    >>> (found,) = uniform({"t": 0.0}, {"t": 1.0}, count=3)
    >>> found["t"].shape
    (3,)
  """
  box = _Box(low, high)
  rng = np.random.default_rng(seed)
  return _one(box.stacked(rng.random((count, box.size))))


def cma_es(
  low: Numbers,
  high: Numbers,
  *,
  generations: int = 20,
  population: int | None = None,
  start: Numbers | None = None,
  sigma: float = 0.3,
  seed: int = 0,
) -> Proposals:
  """Returns the generations of CMA-ES within a box.

  Covariance matrix adaptation (Hansen 2016, https://arxiv.org/abs/1604.00772)
  by the package `cmaes` (MIT licence; `pip install patchjax[search]`), on the
  box scaled to the unit cube. Evolutionary merging (Akiba et al. 2024,
  https://arxiv.org/abs/2403.13187) searches the numbers of a recipe so.

  Args:
    low: pytree of the least values.
    high: pytree of the greatest values.
    generations: how many at most; it ends earlier when it has converged.
    population: candidates a generation; by default `4 + floor(3 ln n)` for n
      numbers.
    start: where to start; by default the middle of the box.
    sigma: the first step size, as a share of the box.
    seed: of the draws.

  Raises:
    ImportError: if `cmaes` is not installed.

  Example:
    >>> proposals = cma_es({"w": np.zeros(2)}, {"w": np.ones(2)}, seed=1)
    >>> candidates = next(proposals)
    >>> for _ in range(12):
    ...   away = np.sum((candidates["w"] - 0.25) ** 2, axis=1)
    ...   candidates = proposals.send(-away)
    >>> bool(np.abs(candidates["w"].mean(0) - 0.25).max() < 0.05)
    True
  """
  try:
    import cmaes
  except ImportError as error:
    raise ImportError(
      "cma_es needs the package cmaes: pip install 'patchjax[search]'; grid "
      "and uniform need nothing"
    ) from error
  box = _Box(low, high)
  # The package refuses one dimension: a second that means nothing is added.
  size = max(box.size, 2)
  mean = np.full(size, 0.5)
  if start is not None:
    mean[: box.size] = box.scaled(start)
  optimizer = cmaes.CMA(
    mean=mean,
    sigma=sigma,
    bounds=np.tile([0.0, 1.0], (size, 1)),
    population_size=population,
    seed=seed,
  )
  return _evolved(optimizer, box, generations)


def _evolved(optimizer: Any, box: _Box, generations: int) -> Proposals:
  for _ in range(generations):
    points = [optimizer.ask() for _ in range(optimizer.population_size)]
    scores = yield box.stacked(np.stack(points)[:, : box.size])
    losses = np.where(np.isnan(scores), np.inf, -np.asarray(scores))
    optimizer.tell(list(zip(points, losses.tolist(), strict=True)))
    if optimizer.should_stop():
      return


class _Box:
  """A box of numbers, and its points as flat rows in the unit cube."""

  def __init__(self, low: Numbers, high: Numbers):
    lows, self.treedef = jax.tree.flatten(low)
    highs, other = jax.tree.flatten(high)
    if self.treedef != other:
      raise ValueError(
        f"low and high must have one structure, got {self.treedef} and {other}"
      )
    pairs = [np.broadcast_arrays(a, b) for a, b in zip(lows, highs)]
    self.shapes = [a.shape for a, _ in pairs]
    self.low = _flat([a for a, _ in pairs])
    self.width = _flat([b for _, b in pairs]) - self.low
    self.size = self.low.size
    if not self.size or not (self.width > 0).all():
      raise ValueError(
        f"each number's low must be below its high, got {low} and {high}"
      )

  def scaled(self, point: Numbers) -> np.ndarray:
    """Returns a point of the box as a row of the unit cube."""
    parts = jax.tree.leaves(point)
    wide = [np.broadcast_to(x, s) for x, s in zip(parts, self.shapes)]
    return (_flat(wide) - self.low) / self.width

  def stacked(self, rows: np.ndarray) -> Numbers:
    """Returns rows of the unit cube as a pytree of stacked numbers."""
    values = (self.low + rows * self.width).astype(np.float32)
    ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
    parts = np.split(values, ends, axis=1)
    return self.treedef.unflatten(
      part.reshape(len(rows), *shape)
      for part, shape in zip(parts, self.shapes, strict=True)
    )


def _flat(arrays: Sequence[Any]) -> np.ndarray:
  flat = [np.ravel(np.asarray(x, np.float64)) for x in arrays]
  return np.concatenate(flat) if flat else np.zeros(0)
