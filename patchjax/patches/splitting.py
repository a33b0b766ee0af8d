"""Methods with a step that is too dear to be made again for every pass.

What a later step counts in is computed anew in each of its passes, so that no
copy of the model is kept. Behind a decomposition that is the wrong bargain:
there the method is cut in two, what the first part makes of every leaf is
kept, and the second part reads it as its contributors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from patchjax.patches import transform
from patchjax.patches.perleaf import PerLeaf
from patchjax.patches.transform import Step, Transform


def cut_of(method: Transform) -> int | None:
  """Returns how many stages are made once, before what counts behind them.

  Args:
    method: a transform.

  Returns:
    the number of stages up to the last dear one that a counting stage comes
    after; None if there is no such stage.
  """
  counting = [
    index
    for index, stage in enumerate(method.stages)
    if transform.scope_of(*stage) != "none"
  ]
  dear = [
    index
    for index, (step, _) in enumerate(method.stages)
    if step.dear and any(index < later for later in counting)
  ]
  return dear[-1] + 1 if dear else None


def first_part(method: Transform, cut: int) -> Transform:
  """Returns the stages that are made once.

  Args:
    method: a transform.
    cut: their number.
  """
  return Transform(method.numbers[:cut], method.stages[:cut])


def second_part(
  method: Transform,
  state: Sequence[Any],
  cut: int,
  held: Mapping[str, Sequence[Any]],
) -> tuple[Transform, tuple[Any, ...]]:
  """Returns the stages after the cut, and their state.

  Brackets that are open at the cut are opened there again, with what they
  hold.

  Args:
    method: a transform.
    state: of its stages.
    cut: how many were made.
    held: of each leaf, what its open brackets hold, the first one first.
  """
  opened: list[int] = []
  for index, (step, _) in enumerate(method.stages[:cut]):
    if step.bracket == "opens":
      opened.append(index)
    elif step.bracket == "closes":
      opened.pop()
  numbers = tuple(
    {"held": PerLeaf({name: one[i] for name, one in held.items()})}
    for i in range(len(opened))
  )
  again = tuple(
    (_reopening(step), options)
    for step, options in (method.stages[i] for i in opened)
  )
  second = Transform(
    ({},) * len(opened) + method.numbers[cut:], again + method.stages[cut:]
  )
  return second, (*numbers, *state[cut:])


@functools.lru_cache(maxsize=64)
def _reopening(step: Step) -> Step:
  """Returns a step that opens a bracket as another one did before."""
  return dataclasses.replace(step, update=_reopened, dear=False)


def _reopened(leaf, deltas, base, state, shared, **options):
  del leaf, base, shared, options
  return deltas, state["held"]
