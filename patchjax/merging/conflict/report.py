"""The report of `conflicts`: dataclasses, tables, JSON."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from patchjax.merging.conflict.findings import Finding
from patchjax.merging.conflict.measures import Tally
from patchjax.trees.report import table

Matrix = tuple[tuple[float, ...], ...]
Counts = tuple[tuple[int, ...], ...]

_ROWS = 40
"""Leaves in the printed table; `to_json` has all."""


@dataclasses.dataclass(frozen=True)
class LeafConflict:
  """How far contributors disagree in one leaf, or in all.

  Attributes:
    name: text name, or "total".
    size: how many numbers.
    some: how many of them anybody changes.
    several: how many at least two change.
    disputed: how many somebody raises and somebody lowers.
    entries: k x k: how many i and j change; on the diagonal i alone.
    opposite: k x k: how many i and j change with opposite signs.
    norms: Euclidean norm of each contributor's change.
    cosines: k x k cosines between changes; 0 where one of them is zero.
    against: k x k: of the magnitude of the entries that i and j change, the
      share that cancels in their sum: 0 where signs agree, 1/2 where
      `d_i = -d_j`.
    sign: the same of all contributors: the share of the magnitude, of entries
      that at least two change, against the sign of the entry's sum.
    ggn: k x k `d_i^T G d_j` in nats, with probes; of a leaf its part of the
      total.
  """

  name: str
  size: int
  some: int
  several: int
  disputed: int
  entries: Counts
  opposite: Counts
  norms: tuple[float, ...]
  cosines: Matrix
  against: Matrix
  sign: float
  ggn: Matrix | None = None

  @property
  def changed(self) -> float:
    """Share of the entries that some contributor changes."""
    return self.some / self.size if self.size else 0.0

  @property
  def overlap(self) -> float:
    """Share of the changed entries that at least two change."""
    return self.several / self.some if self.some else 0.0

  @property
  def sign_entries(self) -> float:
    """Share of the entries that several change where signs disagree."""
    return self.disputed / self.several if self.several else 0.0

  @property
  def cosine(self) -> float:
    """Mean cosine between the changes of two contributors."""
    pairs = [self.cosines[i][j] for i, j in pairs_of(len(self.norms))]
    return sum(pairs) / len(pairs) if pairs else 0.0

  @property
  def disjoint(self) -> bool:
    """Whether no entry is changed by two contributors."""
    return not self.several

  def to_json(self) -> dict[str, Any]:
    """Returns the fields and the shares as plain numbers and lists."""
    names = ("changed", "overlap", "sign_entries", "cosine", "disjoint")
    return dataclasses.asdict(self) | {n: getattr(self, n) for n in names}


def pairs_of(k: int) -> tuple[tuple[int, int], ...]:
  """Returns the pairs i < j of k contributors.

  Args:
    k: number of contributors.

  Example:
    >>> pairs_of(3)
    ((0, 1), (0, 2), (1, 2))
  """
  return tuple(itertools.combinations(range(k), 2))


@dataclasses.dataclass(frozen=True)
class ConflictReport:
  """What `conflicts` found; prints as a table.

  Attributes:
    leaves: of each leaf that some contributor gives.
    total: of all together.
    findings: what cannot be merged as it is.
    contributors: a label for each.
    divergence: with probes: `{label: mean KL(contributor || merged)}` in
      nats; else None.
  """

  leaves: tuple[LeafConflict, ...]
  total: LeafConflict
  findings: tuple[Finding, ...] = ()
  contributors: tuple[str, ...] = ()
  divergence: dict[str, float] | None = None

  @property
  def disjoint(self) -> bool:
    """Whether the merge is exact and free of order, see `conflicts`."""
    blocked = any(finding.blocks for finding in self.findings)
    return self.total.disjoint and not blocked

  def to_json(self) -> dict[str, Any]:
    """Returns the report as plain dicts, lists and numbers."""
    return {
      "contributors": list(self.contributors),
      "disjoint": self.disjoint,
      "total": self.total.to_json(),
      "leaves": [leaf.to_json() for leaf in self.leaves],
      "findings": [dataclasses.asdict(f) for f in self.findings],
      "divergence": self.divergence,
    }

  def __str__(self) -> str:
    parts = [self._findings(), self._leaves(), self._pairs(), self._verdict()]
    if self.divergence is not None:
      parts.append(
        table(
          ["parent", "KL(parent || merged), nats"],
          [[name, f"{value:.4g}"] for name, value in self.divergence.items()],
        )
      )
    return "\n".join(part for part in parts if part)

  def _findings(self) -> str:
    if not self.findings:
      return ""
    rows = [
      [
        f.leaf,
        f.kind,
        ", ".join(map(str, f.contributors)),
        ", ".join(map(str, f.others)) or "-",
        f"{f.detail}; merge {f.merge}",
        f.fix,
      ]
      for f in self.findings
    ]
    return table(
      ["leaf", "what", "by", "also", "found", "fix"],
      rows,
      title="what cannot be merged as it is (contributors by position)",
    )

  def _leaves(self) -> str:
    ranked = sorted(self.leaves, key=lambda leaf: (-leaf.sign, -leaf.overlap))
    rows = [
      [
        leaf.name,
        f"{leaf.size:,}",
        f"{leaf.changed:.2%}",
        f"{leaf.overlap:.2%}",
        f"{leaf.sign_entries:.2%}",
        f"{leaf.sign:.2%}",
        f"{leaf.cosine:+.3f}",
      ]
      for leaf in [*ranked[:_ROWS], self.total]
    ]
    text = table(
      [
        "leaf",
        "size",
        "changed",
        "overlap",
        "opposed",
        "cancelled",
        "cosine",
      ],
      rows,
      title=(
        "conflicts: overlap is a share of the changed entries; opposed (of "
        "opposite signs) of the\noverlap, cancelled of its magnitude; cosine "
        "is the mean over pairs"
      ),
    )
    more = len(ranked) - _ROWS
    return text + (f"\n and {more:,} leaves with less" if more > 0 else "")

  def _pairs(self) -> str:
    total, k = self.total, len(self.total.norms)
    if k < 2:
      return ""
    rows = []
    for i, j in pairs_of(k):
      # Of the smaller of the two: 100% is one inside the other.
      least = min(total.entries[i][i], total.entries[j][j])
      both, against = total.entries[i][j], total.opposite[i][j]
      row = [
        f"{self.contributors[i]}, {self.contributors[j]}",
        f"{total.norms[i]:.4g}",
        f"{total.norms[j]:.4g}",
        f"{both / least if least else 0:.2%}",
        f"{against / both if both else 0:.2%}",
        f"{total.cosines[i][j]:+.3f}",
      ]
      if total.ggn is not None:
        row.append(f"{total.ggn[i][j]:+.4g}")
      rows.append(row)
    columns = ["i, j", "norm of i", "norm of j", "overlap", "opposed"]
    columns += ["cosine"] + ["GGN, nats"] * (total.ggn is not None)
    return table(
      columns,
      rows,
      title="pairs, over all leaves; overlap of the one that changes less",
    )

  def _verdict(self) -> str:
    if len(self.total.norms) < 2:
      return ""
    if self.disjoint:
      return "disjoint: no entry is changed twice, their sum is exact"
    blocked = len({f.leaf for f in self.findings if f.blocks})
    return f"merge would raise for {blocked} leaves" if blocked else ""


def leaf_conflict(
  name: str, size: int, tally: Tally, ggn: np.ndarray | None = None
) -> LeafConflict:
  """Returns the report of one leaf.

  Args:
    name: text name, or "total".
    size: how many numbers.
    tally: what was counted and summed.
    ggn: the k x k GGN products.
  """
  norms = np.sqrt(np.diag(tally.products))
  scale = np.outer(norms, norms)
  cosines = _ratio(tally.products, scale)
  return LeafConflict(
    name=name,
    size=size,
    some=tally.some,
    several=tally.several,
    disputed=tally.disputed,
    entries=_rows(tally.both, int),
    opposite=_rows(tally.opposite, int),
    norms=tuple(float(x) for x in norms),
    cosines=_rows(np.clip(cosines, -1, 1), float),
    against=_rows(_ratio(tally.against, tally.beside), float),
    sign=tally.minority / tally.magnitude if tally.magnitude else 0.0,
    ggn=None if ggn is None else _rows(ggn, float),
  )


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


def _rows(matrix: np.ndarray, kind: Any) -> Any:
  return tuple(tuple(kind(x) for x in row) for row in matrix)
