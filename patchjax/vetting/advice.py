"""Reasons and advice: why a row is not a pass, and what would settle it.

Each function gives (result, reason, more): `more` is the number of further
examples that would probably decide, None where more would not help.
"""

from __future__ import annotations

from typing import Any

from patchjax.vetting import planning
from patchjax.vetting.paired import Paired
from patchjax.vetting.policy import Policy


def noninferiority(
  found: Paired,
  fields: dict[str, Any],
  margin: float,
  policy: Policy,
  power: float,
) -> tuple[str, str, int | None]:
  """Why non-inferiority is open, and how many examples would settle it."""
  n, d = fields["n"], found.difference
  floor = 2
  if found.binary:
    floor = planning.smallest(margin, alpha=policy.alpha)
  if found.units < 2:
    reason = f"{n} examples in {found.units} unit show nothing"
    return "undecided", reason, None
  spread = found.variance + d * d  # rho for 0/1 outcomes
  if spread == 0.0 and not found.binary:
    return "undecided", "the outcomes vary too little to judge", None
  neutral = planning.examples(spread, margin, alpha=policy.alpha, power=power)
  assert neutral is not None  # the margin is positive
  needed = max(neutral, floor)
  kind = "discordance" if found.binary else "variance of the differences"
  if n < needed:
    reason = (
      f"too few examples for a margin of {margin:g}: {n}, about {needed} if "
      f"nothing got worse ({kind} {spread:.3g}), {needed - n} more"
    )
    return "undecided", reason, needed - n
  observed = planning.examples(
    found.variance, margin + d, alpha=policy.alpha, power=power
  )
  if observed is None:
    reason = (
      f"{_loss(d)} is at the margin of {margin:g} or beyond it, though not "
      "surely: more examples will hardly help"
    )
    return "undecided", reason, None
  needed = max(observed, n + 1)
  reason = (
    f"{_loss(d)} uses up the margin of {margin:g}: about {needed} examples "
    f"({needed - n} more) would decide if it is the true difference"
  )
  return "undecided", reason, needed - n


def flips(
  fields: dict[str, Any],
  bounds: tuple[float, float],
  cap: float,
  policy: Policy,
) -> tuple[str, str, int | None]:
  """Whether the bounds of the flip rate lie within the cap, and if not, why."""
  lost, n = fields["lost"], fields["n"]
  low, high = bounds
  if high <= cap:
    return "pass", "", None
  text = f"{lost} of {n} flipped from right to wrong"
  if low > cap:
    return "fail", f"{text}, surely more than the cap of {cap:g}", None
  needed = planning.smallest_for_cap(lost / n, cap, alpha=policy.alpha)
  text += f", at most {high:.3f} where the cap is {cap:g}"
  if needed is None:
    return "undecided", f"{text}: more examples will hardly help", None
  # Clustered examples are worth less than independent ones.
  needed = max(needed, n + 1)
  text += f": about {needed} examples ({needed - n} more) at this rate"
  return "undecided", text, needed - n


def claim(
  found: Paired, n: int, gain: float, policy: Policy
) -> tuple[str, str, int | None]:
  """Whether a claim that is not shown is refuted or only open, and why."""
  d = found.difference
  if found.p_below <= policy.alpha:
    reason = f"claimed to gain more than {gain:g}, and shown not to: {d:+.3f}"
    return "fail", reason, None
  needed = planning.examples(
    found.variance, d - gain, alpha=policy.alpha, power=policy.power
  )
  reason = f"the claimed gain above {gain:g} is not shown: {d:+.3f}"
  if needed is None:
    return "undecided", f"{reason}; more examples will hardly help", None
  needed = max(needed, n + 1)
  reason += f"; about {needed} examples ({needed - n} more) if it is true"
  return "undecided", reason, needed - n


def worse(fields: dict[str, Any], margin: float) -> str:
  """Why a row fails non-inferiority, with its counts."""
  counts = ""
  if fields["lost"] is not None:
    counts = f" ({fields['lost']} lost, {fields['gained']} gained)"
  return (
    f"worse by more than the margin of {margin:g}: "
    f"{fields['difference']:+.3f}{counts} on {fields['n']} examples"
  )


def _loss(difference: float) -> str:
  return f"the difference of {difference:+.3f}"
