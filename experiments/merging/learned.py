"""Methods that learn their coefficients on texts without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.merging.problem import Problem
from patchjax import merging


def adamerging(
  problem: Problem, *, level: Literal["task", "leaf"]
) -> dict[str, Any]:
  """AdaMerging on the test texts, as its paper has it.

  The coefficients see which task a text is of, but no label. A step takes as
  many texts of every task, in one batch: the mean of the entropies over them
  is the sum over tasks of the method, times a number that Adam does not see.

  Args:
    problem: specialists and texts.
    level: one coefficient a specialist, or one for each of its leaves.

  Returns:
    The upper layers of the merged model.
  """
  encoder, settings = problem.encoder, problem.settings
  heads = encoder.heads

  def logits(upper: Any, texts: Any) -> jax.Array:
    x, mask, task = texts
    return encoder.logits(upper, x, mask, task, heads)

  fitted = merging.adamerging(
    problem.base,
    problem.patches,
    logits,
    _batches(problem),
    level=level,
    optimizer=optax.adam(settings.adapt_rate),
  )
  return fitted.merged


def _batches(problem: Problem) -> Iterator[list[Any]]:
  settings = problem.settings
  x, mask, task, _ = problem.test.padded()
  random = np.random.default_rng([problem.seed, 1])
  own = [
    np.flatnonzero(task == number)[: settings.adapt_texts]
    for number in range(len(problem.patches))
  ]
  for _ in range(settings.adapt_steps):
    rows = np.concatenate(
      [random.choice(part, settings.adapt_batch, replace=False) for part in own]
    )
    yield [(x[rows], mask[rows], task[rows])]
