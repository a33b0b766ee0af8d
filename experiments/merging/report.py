"""The table, as CSV and markdown, and the figure."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.merging import paired
from experiments.merging.measuring import Result
from patchjax.views import figures

REFERENCE = "task_arithmetic"
"""What every row is compared with."""

Seeds = Mapping[str, Sequence[Result]]
"""The results of a row, one a seed."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table; accuracies are shares, not percent.

  Attributes:
    name: of the method or baseline.
    family: of the method, or "baseline".
    data: what it reads beside the models.
    accuracy: mean over seeds and tasks.
    error: its standard error.
    gain: difference to tuned task arithmetic.
    gain_error: its standard error, paired over seeds and texts.
    recovered: share of the way from the base to the specialists.
    tasks: accuracy on each task, the mean of the seeds.
    cost: CPU-seconds of the merge or training, the median of the seeds.
    statistics: CPU-seconds of the statistics.
    tried: settings scored on validation texts.
    options: what each seed chose.
  """

  name: str
  family: str
  data: str
  accuracy: float
  error: float
  gain: float
  gain_error: float
  recovered: float
  tasks: Sequence[float]
  cost: float
  statistics: float
  tried: int
  options: Sequence[Mapping[str, Any]]


def rows(
  results: Seeds,
  families: Mapping[str, tuple[str, str]],
  task: np.ndarray,
) -> list[Row]:
  """Returns the rows, in the order of `results`.

  Args:
    results: of every row; `base`, `specialists` and `REFERENCE` are needed.
    families: family and data of every row.
    task: number of each test text's task.
  """

  def outcomes(name: str) -> np.ndarray:
    return np.stack([r.outcomes for r in results[name]]).astype(np.float64)

  low, high = (
    paired.mean(outcomes(name), task) for name in ("base", "specialists")
  )
  against = outcomes(REFERENCE)
  found = []
  for name, seeds in results.items():
    own = outcomes(name)
    accuracy = paired.mean(own, task)
    by_text = own.mean(axis=0)
    found.append(
      Row(
        name,
        *families[name],
        accuracy,
        paired.standard_error(own, task),
        paired.mean(own - against, task),
        paired.standard_error(own - against, task),
        (accuracy - low) / (high - low) if high != low else float("nan"),
        [float(by_text[task == t].mean()) for t in range(task.max() + 1)],
        float(np.median([r.cost for r in seeds])),
        float(np.median([r.statistics for r in seeds])),
        max(r.tried for r in seeds),
        [r.options for r in seeds],
      )
    )
  return found


def write_csv(
  path: pathlib.Path, table: Sequence[Row], names: Sequence[str]
) -> None:
  """Writes all that is known of the rows.

  Args:
    path: of the file.
    table: the rows.
    names: of the tasks.
  """
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    fields = [f.name for f in dataclasses.fields(Row) if f.name != "tasks"]
    writer.writerow([*fields, *names])
    for row in table:
      held = {name: getattr(row, name) for name in fields}
      held["options"] = json.dumps(list(row.options))
      writer.writerow(
        [_rounded(held[name]) for name in fields]
        + [_rounded(value) for value in row.tasks]
      )


def _rounded(value: Any) -> Any:
  return f"{value:.5g}" if isinstance(value, float) else value


def markdown(table: Sequence[Row], names: Sequence[str]) -> str:
  """Returns the table, best rows first within methods; in percent.

  Args:
    table: the rows.
    names: of the tasks.
  """
  head = (
    "method",
    "accuracy",
    f"less {REFERENCE}",
    "recovered",
    *names,
    "tried",
    "chosen",
    "CPU-s",
    "reads",
  )
  lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
  ordered = sorted(table, key=lambda row: -row.accuracy)
  for row in ordered:
    label = f"**{row.name}**" if row.family == "baseline" else row.name
    lines.append(
      _line(
        [
          label,
          f"{100 * row.accuracy:.1f} ± {100 * row.error:.1f}",
          f"{100 * row.gain:+.1f} ± {100 * row.gain_error:.1f}",
          f"{100 * row.recovered:.0f} %",
          *(f"{100 * value:.0f}" for value in row.tasks),
          row.tried or "",
          chosen(row.options),
          cost(row),
          row.data,
        ]
      )
    )
  return "\n".join(lines) + "\n"


def cost(row: Row) -> str:
  """The cost as the table says it: of statistics, plus of the merge."""
  if not np.isfinite(row.cost):
    return ""
  own = f"{row.cost:.2g}" if row.cost < 10 else f"{row.cost:.0f}"
  return f"{row.statistics:.0f} + {own}" if row.statistics else own


def chosen(options: Sequence[Mapping[str, Any]]) -> str:
  """What most seeds chose, the first of these."""
  said = [", ".join(f"{k} {v}" for k, v in o.items()) for o in options]
  return collections.Counter(said).most_common(1)[0][0] if said else ""


def _line(cells: Sequence[Any]) -> str:
  return "| " + " | ".join(map(str, cells)) + " |"


_COLOURS = {
  "sums": "#1f77b4",
  "signs and masks": "#17becf",
  "averages": "#7f7f7f",
  "robust": "#bcbd22",
  "spectra": "#d62728",
  "statistics": "#2ca02c",
  "learned": "#9467bd",
}


def draw(path: pathlib.Path, table: Sequence[Row]) -> None:
  """Draws accuracy against the CPU-seconds of a merge, statistics included.

  Args:
    path: of the PNG.
    table: the rows; baselines become lines.
  """
  figure = figures.new_figure(9.5, 6.2)
  axes = figure.add_subplot()
  methods = [row for row in table if row.family != "baseline"]
  for family, colour in _COLOURS.items():
    own = [row for row in methods if row.family == family]
    if own:
      axes.errorbar(
        [row.cost + row.statistics for row in own],
        [100 * row.accuracy for row in own],
        [100 * row.error for row in own],
        fmt="o",
        markersize=5,
        elinewidth=0.7,
        color=colour,
        label=family,
      )
  axes.set_xscale("log")
  axes.margins(x=0.12)  # room for names
  below = float("inf")
  lines = [row for row in table if row.family == "baseline"]
  for row in sorted(lines, key=lambda row: -row.accuracy):
    height = 100 * row.accuracy
    axes.axhline(height, color="black", lw=0.6, ls="--")
    below = min(height, below - _APART)
    axes.annotate(
      row.name,
      (1, below),
      xycoords=("axes fraction", "data"),
      xytext=(4, 0),
      textcoords="offset points",
      va="center",
      fontsize=8,
    )
  axes.set_xlabel("CPU-seconds of the merge, statistics included")
  axes.set_ylabel("accuracy, mean of the tasks (%)")
  axes.spines[["top", "right"]].set_visible(False)
  _label(figure, axes, methods)
  axes.legend(
    fontsize=8,
    framealpha=1,
    edgecolor="none",
    loc="lower right",
    bbox_to_anchor=(1, 0.1),
  )
  figure.savefig(path)


_APART = 0.5  # percent between names of lines


def _label(figure: Any, axes: Any, methods: Sequence[Row]) -> None:
  """Writes a name beside each point, where it covers no other text."""
  figure.canvas.draw()
  places = [
    axes.transData.transform((row.cost + row.statistics, 100 * row.accuracy))
    for row in methods
  ]
  taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
  unit = figure.dpi / 72
  for row, (x, y) in sorted(zip(methods, places), key=lambda p: -p[1][1]):
    wide, high = 4.1 * len(row.name) * unit, 7.5 * unit
    for dx, dy in _AROUND:
      left = x + dx * unit - (wide if dx < 0 else 0)
      low = y + dy * unit - high / 2
      box = (left, low, left + wide, low + high)
      if not any(_meet(box, other) for other in taken):
        break
    else:
      continue
    taken.append(box)
    axes.annotate(
      row.name,
      (row.cost + row.statistics, 100 * row.accuracy),
      xytext=(dx, dy),
      textcoords="offset points",
      ha="right" if dx < 0 else "left",
      va="center",
      fontsize=7,
      color=_COLOURS[row.family],
    )


_AROUND = [
  (side * dx, sign * dy)
  for dy in (0, 5, 9, 14, 19, 25)
  for dx in (5, 9, 16)
  for side in (1, -1)
  for sign in (1, -1)
]


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
