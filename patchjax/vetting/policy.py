"""The policy of a gate: margins, caps and error rates, as data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from patchjax.trees.errors import FormatError, VetError
from patchjax.trees.suggest import did_you_mean, list_names

_SCHEMA = "patchjax/policy/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """What a candidate must show; decided before a result is seen.

  A row is a test (`"nyt"`) or a slice of one (`"nyt/positive"`).

  Attributes:
    margin: the loss that is still "not worse", in units of the outcomes (.01 is
      one point of accuracy).
    slice_margin: the same for slices; None takes the margin of the slice's
      test.
    margins: margins of single rows, which come before both.
    flips: the largest rate of negative flips (right before, wrong now) over
      all examples of a row, held against its upper bound; None is no cap.
      Only 0/1 outcomes have flips.
    slice_flips: the same for slices; None takes the cap of the slice's test.
    flip_caps: caps of single rows (None: no cap), which come before both.
    alpha: the chance to accept a candidate that is worse by a margin, and of
      each bound and claim to be wrong.
    power: the chance to accept an unchanged one that the sample-size advice
      aims at.
    changed: the largest share of changed entries of a PATCH release.
    uses: how many candidates one suite may judge before it should be replaced
      by fresh examples; shown, not enforced.

  Example:
    >>> policy = Policy(margin=0.02, margins={"nyt/positive": 0.06})
    >>> policy.margin_of("nyt"), policy.margin_of("nyt", "positive")
    (0.02, 0.06)
    >>> Policy.from_json(policy.to_json()) == policy
    True
  """

  margin: float = 0.01
  slice_margin: float | None = None
  margins: Mapping[str, float] = dataclasses.field(default_factory=dict)
  flips: float | None = 0.02
  slice_flips: float | None = None
  flip_caps: Mapping[str, float | None] = dataclasses.field(
    default_factory=dict
  )
  alpha: float = 0.05
  power: float = 0.8
  changed: float = 0.5
  uses: int = 32

  def __post_init__(self) -> None:
    object.__setattr__(self, "margins", dict(self.margins))
    object.__setattr__(self, "flip_caps", dict(self.flip_caps))
    _positive("margin", self.margin)
    if self.slice_margin is not None:
      _positive("slice_margin", self.slice_margin)
    for row, margin in self.margins.items():
      _positive(f"margins[{row!r}]", margin)
    caps = {"flips": self.flips, "slice_flips": self.slice_flips}
    caps |= {f"flip_caps[{k!r}]": v for k, v in self.flip_caps.items()}
    for name, cap in caps.items():
      if cap is not None and not 0.0 < cap <= 1.0:
        raise VetError(
          f"policy: {name} must be a rate in (0, 1] or None, got {cap!r}"
        )
    # Below .001 the 1e-4 set aside by the exact test would matter.
    if not 0.001 <= self.alpha < 0.5:
      raise VetError(f"policy: alpha must be in [.001, .5), got {self.alpha!r}")
    if not 0.0 < self.power < 1.0:
      raise VetError(f"policy: power must be in (0, 1), got {self.power!r}")
    if not 0.0 <= self.changed <= 1.0:
      raise VetError(f"policy: changed must be in [0, 1], got {self.changed!r}")
    if self.uses < 1:
      raise VetError(f"policy: uses must be at least 1, got {self.uses!r}")

  def margin_of(self, test: str, slice_name: str = "") -> float:
    """The margin of a test, or of a slice of it."""
    whole = self.margins.get(test, self.margin)
    if not slice_name:
      return whole
    inherited = whole if self.slice_margin is None else self.slice_margin
    return self.margins.get(f"{test}/{slice_name}", inherited)

  def cap_of(self, test: str, slice_name: str = "") -> float | None:
    """The cap on negative flips of a test, or of a slice of it."""
    whole = self.flip_caps.get(test, self.flips)
    if not slice_name:
      return whole
    inherited = whole if self.slice_flips is None else self.slice_flips
    return self.flip_caps.get(f"{test}/{slice_name}", inherited)

  def check_rows(self, rows: Iterable[str]) -> None:
    """Checks that single margins and caps are of rows that exist.

    Args:
      rows: `test` and `test/slice` of a suite.

    Raises:
      VetError: naming the unknown ones; a misspelt margin would otherwise
        silently be the default one.
    """
    rows = list(rows)
    for name in (*self.margins, *self.flip_caps):
      if name not in rows:
        raise VetError(
          f"policy: a margin or cap is given for {name!r}, but the suite has "
          f"{list_names(rows)}; {did_you_mean(name, rows) or 'drop it'}"
        )

  def to_json(self) -> dict[str, Any]:
    """Returns the policy as JSON values."""
    return {"schema": _SCHEMA, **dataclasses.asdict(self)}

  @classmethod
  def from_json(cls, value: Mapping[str, Any] | str) -> Policy:
    """Reads what `to_json` returned, as values or as text.

    Raises:
      FormatError: if it is no policy of this version, or has unknown fields.
    """
    fields = read_json(value, _SCHEMA, "policy")
    try:
      return cls(**fields)
    except VetError:
      raise  # of the right form, and says which number is out of range
    except (TypeError, ValueError) as error:
      raise FormatError(f"not a policy: {error}") from error


def read_json(
  value: Mapping[str, Any] | str, schema: str, what: str
) -> dict[str, Any]:
  """Returns the fields of a JSON object whose schema must be the one given.

  Args:
    value: the object, or its text.
    schema: the expected value of its field `schema`.
    what: what it should be, for the message.

  Raises:
    FormatError: if it is not valid JSON, no object, or of another schema.
  """
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError as error:
      raise FormatError(f"not a {what}: {error}") from error
  if not isinstance(value, Mapping) or value.get("schema") != schema:
    found = value.get("schema") if isinstance(value, Mapping) else value
    raise FormatError(
      f"not a {what}: expected schema {schema!r}, found {found!r}; it may be "
      "of a newer patchjax"
    )
  return {k: v for k, v in value.items() if k != "schema"}


def _positive(name: str, value: float) -> None:
  if not (math.isfinite(value) and value > 0.0):
    raise VetError(
      f"policy: {name} must be a positive number, got {value!r}; no finite "
      "number of examples shows a loss of exactly nothing"
    )
