"""What changed between two versions, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from patchjax.trees import dtypes
from patchjax.trees.digest import Entry


class Reader(Protocol):
  """Whatever gives the bits of leaves: a repository, or values in memory."""

  def read(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Returns `{name: words}`.

    Args:
      entries: `{name: entry}` of the leaves.
    """
    ...


@dataclasses.dataclass(frozen=True)
class LeafDiff:
  """How one leaf differs between two versions.

  Attributes:
    name: text name.
    kind: `added`, `removed`, `changed`, or `retyped` (another dtype or shape).
    old: its entry before; None if it was added.
    new: its entry after; None if it was removed.
    count: number of entries whose bits differ.
    largest: largest absolute difference of values; None for what is not a
      number, or has NaN on one side only.
  """

  name: str
  kind: str
  old: Entry | None
  new: Entry | None
  count: int
  largest: float | None

  @property
  def size(self) -> int:
    """Number of entries of the leaf (of the larger side)."""
    return max(e.size for e in (self.old, self.new) if e is not None)


@dataclasses.dataclass(frozen=True)
class TreeDiff:
  """The leaves in which two versions differ.

  Attributes:
    leaves: one `LeafDiff` for each, in the order of names.
    same: number of leaves that are equal to the bit.
    total: number of entries of the second version.
  """

  leaves: tuple[LeafDiff, ...]
  same: int
  total: int

  def names(self, kind: str) -> tuple[str, ...]:
    """Returns the names of the leaves of a kind.

    Args:
      kind: `added`, `removed`, `changed` or `retyped`.
    """
    return tuple(leaf.name for leaf in self.leaves if leaf.kind == kind)

  @property
  def added(self) -> tuple[str, ...]:
    """Names only the second version has."""
    return self.names("added")

  @property
  def removed(self) -> tuple[str, ...]:
    """Names only the first version has."""
    return self.names("removed")

  @property
  def changed(self) -> tuple[str, ...]:
    """Names whose numbers, dtype or shape differ."""
    return tuple(
      leaf.name for leaf in self.leaves if leaf.kind in ("changed", "retyped")
    )

  @property
  def count(self) -> int:
    """Number of entries whose bits differ, added and removed ones included."""
    return sum(leaf.count for leaf in self.leaves)

  def __bool__(self) -> bool:
    return bool(self.leaves)

  def to_json(self) -> dict[str, Any]:
    """Returns the differences as a JSON-able dict."""
    return {
      "same": self.same,
      "total": self.total,
      "count": self.count,
      "leaves": [
        {
          **dataclasses.asdict(leaf),
          "largest": leaf.largest
          if leaf.largest is not None and math.isfinite(leaf.largest)
          else None,
        }
        for leaf in self.leaves
      ],
    }

  def __str__(self) -> str:
    from patchjax.trees.report import table

    if not self.leaves:
      return f"no difference in {self.same} leaves"
    rows = [
      (
        leaf.name,
        leaf.kind,
        _spell(leaf.old, leaf.new),
        f"{leaf.count:,}",
        f"{100 * leaf.count / max(leaf.size, 1):.2f} %",
        "-" if leaf.largest is None else f"{leaf.largest:.3g}",
      )
      for leaf in self.leaves
    ]
    columns = ["leaf", "what", "type", "entries", "share", "max |d|"]
    return (
      f"{table(columns, rows)}\n{len(rows)} leaves differ, {self.same} are "
      f"equal; {self.count:,} entries of {self.total:,} differ"
    )


def compare(
  old: Mapping[str, Entry], new: Mapping[str, Entry], reader: Reader
) -> TreeDiff:
  """Returns the differences of two versions; reads only leaves that differ.

  Args:
    old: the entries of one version.
    new: those of the other.
    reader: reads leaves.
  """
  differing = {
    name: (old.get(name), new.get(name))
    for name in sorted({*old, *new})
    if old.get(name) != new.get(name)
  }
  leaves = []
  for name, (before, after) in differing.items():
    if before is None or after is None:
      kind = "added" if before is None else "removed"
      present = after or before
      count = present.size if present is not None else 0
      leaves.append(LeafDiff(name, kind, before, after, count, None))
    elif (before.dtype, before.shape) != (after.dtype, after.shape):
      count = max(before.size, after.size)
      leaves.append(LeafDiff(name, "retyped", before, after, count, None))
    else:
      # One leaf at a time: memory does not grow with the model.
      words = reader.read({"old": before, "new": after})
      count, largest = _numbers(words["old"], words["new"], after)
      leaves.append(LeafDiff(name, "changed", before, after, count, largest))
  return TreeDiff(
    leaves=tuple(leaves),
    same=len(set(old) & set(new) - set(differing)),
    total=sum(entry.size for entry in new.values()),
  )


def _numbers(
  old: np.ndarray, new: np.ndarray, entry: Entry
) -> tuple[int, float | None]:
  differs = old != new
  if differs.ndim > len(entry.shape):  # complex numbers and keys: any word
    differs = differs.any(axis=-1)
  count = int(np.count_nonzero(differs))
  kind = dtypes.KINDS.get(entry.dtype)
  if kind is None or kind.name == "bool":
    return count, None
  wide = np.complex128 if kind.words == 2 else np.float64
  at = differs.reshape(-1)
  a, b = (
    dtypes.from_words(x, entry.dtype).reshape(-1)[at].astype(wide)
    for x in (old, new)
  )
  with np.errstate(all="ignore"):
    distance = np.abs(b - a)
  largest = float(distance.max()) if distance.size else 0.0
  return count, None if math.isnan(largest) else largest


def _spell(old: Entry | None, new: Entry | None) -> str:
  spelled = [
    f"{entry.dtype}[{','.join(map(str, entry.shape))}]"
    for entry in (old, new)
    if entry is not None
  ]
  return " -> ".join(dict.fromkeys(spelled))
