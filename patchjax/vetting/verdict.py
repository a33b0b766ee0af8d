"""The result of a gate, with its evidence: printable and storable."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from patchjax.trees.digest import canonical_json
from patchjax.trees.errors import FormatError
from patchjax.vetting.policy import Policy, read_json

_SCHEMA = "patchjax/verdict/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One question of a gate: a test, a slice or a claim.

  Attributes:
    test: name of the test.
    slice: name of the slice, or "" for the whole test.
    role: "protected", "claim" or "watched" (reported, decides nothing).
    result: "pass", "fail", "undecided", or "watched".
    n: examples.
    units: independent units, the examples or their clusters.
    both: examples right before and now (b, c and both: None unless 0/1).
    lost: examples right before and wrong now, b.
    gained: examples wrong before and right now, c.
    old: mean outcome of the old model.
    new: mean outcome of the new one.
    difference: new minus old.
    low: lower end of the two-sided 1 - 2 alpha interval, None if unknown.
    high: upper end.
    margin: accepted loss; for a claim, minus the least gain that is claimed.
    p: p-value of the statement to be shown; of a claim, adjusted by Holm.
    flip_bound: upper bound of the negative-flip rate.
    flip_cap: its cap, None without one.
    mcnemar: exact two-sided McNemar p-value; a description only.
    more: examples that would probably decide, beyond the n at hand.
    reason: why the row is not a pass.
  """

  test: str
  slice: str
  role: str
  result: str
  n: int
  units: int
  both: int | None
  lost: int | None
  gained: int | None
  old: float
  new: float
  difference: float
  low: float | None
  high: float | None
  margin: float
  p: float
  flip_bound: float | None
  flip_cap: float | None
  mcnemar: float | None
  more: int | None
  reason: str

  @property
  def name(self) -> str:
    """`test` or `test/slice`."""
    return f"{self.test}/{self.slice}" if self.slice else self.test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What a gate decided, and on what evidence.

  Attributes:
    outcome: "accepted" if every protected row and claim passed, "refused" if
      one failed, else "undecided".
    suite: name and version of the suite.
    digest: its digest.
    old: tree id of the old values, or "".
    new: tree id of the new values, or "".
    policy: the policy that was applied.
    rows: tests, each followed by its slices, then claims.
    used: how many other candidates the suite had judged in the repository;
      None if nobody counted.
  """

  outcome: str
  suite: str
  digest: str
  old: str
  new: str
  policy: Policy
  rows: tuple[Row, ...]
  used: int | None = None

  @property
  def accepted(self) -> bool:
    """Whether every protected row and every claim passed."""
    return self.outcome == "accepted"

  @property
  def refused(self) -> bool:
    """Whether at least one row failed."""
    return self.outcome == "refused"

  @property
  def undecided(self) -> bool:
    """Whether no row failed, but the evidence does not suffice for all."""
    return self.outcome == "undecided"

  @property
  def reasons(self) -> tuple[str, ...]:
    """Why it was not accepted: failed rows first."""
    order = {"fail": 0, "undecided": 1}
    rows = sorted(
      (row for row in self.rows if row.result in order),
      key=lambda row: order[row.result],
    )
    return tuple(
      f"{'claim ' if row.role == 'claim' else ''}{row.name}: {row.reason}"
      for row in rows
    )

  @property
  def id(self) -> str:
    """Digest of the evidence: the same comparison again has the same id."""
    value = self.to_json()
    del value["used"]
    return hashlib.sha256(canonical_json(value)).hexdigest()

  def __str__(self) -> str:
    """The table and the reasons, at most 100 columns wide."""
    import textwrap

    from patchjax.trees.report import table

    percent = f"{100 * (1 - 2 * self.policy.alpha):g}%"
    columns = ["test", "n", "both", "lost/gained", f"new - old ({percent})"]
    columns += ["must be", "flips/cap", "result"]
    cells = [
      [
        _indented(row),
        row.n,
        "" if row.both is None else row.both,
        "" if row.lost is None else f"{row.lost} / {row.gained}",
        f"{_short(row.difference, '+.3f')} "
        f"({_short(row.low, '+.3f')} {_short(row.high, '+.3f')})",
        "" if row.role == "watched" else _must(row.margin),
        _flips(row),
        row.result,
      ]
      for row in self.rows
    ]
    lines = [table(columns, cells, title=self._title())]
    for reason in self.reasons:
      lines += textwrap.wrap(
        reason, 98, initial_indent="- ", subsequent_indent="  "
      )
    if self.used is not None:
      lines.append(self._ledger())
    return "\n".join(lines)

  def _title(self) -> str:
    count = {
      result: sum(row.result == result for row in self.rows)
      for result in ("pass", "fail", "undecided")
    }
    return (
      f"{self.outcome}: suite {self.suite} ({self.digest[:12]}), "
      f"{count['pass']} pass, {count['fail']} fail, "
      f"{count['undecided']} undecided"
    )

  def _ledger(self) -> str:
    assert self.used is not None
    use = self.used + 1
    text = f"ledger: use {use} of {self.policy.uses} of this suite here"
    if use > self.policy.uses:
      text += "; it is worn out: publish it and draw fresh examples"
    return text

  def to_json(self) -> dict[str, Any]:
    """Returns the verdict as JSON values."""
    return {
      "schema": _SCHEMA,
      "outcome": self.outcome,
      "suite": self.suite,
      "digest": self.digest,
      "old": self.old,
      "new": self.new,
      "policy": self.policy.to_json(),
      "rows": [dataclasses.asdict(row) for row in self.rows],
      "used": self.used,
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any] | str) -> Verdict:
    """Reads what `to_json` returned, as values or as text.

    Raises:
      FormatError: if it is no verdict of this version.
    """
    fields = read_json(value, _SCHEMA, "verdict")
    try:
      fields["policy"] = Policy.from_json(fields["policy"])
      fields["rows"] = tuple(Row(**row) for row in fields["rows"])
      return cls(**fields)
    except (KeyError, TypeError) as error:
      raise FormatError(f"not a verdict: {error}") from error


def _indented(row: Row) -> str:
  if row.role == "claim":
    return f"claim {row.name}"
  return f"  /{row.slice}" if row.slice else row.test


def _short(x: float | None, form: str) -> str:
  """A number without the zero before its point: columns are scarce."""
  if x is None:
    return "?"
  text = format(x, form)
  return text.replace("0.", ".", 1) if abs(x) < 1.0 else text


def _must(margin: float) -> str:
  return f">{_short(-margin, '+.3g')}" if margin else "> 0"


def _flips(row: Row) -> str:
  if row.flip_bound is None or row.flip_cap is None:
    return ""
  return f"{_short(row.flip_bound, '.3f')}/{_short(row.flip_cap, '.3g')}"
