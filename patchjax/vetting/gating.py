"""The gate: may this candidate replace that release?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from patchjax.trees.errors import VetError
from patchjax.trees.suggest import did_you_mean, list_names
from patchjax.vetting import advice, flips, paired
from patchjax.vetting.outcomes import Outcomes
from patchjax.vetting.policy import Policy
from patchjax.vetting.suite import Suite, Test
from patchjax.vetting.verdict import Row, Verdict


def gate(
  old: Any,
  new: Any,
  suite: Suite,
  policy: Policy | None = None,
  *,
  claims: Iterable[str] | Mapping[str, float] = (),
  used: int | None = None,
  progress: bool = False,
) -> Verdict:
  """Compares a candidate with what it would replace, on the same examples.

  Every protected test and each of its declared slices is a row. A row passes
  if the candidate is shown to be not worse by the margin (one-sided, error
  alpha) *and* the upper bound of its negative-flip rate is within the cap. It
  fails if the opposite of either is shown with the same error. Otherwise it is
  undecided: too few examples, and the row says about how many more.

  The candidate is accepted only if all rows pass, so that the chance to accept
  one that is worse by its margin somewhere is at most alpha without any
  correction for the number of rows (intersection-union test, Berger 1982). The
  price is power: plan with `plan(..., tests=rows)`. A claim passes if its gain
  is shown at alpha under Holm's correction over the claims, for each is
  published by itself; "refused" and "undecided" are per row.

  Undecided is no invitation to test again until it passes: add fresh examples
  once, as many as the advice says, in a new version of the suite.

  Args:
    old: parameters, or the `Outcomes` computed from them.
    new: the candidate's parameters, or its `Outcomes`.
    suite: the tests.
    policy: margins and caps; default `Policy()`.
    claims: tests (or `test/slice`) on which the candidate claims to be better;
      a mapping gives the least gain of each.
    used: how often the suite was used before, see `patchjax.vetting.uses`.
    progress: whether to show progress bars while evaluating.

  Returns:
    A `Verdict`; print it.

  Raises:
    VetError: if outcomes do not belong to the suite or to each other, policy
      or claims name unknown rows, or nothing is protected or claimed.

  Example:
    >>> suite = Suite("s", "1", [Test("t", lambda p: p)])
    >>> old = np.arange(1000) < 700
    >>> gate(old, old, suite).outcome
    'accepted'
    >>> gate(old, np.arange(1000) < 600, suite).reasons[0][:30]
    't: worse by more than the marg'
    >>> gate(old[:100], old[:100], suite).rows[0].more
    199
  """
  policy = Policy() if policy is None else policy
  old = _outcomes(old, suite, "old", progress)
  new = _outcomes(new, suite, "new", progress)
  known = [
    name
    for test in suite.tests
    for name in (test.name, *(f"{test.name}/{s}" for s in test.slices))
  ]
  policy.check_rows(known)
  wanted = _claims(claims, known)
  guarded = sum(1 + len(test.slices) for test in suite.tests if test.protected)
  if not guarded and not wanted:
    raise VetError(
      f"suite {suite.label} protects no test and nothing is claimed: there is "
      "nothing to decide on; protect a test"
    )
  # All rows must pass together: each gets its share of the power.
  power = 1.0 - (1.0 - policy.power) / max(1, guarded)

  rows = []
  for test in suite.tests:
    x, y = old.values[test.name], new.values[test.name]
    if x.size != y.size:
      raise VetError(
        f"test {test.name!r}: {x.size} outcomes of the old model and {y.size} "
        "of the new one; evaluate both on the same examples"
      )
    for name in ("", *test.slices):
      rows.append(_protected_row(test, name, x, y, policy, power))
  rows += _claim_rows(suite, wanted, old, new, policy)

  results = {row.result for row in rows}
  outcome = "accepted"
  if "fail" in results:
    outcome = "refused"
  elif "undecided" in results:
    outcome = "undecided"
  return Verdict(
    outcome=outcome,
    suite=suite.label,
    digest=suite.digest,
    old=old.subject,
    new=new.subject,
    policy=policy,
    rows=tuple(rows),
    used=used,
  )


def _outcomes(value: Any, suite: Suite, which: str, progress: bool) -> Outcomes:
  if not isinstance(value, Outcomes):
    return suite.run(value, progress=progress)
  if value.digest != suite.digest:
    raise VetError(
      f"the outcomes of the {which} model are of suite {value.suite} "
      f"({value.digest[:12]}), the gate's is {suite.label} "
      f"({suite.digest[:12]}); run the suite again on the {which} model"
    )
  # A digest does not know n where a test has no mask: check everything anew.
  return suite.outcomes(value.values, subject=value.subject)


def _claims(
  claims: Iterable[str] | Mapping[str, float], known: list[str]
) -> dict[str, float]:
  if isinstance(claims, str):
    claims = (claims,)
  if not isinstance(claims, Mapping):
    claims = dict.fromkeys(claims, 0.0)
  for name, gain in claims.items():
    if name not in known:
      raise VetError(
        f"a gain is claimed on {name!r}, but the suite has {list_names(known)}"
        f"; {did_you_mean(name, known) or 'claim one of these'}"
      )
    if not (math.isfinite(gain) and gain >= 0.0):
      raise VetError(
        f"claim {name!r}: the least gain must be 0 or more, got {gain!r}"
      )
  return dict(claims)


def _members(test: Test, name: str, x: np.ndarray) -> np.ndarray:
  return x[test.slices[name]] if name else x


def _describe(
  test: Test,
  name: str,
  old: np.ndarray,
  new: np.ndarray,
  null: float,
  policy: Policy,
) -> tuple[paired.Paired, tuple[float, float], dict[str, Any]]:
  """The comparison, the flip bounds, and the fields that decide nothing."""
  x, y = _members(test, name, old), _members(test, name, new)
  clusters = test.clusters
  if clusters is not None:
    clusters = _members(test, name, clusters)
  binary = paired.is_binary(old, new)
  if binary and not -1.0 < null < 1.0:
    raise VetError(
      f"{test.name!r}: outcomes are 0 or 1, a margin or gain of {abs(null):g} "
      "decides nothing; give one below 1"
    )
  # The span is the test's, not the slice's: a slice may happen to be flat.
  both = np.concatenate([old, new])
  span = 1.0 if binary else float(both.max() - both.min())
  found = paired.compare(
    x, y, null=null, alpha=policy.alpha, clusters=clusters, span=span
  )
  fields: dict[str, Any] = {
    "test": test.name,
    "slice": name,
    "n": x.size,
    "units": found.units,
    "both": None,
    "lost": None,
    "gained": None,
    "old": float(np.mean(x)),
    "new": float(np.mean(y)),
    "difference": found.difference,
    "low": found.low if math.isfinite(found.low) else None,
    "high": found.high if math.isfinite(found.high) else None,
    "mcnemar": None,
    "flip_bound": None,
    "flip_cap": None,
    "more": None,
    "reason": "",
  }
  bounds = (0.0, 1.0)
  if binary:
    lost = (x == 1) & (y == 0)
    fields["lost"] = int(lost.sum())
    fields["gained"] = int(((x == 0) & (y == 1)).sum())
    fields["both"] = int(((x == 1) & (y == 1)).sum())
    fields["mcnemar"] = flips.mcnemar(fields["lost"], fields["gained"])
    bounds = flips.flip_bounds(
      lost.astype(np.float64), alpha=policy.alpha, clusters=clusters
    )
    fields["flip_bound"] = bounds[1]
  return found, bounds, fields


def _protected_row(
  test: Test,
  name: str,
  old: np.ndarray,
  new: np.ndarray,
  policy: Policy,
  power: float,
) -> Row:
  margin = policy.margin_of(test.name, name)
  found, bounds, fields = _describe(test, name, old, new, -margin, policy)
  fields |= {"margin": margin, "p": found.p_above}
  if not test.protected:
    return Row(role="watched", result="watched", **fields)

  parts = []  # (result, reason, more) of non-inferiority and of flips
  if found.p_above <= policy.alpha:
    parts.append(("pass", "", None))
  elif found.p_below <= policy.alpha:
    parts.append(("fail", advice.worse(fields, margin), None))
  else:
    parts.append(advice.noninferiority(found, fields, margin, policy, power))

  cap = policy.cap_of(test.name, name)
  if fields["lost"] is not None and cap is not None:
    fields["flip_cap"] = cap
    parts.append(advice.flips(fields, bounds, cap, policy))

  order = ("fail", "undecided", "pass")
  result = min((part[0] for part in parts), key=order.index)
  fields["reason"] = "; ".join(
    reason for found_result, reason, _ in parts if found_result == result
  )
  if result == "undecided":
    # One part that more examples cannot help makes the whole hopeless.
    more = [part[2] for part in parts if part[0] == "undecided"]
    if None not in more:
      fields["more"] = max(more)
  return Row(role="protected", result=result, **fields)


def _claim_rows(
  suite: Suite,
  claims: Mapping[str, float],
  old: Outcomes,
  new: Outcomes,
  policy: Policy,
) -> list[Row]:
  """Superiority on each claim, by Holm's step-down over all of them."""
  described = []
  for claim, gain in claims.items():
    name, _, slice_name = claim.partition("/")
    test = suite[name]
    found, _, fields = _describe(
      test, slice_name, old.values[name], new.values[name], gain, policy
    )
    described.append((found, fields | {"margin": 0.0 - gain}))
  adjusted = holm([found.p_above for found, _ in described])
  rows = []
  for (found, fields), p in zip(described, adjusted):
    result, reason, more = "pass", "", None
    gain = 0.0 - fields["margin"]
    if p > policy.alpha:
      result, reason, more = advice.claim(found, fields["n"], gain, policy)
    fields |= {"p": p, "reason": reason, "more": more}
    rows.append(Row(role="claim", result=result, **fields))
  return rows


def holm(p: list[float]) -> list[float]:
  """Holm's adjusted p-values: compare each with alpha.

  Holm 1979, "A simple sequentially rejective multiple test procedure":
  the i-th smallest of K times K - i + 1, made monotone.

  Args:
    p: p-values.

  Returns:
    Adjusted ones, in the same order.

  Example:
    >>> [round(x, 4) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
  """
  order = np.argsort(p, kind="stable")
  adjusted = [0.0] * len(p)
  highest = 0.0
  for rank, i in enumerate(order):
    highest = max(highest, min(1.0, (len(p) - rank) * float(p[i])))
    adjusted[i] = highest
  return adjusted
