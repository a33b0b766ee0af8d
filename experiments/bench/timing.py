"""Timing that survives a noisy machine: interleaved, medians, ratios.

Functions are run in turn, A B A B ..., so that a slow minute hits all of them,
and compared by the median of their ratios within a round.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import resource
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
    cpu: seconds of this process and of its children, on all cores.
  """

  wall: tuple[float, ...]
  cpu: tuple[float, ...]

  def ratio(self, other: Timing, what: str = "cpu") -> float:
    """Median over rounds of `other`'s time as a multiple of this one's."""
    pairs = zip(getattr(self, what), getattr(other, what), strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one call took.

  Attributes:
    wall: seconds on the clock.
    cpu: seconds of this process and of its children, on all cores.
  """

  wall: float
  cpu: float


def cost(function: Callable[[], Any]) -> Cost:
  """Calls a function and returns what it took.

  Args:
    function: arrays it returns are waited for; child processes count once
      they have ended.
  """
  start, used = time.perf_counter(), _cpu()
  jax.block_until_ready(function())
  return Cost(time.perf_counter() - start, _cpu() - used)


def joined(costs: list[Cost]) -> Timing:
  """Returns what a function took in every round.

  Args:
    costs: one a round.
  """
  return Timing(tuple(c.wall for c in costs), tuple(c.cpu for c in costs))


def interleaved(
  functions: Mapping[str, Callable[[], Any]], *, rounds: int = 5
) -> dict[str, Timing]:
  """Times functions in turn, after one round that is not counted.

  Args:
    functions: by name; arrays they return are waited for.
    rounds: how often each is counted.
  """
  costs: dict[str, list[Cost]] = {name: [] for name in functions}
  for counted in range(rounds + 1):
    for name, function in functions.items():
      taken = cost(function)
      if counted:
        costs[name].append(taken)
  return {name: joined(taken) for name, taken in costs.items()}


def copy_bandwidth(size: int = 1 << 27) -> float:
  """Bytes a second that numpy reads and writes copying between two buffers."""
  source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
  timing = interleaved({"copy": lambda: np.copyto(target, source)})["copy"]
  return 2 * size / statistics.median(timing.wall)


def hash_bandwidth(size: int = 1 << 27) -> tuple[float, float]:
  """Bytes a second that SHA-256 reads, on one core and on all.

  Args:
    size: bytes hashed at a time.
  """
  cores = os.cpu_count() or 1
  data = np.ones(size, np.uint8).data
  parts = [data[i * size // cores :][: size // cores] for i in range(cores)]

  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    taken = interleaved(
      {
        "one": lambda: hashlib.sha256(data).digest(),
        "all": lambda: list(pool.map(_digest, parts)),
      },
      rounds=3,
    )
  one, every = (statistics.median(taken[k].wall) for k in ("one", "all"))
  return size / one, size / every


def milliseconds(seconds: tuple[float, ...]) -> str:
  """The median, for a table."""
  return f"{1e3 * statistics.median(seconds):,.0f}"


def _digest(data: memoryview) -> bytes:
  return hashlib.sha256(data).digest()


def _cpu() -> float:
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime
