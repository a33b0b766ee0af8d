"""What a section of the history benchmark says: tables and targets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from experiments.bench.timing import Timing
from patchjax.trees import report

_WIDTH = 132


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    title: what it shows.
    columns: the headings.
    rows: as many cells a row.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]

  def text(self, *, markdown: bool) -> str:
    """Returns the table for a terminal, or for a README.

    Args:
      markdown: which of the two.
    """
    if not markdown:
      return report.table(
        self.columns, self.rows, title=self.title, width=_WIDTH
      )
    lines = [self.columns, ["---"] * len(self.columns), *self.rows]
    spelled = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"**{self.title}**", "", *spelled])


@dataclasses.dataclass(frozen=True)
class Target:
  """A goal, and whether it was reached.

  Attributes:
    what: what is measured.
    goal: what it is to be.
    measured: what it is.
    met: whether that is enough.
  """

  what: str
  goal: str
  measured: str
  met: bool

  @classmethod
  def at_most(
    cls, what: str, measured: float, goal: float, unit: str
  ) -> Target:
    """Returns a target that a number must not exceed.

    Args:
      what: what is measured.
      measured: the number.
      goal: the largest that is good enough.
      unit: follows both.
    """
    return cls(
      what, f"<= {goal:g}{unit}", f"{measured:.3g}{unit}", measured <= goal
    )


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section found.

  Attributes:
    tables: to be printed in this order.
    targets: to be printed with those of the other sections, at the end.
    remarks: lines on what could not be measured, and why.
  """

  tables: Sequence[Table] = ()
  targets: Sequence[Target] = ()
  remarks: Sequence[str] = ()


def targets_table(targets: Sequence[Target]) -> Table:
  """Returns all targets as a table.

  Args:
    targets: of all sections.
  """
  rows = [
    (t.what, t.goal, t.measured, "yes" if t.met else "NO") for t in targets
  ]
  met = sum(t.met for t in targets)
  return Table(
    f"targets: {met} of {len(targets)} reached",
    ("what", "target", "measured", "reached"),
    rows,
  )


def times(timing: Timing) -> str:
  """Returns CPU and wall milliseconds for a cell.

  Args:
    timing: of all rounds.
  """
  cpu, wall = statistics.median(timing.cpu), statistics.median(timing.wall)
  return f"{1e3 * cpu:,.0f} / {1e3 * wall:,.0f}"


def megabytes(count: float) -> str:
  """Returns megabytes for a cell.

  Args:
    count: bytes.
  """
  return f"{count / 1e6:,.3g}" if count < 1e9 else f"{count / 1e6:,.0f}"
