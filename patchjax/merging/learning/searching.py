"""search_numbers: the best of many merges, evaluated together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from patchjax.merging import running
from patchjax.merging.learning import fitting
from patchjax.trees.errors import NonFiniteError, StructureError

Array = Any
Numbers = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
  """The best merge of a search.

  Attributes:
    merged: the merge with the best numbers.
    numbers: the best numbers.
    score: their score.
    tried: all candidates, stacked in the order they were tried.
    scores: float32, theirs.
  """

  merged: Any
  numbers: Numbers
  score: float
  tried: Numbers
  scores: np.ndarray


def search_numbers(
  base: Any,
  contributors: Sequence[Any],
  method: Callable[[Numbers], fitting.Method],
  score: Callable[[Any], Any],
  proposals: Iterable[Numbers],
  *,
  traced: bool = True,
  chunk: int | None = None,
  only: Any = None,
) -> Found:
  """Returns the merge with the best score among many.

  For numbers without a derivative (a density), for scores without one (an
  accuracy), and for landscapes with several optima. A generation is merged
  and scored under one `vmap`, compiled once: numbers of a method are traced.

  Args:
    base: pytree of arrays; None for methods that need none.
    contributors: pytrees with the leaves of the base, or patches on it.
    method: called with a candidate's numbers, returns what `merge` takes.
    score: called with merged parameters, returns a number; larger is better,
      on data that is held out. NaN is worse than all.
    proposals: stacked candidates: `grid`, `uniform` or `cma_es`; or any
      iterable of them. A generator is sent the scores.
    traced: whether `score` can be traced by JAX. If not, candidates are
      merged one after the other.
    chunk: how many candidates are merged at once; by default all of a
      generation. Each takes the memory of a model.
    only: selector of the leaves to merge; the others stay the base's.

  Returns:
    The best merge (the first, of equal scores), and what was tried.

  Raises:
    MismatchError: if a contributor does not fit; lists every leaf.
    NonFiniteError: if every score is NaN.
    StructureError: if there is no candidate.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = {"w": np.zeros(2, "f")}, {"w": np.ones(2, "f")}
    >>> found = pj.merging.search_numbers(
    ...   base, [tuned], lambda n: pj.merging.task_arithmetic(scale=n["scale"]),
    ...   lambda p: -abs(p["w"].sum() - 1.4),
    ...   pj.merging.learning.grid({"scale": [0.25, 0.5, 0.75, 1.0]}),
    ... )
    >>> float(found.numbers["scale"]), found.merged["w"].tolist()
    (0.75, [0.75, 0.75])
  """
  fitting.check_inputs(base, contributors, only)
  arrays, rebuild = fitting.parted((base, list(contributors)))

  def merged(numbers, arrays):
    held, given = rebuild(arrays)
    return running.merge(held, given, method(numbers), only=only)

  @jax.jit
  def together(candidates, arrays):
    def one(numbers):
      return score(merged(numbers, arrays))

    if chunk is None:
      return jax.vmap(one)(candidates)
    return jax.lax.map(one, candidates, batch_size=chunk)

  def apart(candidates, arrays):
    return [
      float(score(merged(_at(candidates, i), arrays)))
      for i in range(_count(candidates))
    ]

  tried, scores = [], []
  source = iter(proposals)
  candidates = next(source, None)
  while candidates is not None:
    run = together if traced else apart
    found = np.asarray(jax.device_get(run(candidates, arrays)), np.float32)
    tried.append(candidates)
    scores.append(found)
    candidates = _next(source, found)
  if not tried:
    raise StructureError("there is no candidate: proposals is empty")
  every = jax.tree.map(lambda *parts: np.concatenate(parts), *tried)
  values = np.concatenate(scores)
  if np.isnan(values).all():
    raise NonFiniteError(
      f"the scores of all {values.size} candidates are NaN; look at the "
      "merge of one of them"
    )
  best = int(np.nanargmax(values))
  numbers = _at(every, best)
  final = running.merge(base, contributors, method(numbers), only=only)
  return Found(final, numbers, float(values[best]), every, values)


def _at(candidates: Numbers, i: int) -> Numbers:
  return jax.tree.map(lambda x: x[i], candidates)


def _count(candidates: Numbers) -> int:
  return len(jax.tree.leaves(candidates)[0])


def _next(source: Any, scores: np.ndarray) -> Numbers | None:
  if not hasattr(source, "send"):
    return next(source, None)
  try:
    return source.send(scores)
  except StopIteration:
    return None
