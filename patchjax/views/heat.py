"""heat_map: a conflict report as leaves x pairs of contributors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchjax.merging.conflict.report import pairs_of
from patchjax.views.figures import new_figure, shortened
from patchjax.views.grouping import Row, grouped

if TYPE_CHECKING:
  from patchjax.merging import ConflictReport

What = Literal["cosine", "sign", "overlap", "ggn"]

_CELL = 0.2
"""Height of a row, in inches: the smallest that text of 7 points can have."""

_WRITTEN = 12
"""Up to so many columns the numbers are written into the cells."""

_GREY = "0.85"
"""Of cells without a number: in none of the colour maps."""


@dataclasses.dataclass(frozen=True)
class _Scale:
  """How one measure is coloured.

  Attributes:
    value: `(row, i, j)`: the number, NaN where there is none.
    label: of the colour bar, with the unit.
    title: of the picture.
    colours: name of a colour map of matplotlib: perceptually uniform, or with
      a light middle where numbers lie on both sides of one that means
      nothing.
    ends: `(rows of numbers) -> (lowest, highest)` of the colours.
    grey: why a cell may have no number.
    text: how a number is written into its cell.
  """

  value: Callable[[Row, int, int], float]
  label: str
  title: str
  colours: str
  ends: Callable[[np.ndarray], tuple[float, float]]
  grey: str
  text: Callable[[float], str]


def _percent(numbers: np.ndarray) -> tuple[float, float]:
  del numbers
  return 0.0, 100.0


def _overlaps(numbers: np.ndarray) -> tuple[float, float]:
  most = np.max(numbers, initial=0.0, where=np.isfinite(numbers))
  return 0.0, next(end for end in (5.0, 25.0, 50.0, 100.0) if most <= end)


def _cosines(numbers: np.ndarray) -> tuple[float, float]:
  """A few fixed ends, so that pictures can be compared."""
  most = np.max(np.abs(numbers), initial=0.0, where=np.isfinite(numbers))
  end = next(end for end in (0.2, 0.5, 1.0) if most <= end or end == 1.0)
  return -end, end


def _largest(numbers: np.ndarray) -> tuple[float, float]:
  """The largest leaf: the total, the sum of them, would pale them all."""
  rows = numbers[1:] if len(numbers) > 1 else numbers
  most = np.max(np.abs(rows), initial=0.0, where=np.isfinite(rows))
  return (-float(most), float(most)) if most else (-1.0, 1.0)


def _share(part: int, whole: int) -> float:
  return 100 * part / whole if whole else math.nan


def _cosine(row: Row, i: int, j: int) -> float:
  scale = math.sqrt(row.products[i, i]) * math.sqrt(row.products[j, j])
  return row.products[i, j] / scale if scale else math.nan


def _sign(row: Row, i: int, j: int) -> float:
  return _share(row.opposite[i, j], row.entries[i, j])


def _overlap(row: Row, i: int, j: int) -> float:
  either = row.entries[i, i] + row.entries[j, j] - row.entries[i, j]
  return _share(row.entries[i, j], either)


def _ggn(row: Row, i: int, j: int) -> float:
  return math.nan if row.ggn is None else row.ggn[i, j]


_SCALES = {
  "cosine": _Scale(
    _cosine,
    "cosine between the two changes",
    "Cosine between contributors' changes",
    "RdBu",
    _cosines,
    "one of the two changes nothing",
    "{:+.2f}".format,
  ),
  "sign": _Scale(
    _sign,
    "opposite signs, % of the entries both change (chance: 50)",
    "Sign disagreement between contributors",
    "RdBu_r",
    _percent,
    "no entry is changed by both",
    "{:.0f}".format,
  ),
  "overlap": _Scale(
    _overlap,
    "changed by both, % of the entries either changes",
    "Overlap of the entries contributors change",
    "viridis",
    _overlaps,
    "nothing is changed by either",
    "{:.1f}".format,
  ),
  "ggn": _Scale(
    _ggn,
    "$d_i^T G\\,d_j$, nats a probe",
    "Gauss-Newton cross term between contributors",
    "RdBu_r",
    _largest,
    "no number",
    "{:+.1e}".format,
  ),
}


def heat_map(
  report: ConflictReport, what: What = "cosine", *, rows: int = 60
) -> Any:
  """Returns a picture of a conflict report: leaves x pairs of contributors.

  The first row is the total. If there are more leaves than `rows`, those
  below one prefix are put together, deepest first, with `(n)` behind the
  prefix: counts and GGN terms are added; cosines are those of all their
  entries together. Grey cells have no number: one of the two does not change
  the leaf.

  Args:
    report: what `pj.merging.conflicts` gave.
    what: "cosine": in red what points against each other; "sign": per cent of
      the entries both change, with opposite signs, in red what is above
      chance; "overlap": per cent of the entries either changes, changed by
      both; "ggn": the cross term `d_i^T G d_j` in nats a probe, in red what
      costs more together than alone (needs probes), coloured by the largest
      row below the total.
    rows: how many rows there may be.

  Returns:
    A `matplotlib.figure.Figure`; `figure.savefig("conflicts.png")` writes it.

  Raises:
    ValueError: if `what` is not one of these, the report has fewer than two
      contributors, or it has no GGN terms.
    ImportError: without matplotlib.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 3], [-1, 3]))
    >>> figure = pj.views.heat_map(pj.merging.conflicts(base, [a, b]))
    >>> figure.axes[0].get_title()
    "Cosine between contributors' changes"
  """
  if what not in _SCALES:
    raise ValueError(f"what={what!r}: expected one of {', '.join(_SCALES)}")
  pairs = pairs_of(len(report.total.norms))
  if not pairs:
    raise ValueError("a picture of pairs needs two contributors or more")
  if what == "ggn" and report.total.ggn is None:
    raise ValueError(
      "the report has no GGN terms: give conflicts(...) probes and apply_fn"
    )
  scale = _SCALES[what]
  shown = [Row.of(report.total), *grouped(report.leaves, max(rows - 1, 1))]
  numbers = np.array(
    [[scale.value(row, i, j) for i, j in pairs] for row in shown]
  )
  return _draw(
    numbers,
    [shortened(row.name, 48) for row in shown],
    _columns(report.contributors, pairs),
    scale,
  )


def _columns(
  labels: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> list[str]:
  short = [
    shortened(label.removeprefix("contributor "), 24) for label in labels
  ]
  return [f"{short[i]} × {short[j]}" for i, j in pairs]


def _draw(
  numbers: np.ndarray,
  names: Sequence[str],
  columns: Sequence[str],
  scale: _Scale,
) -> Any:
  import matplotlib as mpl

  count, across = numbers.shape
  names_wide = 0.07 * max(map(len, names))
  slanted = max(map(len, columns)) > 6
  above = 0.3 + (0.04 * max(map(len, columns)) if slanted else 0.2)
  cell = 0.62 if across <= _WRITTEN else 0.4
  figure = new_figure(
    max(names_wide + cell * across + 1.6, 6), _CELL * count + above + 0.5
  )
  axes = figure.subplots()
  low, high = scale.ends(numbers)
  image = axes.pcolormesh(
    np.ma.masked_invalid(numbers),
    cmap=mpl.colormaps[scale.colours].with_extremes(bad=_GREY),
    vmin=low,
    vmax=high,
    edgecolors="white",
    linewidth=0.6,
  )
  axes.invert_yaxis()
  axes.set_yticks(np.arange(count) + 0.5, names, fontsize=7)
  axes.set_xticks(np.arange(across) + 0.5, columns, fontsize=7)
  axes.tick_params(length=0)
  axes.xaxis.tick_top()
  if slanted:
    for label in axes.get_xticklabels():
      label.set(rotation=40, ha="left", rotation_mode="anchor")
  axes.get_yticklabels()[0].set_weight("bold")
  axes.axhline(1, color="black", linewidth=1.2)
  for side in axes.spines.values():
    side.set_visible(False)
  axes.set_title(scale.title, fontsize=10)
  if not np.isfinite(numbers).all():
    axes.set_xlabel(f"grey: {scale.grey}", fontsize=7)
  if across <= _WRITTEN:
    _write(axes, numbers, image, scale)
  over = np.any(np.abs(numbers) > high, where=np.isfinite(numbers))
  bar = figure.colorbar(
    image,
    ax=axes,
    shrink=min(1, 3 / (_CELL * count)),
    anchor=(0, 1),
    extend="both" if over else "neither",
  )
  bar.set_label(scale.label, fontsize=8)
  bar.ax.tick_params(labelsize=7)
  bar.formatter.set_powerlimits((-2, 3))
  bar.ax.yaxis.get_offset_text().set_fontsize(7)
  bar.outline.set_visible(False)
  return figure


def _write(axes: Any, numbers: np.ndarray, image: Any, scale: _Scale) -> None:
  """Writes each number into its cell, light on dark and dark on light."""
  for (y, x), number in np.ndenumerate(numbers):
    if not np.isfinite(number):
      continue
    red, green, blue, _ = image.cmap(image.norm(number))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    axes.text(
      x + 0.5,
      y + 0.5,
      scale.text(number),
      ha="center",
      va="center",
      fontsize=6,
      color="white" if dark else "black",
    )
