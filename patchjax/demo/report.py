"""What the demo found: one row a version, and whether the story held."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.trees.report import size_text, table


@dataclasses.dataclass
class Cost:
  """Seconds that something took.

  Attributes:
    cpu: process time, over all threads.
    wall: time on the clock.
  """

  cpu: float = 0.0
  wall: float = 0.0

  def __enter__(self) -> "Cost":
    self._start = time.process_time(), time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    self.cpu += time.process_time() - self._start[0]
    self.wall += time.perf_counter() - self._start[1]

  def __str__(self) -> str:
    return f"{self.cpu:.1f} CPU-s ({self.wall:.1f} s)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One version in the final table.

  Attributes:
    version: release or name of the branch.
    author: whose work it is.
    kind: what kind of change.
    nbytes: bytes of the patch file; None for a whole checkpoint.
    scores: right or wrong by test, the 0/1 outcomes.
    verdict: what the gate said.
  """

  version: str
  author: str
  kind: str
  nbytes: int | None
  scores: Mapping[str, np.ndarray]
  verdict: str


def interval(outcomes: np.ndarray, *, digits: int = 1) -> str:
  """Mean and half width of its 95 % interval, in points.

  Args:
    outcomes: right or wrong, `[n]`.
    digits: of the half width.

  Example:
    >>> interval(np.arange(1000) < 900)
    '90.0±1.9'
  """
  x = np.asarray(outcomes, np.float64)
  half = 1.96 * x.std() / math.sqrt(x.size)
  return f"{100 * x.mean():.1f}±{100 * half:.{digits}f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """The result of the demo; print it.

  Attributes:
    directory: where the repository lies.
    lines: one a version.
    checkpoint: bytes of the model in float32.
    releases: versions that were released.
    rejected: branches that the gate did not let pass.
    problems: what the story promises and the data did not give; empty if all
      went as told.
    facts: measured numbers by name, for programs.
    cost: of the whole.
  """

  directory: str
  lines: tuple[Line, ...]
  checkpoint: int
  releases: tuple[str, ...]
  rejected: tuple[str, ...]
  problems: tuple[str, ...]
  facts: Mapping[str, Any]
  cost: Cost

  def __str__(self) -> str:
    tasks = [name for name in self.lines[0].scores if "-" not in name]
    rows = []
    for line in self.lines:
      held = self.checkpoint if line.nbytes is None else line.nbytes
      rows.append(
        [
          line.version,
          line.author,
          line.kind,
          f"{held / 1e6:.2f}",
          *(
            interval(line.scores[task], digits=0) if task in line.scores else ""
            for task in tasks
          ),
          line.verdict,
        ]
      )
    columns = ["version", "author", "kind", "MB", *tasks, "verdict"]
    text = table(columns, rows)
    text += (
      "\nMB: of the patch file (of a merge: of its difference to 1.0.0) or the"
      f" {size_text(self.checkpoint)} checkpoint;\nscores on test texts, in"
      " points, with the half width of a 95 % interval"
    )
    released = ", ".join(self.releases) or "nothing"
    rejected = ", ".join(self.rejected) or "nothing"
    text += f"\n\nreleased: {released}\nrejected: {rejected}"
    text += f"\n{self.cost}; repository: {self.directory}"
    for problem in self.problems:
      text += f"\nnot as told: {problem}"
    return text
