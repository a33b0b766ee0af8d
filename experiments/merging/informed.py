"""Methods that read statistics of each specialist on texts of its task.

They are taken over training texts, tokens that pad left out. Only trust
region looks at labels; Fisher informations draw them from the model.
"""

from __future__ import annotations

from typing import Any

import jax

import patchjax as pj
from experiments.merging.problem import Problem
from patchjax import merging, statistics

# On a CPU a gradient at a time is three times as fast as eight side by side.
_CHUNK = 1


def _mask(example: tuple[Any, ...]) -> Any:
  """The weights of the positions of a text."""
  return example[1]


def _key(problem: Problem, number: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(problem.seed), number)


def _examples(
  problem: Problem, number: int, n: int | None = None
) -> tuple[Any, ...]:
  """Token vectors, masks, numbers of the task, of the first n texts."""
  return tuple(part[:n] for part in problem.texts(number)[:3])


def _fishers(problem: Problem) -> tuple[statistics.Fisher, ...]:
  return problem.statistic(
    "fisher",
    lambda number: statistics.fisher_diagonal(
      problem.encoder.answer,
      problem.models[number],
      _examples(problem, number, problem.settings.gradient_texts),
      key=_key(problem, number),
      chunk=_CHUNK,
    ),
  )


def _grams(problem: Problem) -> tuple[statistics.Gram, ...]:
  return problem.statistic(
    "gram",
    lambda number: statistics.gram(
      problem.encoder.answer,
      problem.models[number],
      _examples(problem, number),
      mask=_mask,
    ),
  )


def _factors(problem: Problem) -> tuple[statistics.KFac, ...]:
  return problem.statistic(
    "kfac",
    lambda number: statistics.kfac(
      problem.encoder.answer,
      problem.models[number],
      _examples(problem, number),
      key=_key(problem, number),
      mask=_mask,
    ),
  )


def _gradients(problem: Problem) -> tuple[dict[str, Any], ...]:
  n = problem.settings.gradient_texts
  return problem.statistic(
    "gradients",
    lambda number: statistics.absolute_gradients(
      problem.encoder.answer,
      problem.base,
      (_examples(problem, number, n), problem.texts(number)[3][:n]),
      chunk=_CHUNK,
    ),
  )


def fisher(problem: Problem, **options: Any) -> Any:
  """Fisher merging."""
  method = merging.fisher(fishers=_fishers(problem), **options)
  return pj.merge(problem.base, problem.patches, method)


def regmean(problem: Problem, **options: Any) -> Any:
  """RegMean."""
  method = merging.regmean(grams=_grams(problem), **options)
  return pj.merge(problem.base, problem.patches, method)


def regmean_plus_plus(problem: Problem, **options: Any) -> Any:
  """RegMean++; its Gram matrices are taken anew, and part of its cost."""
  return merging.regmean_plus_plus(
    problem.encoder.answer,
    problem.models,
    [_examples(problem, number) for number in range(len(problem.patches))],
    mask=_mask,
    **options,
  )


def mats(problem: Problem, **options: Any) -> Any:
  """MaTS on Kronecker factors, from task arithmetic as in the paper."""
  plain = merging.task_arithmetic(scale=0.3)
  start = pj.merge(problem.base, problem.patches, plain)
  method = merging.mats(statistics=_factors(problem), init=start, **options)
  return pj.merge(problem.base, problem.patches, method)


def trust_region(problem: Problem, *, data: bool, **options: Any) -> Any:
  """TATR, with gradients on data, or with task vectors in their place."""
  method = merging.trust_region(
    gradients=_gradients(problem) if data else None, scale=1.0, **options
  )
  return pj.merge(problem.base, problem.patches, method)
