"""How many examples a gate needs: sample sizes before the run."""

from __future__ import annotations

import math

from patchjax.trees.errors import VetError
from patchjax.vetting import flips, paired


def plan(
  margin: float,
  discordance: float,
  alpha: float = 0.05,
  power: float = 0.8,
  *,
  difference: float = 0.0,
  tests: int = 1,
) -> int:
  """Examples needed to show that a model is not worse by `margin`.

  `n = (z_(1-alpha) + z_power)**2 (rho - d**2) / (margin + d)**2`, for paired
  0/1 outcomes of discordance rho and true difference d. Two models that agree
  on most examples are compared with few: small patches are cheap to vet.

  Acceptance asks every protected test to pass (an intersection-union test):
  that needs no correction of alpha, but each of K tests must then have power
  `1 - (1 - power) / K` for all of them to pass together with `power`; give
  `tests=K`.

  The formula is a normal approximation. Where it gives fewer examples than
  `smallest(margin, alpha=alpha)`, take that: below it the gate cannot pass
  whatever it sees.

  Args:
    margin: the loss that would still be accepted, in (0, 1); with
      `difference` the gain to be shown may be 0 (superiority).
    discordance: share of examples on which old and new differ (for
      real-valued outcomes, the variance of the differences).
    alpha: the chance to accept a model that is worse by the margin.
    power: the chance to accept a model of the given true difference.
    difference: the true difference, new minus old, planned for.
    tests: number of protected tests and slices that must all pass.

  Returns:
    The number of examples, at least 1.

  Raises:
    VetError: if an argument is out of its range, or no number is enough.

  Example:
    >>> plan(0.01, 0.05)
    3091
    >>> plan(0.01, 0.05, tests=5)
    5765
  """
  if tests < 1:
    raise VetError(f"plan: tests must be at least 1, got {tests}")
  _check("alpha", alpha, 0.0, 0.5)
  _check("power", power, 0.0, 1.0)
  if not discordance >= difference * difference:
    raise VetError(
      f"plan: discordance {discordance:g} is impossible with a difference "
      f"of {difference:g}: it is at least the difference squared"
    )
  size = examples(
    discordance - difference * difference,
    margin + difference,
    alpha=alpha,
    power=1.0 - (1.0 - power) / tests,
  )
  if size is None:
    raise VetError(
      f"plan: a true difference of {difference:g} is not above the margin "
      f"of -{margin:g}: no number of examples shows it; widen the margin"
    )
  return size


def _check(name: str, value: float, low: float, high: float) -> None:
  if not low < value < high:
    raise VetError(
      f"plan: {name} must be between {low:g} and {high:g}, got {value!r}"
    )


def examples(
  variance: float, gap: float, *, alpha: float, power: float
) -> int | None:
  """Examples that show a gap from the null, or None if there is no gap.

  Args:
    variance: variance of one example's difference.
    gap: how far the true difference lies above the null.
    alpha: one-sided error.
    power: chance to show it.

  Example:
    >>> examples(0.05, 0.01, alpha=0.05, power=0.8)
    3091
    >>> examples(0.05, -0.01, alpha=0.05, power=0.8) is None
    True
  """
  from scipy import special

  if gap <= 0.0:
    return None
  z = float(special.ndtri(1.0 - alpha) + special.ndtri(power))
  # Round to nearest: the table this is taken from does, and the rounding is
  # far below what the discordance is known to.
  return max(1, round(z * z * variance / (gap * gap)))


def smallest(margin: float, *, alpha: float = 0.05) -> int:
  """The fewest examples with which a gate can pass at all.

  With no discordant example at all, a loss of `margin` is excluded once
  `(1 - margin)**n` is at most alpha (less the 1e-4 that the exact test of
  `patchjax.vetting.paired` sets aside). At small alpha that test asks a little
  more, since other discordances than pure loss are then the worst case. The
  closed form also bounds a rate by a cap: 299 examples without a failure show
  "at most 1 %" at 95 %.

  Args:
    margin: the accepted loss, in (0, 1).
    alpha: one-sided error.

  Example:
    >>> smallest(0.01), smallest(0.05)
    (299, 59)
  """
  _check("margin", margin, 0.0, 1.0)
  _check("alpha", alpha, 2.0 * paired.BETA, 0.5)
  low = math.ceil(math.log(alpha - paired.BETA) / math.log1p(-margin))
  if paired.exact_p(0, 0, low, -margin) <= alpha:
    return low
  high = 2 * low
  while high - low > 1:
    mid = (low + high) // 2
    enough = paired.exact_p(0, 0, mid, -margin) <= alpha
    low, high = (low, mid) if enough else (mid, high)
  return high


def smallest_for_cap(rate: float, cap: float, *, alpha: float) -> int | None:
  """The fewest examples whose flip bound is within the cap at this rate.

  Args:
    rate: the flip rate seen so far.
    cap: the largest rate allowed.
    alpha: one-sided error.

  Returns:
    The number, or None if the rate itself is not below the cap.

  Example:
    >>> smallest_for_cap(0.0, 0.01, alpha=0.05)
    299
    >>> smallest_for_cap(0.02, 0.01, alpha=0.05) is None
    True
  """
  if rate >= cap:
    return None

  def enough(n: int) -> bool:
    return flips.clopper_pearson(rate * n, n, alpha=alpha)[1] <= cap

  high = 1
  while not enough(high):
    high *= 2
  low = high // 2  # not enough, or 0
  while high - low > 1:
    mid = (low + high) // 2
    low, high = (low, mid) if enough(mid) else (mid, high)
  return high
