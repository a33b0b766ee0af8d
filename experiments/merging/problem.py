"""What a method is given: a base, specialists, texts, and what it measures."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import patchjax as pj
from experiments.merging.encoder import Encoder, Params, Pool, Texts
from experiments.merging.settings import Settings


def timed(
  function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, float]:
  """Returns a result and the CPU-seconds of all threads that it took.

  Args:
    function: what to run; arrays that it returns are waited for.
    *arguments: for it.
    **options: for it.
  """
  before = time.process_time()
  result = jax.block_until_ready(function(*arguments, **options))
  return result, time.process_time() - before


@dataclasses.dataclass
class Problem:
  """Eight specialists of one seed, to be merged.

  Attributes:
    encoder: the base, its heads and texts.
    settings: of the experiment.
    seed: of methods that draw numbers.
    patches: the specialists, in the order of the encoder's tasks.
    validation: texts that settings are chosen on.
    test: texts that the table is about; methods see no label of theirs.
    train: the first training texts of each task, made when it is first asked
      for.
    unions: patches trained on all tasks, each with its CPU-seconds.
    training: CPU-seconds of training the specialists.
    costs: CPU-seconds of every statistic that was taken, not compiled.
    spent: CPU-seconds of all statistics, with their compilation.
  """

  encoder: Encoder
  settings: Settings
  seed: int
  patches: Sequence[pj.Patch]
  validation: Pool
  test: Pool
  train: Callable[[], Texts]
  unions: Mapping[str, tuple[pj.Patch, float]]
  training: float
  costs: dict[str, float] = dataclasses.field(default_factory=dict)
  spent: float = 0.0
  _known: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  _models: list[Params] = dataclasses.field(default_factory=list)

  @property
  def base(self) -> Params:
    """The upper layers of the base."""
    return self.encoder.base

  @property
  def models(self) -> list[Params]:
    """The upper layers of the specialists."""
    if not self._models:
      self._models += [pj.apply(self.base, patch) for patch in self.patches]
    return self._models

  def texts(self, number: int) -> Texts:
    """The training texts of a task that statistics are taken over."""
    texts = self.train()
    own = np.flatnonzero(texts[2] == number)
    x, mask, task, labels = (part[own] for part in texts)
    return x, mask, task, labels

  def statistic(self, name: str, take: Callable[[int], Any]) -> tuple[Any, ...]:
    """What `take` says of each specialist, measured once.

    Args:
      name: of the statistic.
      take: from the number of a specialist to what is measured of it.
    """
    if name not in self._known:
      found, costs = zip(
        *(timed(take, number) for number in range(len(self.patches)))
      )
      self._known[name] = found
      # The first one compiles, the others do the same work again.
      self.costs[name] = len(costs) * statistics.median(costs)
      self.spent += sum(costs)
    return self._known[name]
