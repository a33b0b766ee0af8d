"""Timing that survives a noisy machine: interleaved, medians, ratios.

Functions are run in turn, A B A B ..., so that a slow minute hits all of them,
and compared by the median of their ratios within a round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
  """What one function took, a number a round.

  Attributes:
    wall: seconds on the clock.
    cpu: seconds of this process on all cores.
  """

  wall: tuple[float, ...]
  cpu: tuple[float, ...]

  def ratio(self, other: Timing, what: str = "cpu") -> float:
    """Median over rounds of `other`'s time as a multiple of this one's."""
    pairs = zip(getattr(self, what), getattr(other, what), strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def interleaved(
  functions: Mapping[str, Callable[[], Any]], *, rounds: int = 5
) -> dict[str, Timing]:
  """Times functions in turn, after one round that is not counted.

  Args:
    functions: by name; arrays they return are waited for.
    rounds: how often each is counted.
  """
  wall: dict[str, list[float]] = {name: [] for name in functions}
  cpu: dict[str, list[float]] = {name: [] for name in functions}
  for counted in range(rounds + 1):
    for name, function in functions.items():
      start, used = time.perf_counter(), time.process_time()
      jax.block_until_ready(function())
      if counted:
        wall[name].append(time.perf_counter() - start)
        cpu[name].append(time.process_time() - used)
  return {n: Timing(tuple(wall[n]), tuple(cpu[n])) for n in functions}


def copy_bandwidth(size: int = 1 << 27) -> float:
  """Bytes a second that numpy reads and writes copying between two buffers."""
  source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
  timing = interleaved({"copy": lambda: np.copyto(target, source)})["copy"]
  return 2 * size / statistics.median(timing.wall)


def milliseconds(seconds: tuple[float, ...]) -> str:
  """The median, for a table."""
  return f"{1e3 * statistics.median(seconds):,.0f}"
