"""Rows of a picture: leaves, put together below prefixes until they fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from patchjax.merging.conflict import LeafConflict


@dataclasses.dataclass(frozen=True)
class Row:
  """What leaves add up to: k x k sums, of one leaf or of several.

  Attributes:
    name: of the leaf, or `prefix/* (n)`.
    size: how many numbers.
    entries: Python integers: how many both change.
    opposite: Python integers: how many both change with opposite signs.
    products: inner products.
    ggn: GGN products, or None.
  """

  name: str
  size: int
  entries: np.ndarray
  opposite: np.ndarray
  products: np.ndarray
  ggn: np.ndarray | None

  @classmethod
  def of(cls, leaf: LeafConflict) -> Row:
    """Returns the row of one leaf.

    Args:
      leaf: of a report.
    """
    return cls(
      leaf.name,
      leaf.size,
      np.array(leaf.entries, object),
      np.array(leaf.opposite, object),
      np.array(leaf.cosines) * np.outer(leaf.norms, leaf.norms),
      None if leaf.ggn is None else np.array(leaf.ggn),
    )

  def __add__(self, other: Row) -> Row:
    ggn = None
    if self.ggn is not None and other.ggn is not None:
      ggn = self.ggn + other.ggn
    return Row(
      self.name,
      self.size + other.size,
      self.entries + other.entries,
      self.opposite + other.opposite,
      self.products + other.products,
      ggn,
    )


def grouped(leaves: Sequence[LeafConflict], most: int) -> list[Row]:
  """Returns at most `most` rows, each a leaf or all leaves below a prefix.

  The deepest level of names at which the rows fit is taken. If not even the
  first parts fit, the largest rows are kept and the rest put together.
  Numbers in names are sorted as numbers.

  Args:
    leaves: of a report.
    most: how many rows there may be, at least 1.
  """
  rows = sorted(map(Row.of, leaves), key=lambda row: _natural(row.name))
  depth = max((row.name.count("/") + 1 for row in rows), default=0)
  groups: dict[str, list[Row]] = {}
  for level in range(depth, 0, -1):
    groups = {}
    for row in rows:
      prefix = "/".join(row.name.split("/")[:level])
      groups.setdefault(prefix, []).append(row)
    if len(groups) <= most:
      break
  made = [_together(f"{name}/*", group) for name, group in groups.items()]
  if len(made) <= most:
    return made
  large = sorted(made, key=lambda row: -row.size)[: most - 1]
  kept = {row.name for row in large}
  rest = [
    row
    for name, group in groups.items()
    if _together(f"{name}/*", group).name not in kept
    for row in group
  ]
  return [*(r for r in made if r.name in kept), _together("others", rest)]


def _together(name: str, rows: Sequence[Row]) -> Row:
  if len(rows) == 1:
    return rows[0]
  total = sum(rows[1:], rows[0])
  return dataclasses.replace(total, name=f"{name} ({len(rows)})")


def _natural(name: str) -> list[tuple[bool, int, str]]:
  """A key by which layers_2 comes before layers_10."""
  parts = re.split(r"(\d+)", name)
  return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
