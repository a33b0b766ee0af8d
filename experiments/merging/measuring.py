"""Choosing a method's settings on validation texts, and testing the choice."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.merging.encoder import Params
from experiments.merging.problem import Problem, timed
from experiments.merging.recipes import Recipe
from experiments.merging.settings import Settings

# A merge that took longer than this, in CPU-seconds, is not run once more to
# be timed without compilation, and none is but with the first seed: the others
# compile nothing, and the table has the median of the seeds. (AdaMerging
# compiles its step in every run.)
_LONG = 20.0


@dataclasses.dataclass(frozen=True)
class Result:
  """A row of one seed.

  Attributes:
    outcomes: which test texts it gets right, booleans `[n]`.
    validation: accuracy on validation texts, the mean of the tasks; None where
      there was nothing to choose.
    options: what was chosen.
    tried: how many settings were scored on validation texts.
    cost: CPU-seconds of the merge, or of the training.
    statistics: CPU-seconds of the statistics that the merge reads.
    stamp: what it depends on, see `stamped`.
  """

  outcomes: np.ndarray
  validation: float | None = None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  tried: int = 0
  cost: float = float("nan")
  statistics: float = 0.0
  stamp: str = ""

  def save(self, path: pathlib.Path) -> None:
    """Writes the result as one file without pickles."""
    facts = dataclasses.asdict(self)
    del facts["outcomes"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
      np.savez(file, outcomes=self.outcomes, facts=np.array(json.dumps(facts)))

  @classmethod
  def load(cls, path: pathlib.Path) -> Result:
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
      return cls(file["outcomes"], **json.loads(str(file["facts"])))


@jax.jit
def scaled(base: Params, merged: Params, scale: Any) -> Params:
  """The base plus `scale` times what the merge changed."""
  return jax.tree.map(lambda b, m: b + scale * (m - b), base, merged)


def points(recipe: Recipe) -> Iterator[dict[str, Any]]:
  """Every combination of the options of a recipe."""
  for values in itertools.product(*recipe.grid.values()):
    yield dict(zip(recipe.grid, values))


def stamped(settings: Settings, recipe: Recipe | None) -> str:
  """A digest of what a row of a seed depends on, beside the code.

  Args:
    settings: of the experiment.
    recipe: of the row; None for a baseline.
  """
  facts: list[Any] = [dataclasses.asdict(settings) | {"seeds": None}]
  if recipe is not None:
    facts += [sorted(recipe.grid.items()), list(recipe.scales)]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def measure(recipe: Recipe, problem: Problem) -> Result:
  """Merges with every setting, and tests the best on validation texts.

  Args:
    recipe: the method and its grid.
    problem: specialists and texts.

  Returns:
    Its row. Equal scores: the earlier setting wins.
  """
  choices = [(o, s) for o in points(recipe) for s in recipe.scales]
  best: Any = (-1.0, choices[0], None, 0.0)
  for options in points(recipe):
    before = problem.spent
    merged, cost = timed(recipe.merge, problem, **options)
    cost -= problem.spent - before  # of statistics, told apart
    for scale in recipe.scales:
      upper = (
        merged
        if scale == 1
        else scaled(problem.base, merged, np.float32(scale))
      )
      score = 0.0
      if len(choices) > 1:
        scores = problem.encoder.scores(upper, problem.validation)
        score = float(scores.mean())
      if score > best[0]:
        best = (score, (options, scale), upper, cost)
  score, (options, scale), upper, cost = best
  if cost < _LONG and problem.seed == problem.settings.seeds[0]:
    _, cost = timed(recipe.merge, problem, **options)
  if len(recipe.scales) > 1:
    options = {**options, "scale": scale}
  return Result(
    problem.encoder.outcomes(upper, problem.test),
    score if len(choices) > 1 else None,
    options,
    len(choices) if len(choices) > 1 else 0,
    cost,
    sum(problem.costs[name] for name in recipe.statistics),
  )
