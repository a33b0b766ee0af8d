"""Tables as plain text: for terminals, logs, messages and documents."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|[kMGT]?B|s|x|pt))?|-|")


def table(
  columns: Sequence[str],
  rows: Iterable[Sequence[Any]],
  *,
  title: str | None = None,
  width: int = 100,
) -> str:
  """Returns a table as plain text, without colours or trailing spaces.

  Columns that hold only numbers stand to the right. Cells that would make the
  table wider than `width` are folded.

  Args:
    columns: the headings.
    rows: as many cells a row; `str` is called on each.
    title: a line above the table.
    width: the largest number of characters a line.

  Example:
    >>> print(table(["leaf", "changed"], [["dense/kernel", 12], ["out", 7]]))
     leaf           changed
    ------------------------
     dense/kernel        12
     out                  7
  """
  from rich import box, console
  from rich import table as rich_table

  cells = [[str(cell) for cell in row] for row in rows]
  # rich's SIMPLE_HEAD in plain ASCII.
  lines = ["    "] * 8
  lines[2] = " -- "
  grid = rich_table.Table(
    box=box.Box("\n".join(lines) + "\n", ascii=True),
    show_edge=False,
    pad_edge=True,
    padding=(0, 1),
  )
  for i, column in enumerate(columns):
    numeric = all(_NUMBER.fullmatch(row[i]) for row in cells)
    grid.add_column(
      column,
      justify="right" if numeric else "left",
      overflow="fold",
    )
  for row in cells:
    grid.add_row(*row)
  out = io.StringIO()
  console.Console(
    file=out,
    width=width,
    color_system=None,
    force_terminal=False,
    force_jupyter=False,
    legacy_windows=False,
    markup=False,
    highlight=False,
    emoji=False,
  ).print(grid)
  lines = out.getvalue().rstrip().split("\n")
  text = "\n".join(line.rstrip() for line in lines)
  return f"{title}\n{text}" if title else text


def size_text(count: int | float) -> str:
  """Returns a number of bytes for a person to read.

  Args:
    count: bytes.

  Example:
    >>> size_text(512), size_text(426_000)
    ('512 B', '426.0 kB')
  """
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      break
    count /= 1000
  return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
