"""Which steps of a training run are kept: the rules, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Metrics = Callable[[int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
  """Rules; a step is kept if any of them keeps it. Without rules all are.

  Attributes:
    last: how many of the newest steps to keep.
    every: keep steps that are multiples of this, for good.
    best: a metric, and whether "min" or "max" is better.

  Example:
    >>> rules = Retention(last=2, every=5, best=("loss", "min"))
    >>> loss = {n: {"loss": abs(n - 3)} for n in range(1, 9)}
    >>> sorted(rules.kept(range(1, 9), loss.__getitem__))
    [3, 5, 7, 8]
  """

  last: int | None = None
  every: int | None = None
  best: tuple[str, Literal["min", "max"]] | None = None

  def __post_init__(self):
    for name, number in (("keep_last", self.last), ("keep_every", self.every)):
      check_count(name, number)
    if self.best is not None and (
      len(self.best) != 2 or self.best[1] not in ("min", "max")
    ):
      raise ValueError(
        f'keep_best={self.best!r}: expected (metric, "min") or (metric, "max")'
      )

  def for_good(self, step: int) -> bool:
    """Returns whether a step will be kept whatever comes after it.

    Args:
      step: the step.
    """
    if (self.last, self.every, self.best) == (None, None, None):
      return True
    return self.every is not None and step % self.every == 0

  def kept(self, steps: Sequence[int], metrics: Metrics) -> set[int]:
    """Returns the steps to keep.

    Args:
      steps: those there are, in order. The newest is what a run goes on from,
        and is kept whatever the rules say.
      metrics: returns the metrics of a step by name.
    """
    kept = {step for step in steps if self.for_good(step)}
    kept |= set(steps[-(self.last or 1) :])
    best = None if self.best is None else self.best_of(steps, metrics)
    return kept if best is None else kept | {best}

  def best_of(self, steps: Sequence[int], metrics: Metrics) -> int | None:
    """Returns the step with the best metric, of equals the newest.

    Args:
      steps: the steps.
      metrics: returns the metrics of a step by name.

    Raises:
      ValueError: if there is no rule that says what is best.
    """
    if self.best is None:
      raise ValueError(
        'which step is best? Give keep_best=(metric, "min" or "max")'
      )
    name, mode = self.best
    sign = 1 if mode == "max" else -1
    values = {step: metrics(step).get(name, math.nan) for step in steps}
    scores = {
      step: (sign * value, step)
      for step, value in values.items()
      if not math.isnan(value)
    }
    return max(scores, key=lambda step: scores[step], default=None)


def check_count(name: str, number: int | None) -> None:
  """Refuses what is no count of steps.

  Args:
    name: name of the argument.
    number: its value; None is none.

  Raises:
    ValueError: if it is no whole number of at least 1.
  """
  if number is not None and (not isinstance(number, int) or number < 1):
    raise ValueError(
      f"{name}={number!r}: expected a whole number of at least 1"
    )
