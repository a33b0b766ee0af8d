"""Paired comparison of two models on the same examples.

Everything here answers one question: old and new outcomes on the same n
examples are given; how sure is it that the mean difference
`delta = mean(new - old)` lies above (or below) a null value?

0/1 outcomes. With b examples lost, c gained, s = b + c, only the trinomial
(b, c, n - s) matters. The Wald test (difference over
`sqrt((rho - d**2) / n)`) claims certainty from nothing when b = c = 0, and its
error is well above its level when s is small. So:

* the order of outcomes is given by the score statistic, whose variance is
  evaluated under the null (Tango 1998, "Equivalence test and confidence
  interval for the difference in proportions for the paired-sample design",
  Statistics in Medicine 17); for large s it agrees with the Wald statistic;
* its p-value is exact and unconditional: the largest probability, over the
  discordance rho, of an outcome at least as extreme (Suissa & Shuster 1991;
  Sidik 2003), with rho confined to its own 1 - 1e-4 confidence interval and
  1e-4 added to the p-value (Berger & Boos 1994). The error of "pass" is
  therefore at most alpha for every n, not only for large n;
* the interval shown is Tango's score interval. It describes; the exact p-value
  decides, and at the very border the two may differ in the third digit.

Real outcomes, and clustered ones, use Student's t on the mean difference with
`SE**2 = sum_c (sum_{i in c} (d_i - mean d))**2 / n**2 * G / (G - 1)`
(G clusters; Miller 2024, arXiv:2411.00640; without clusters G = n, which is
the usual standard error).
Where fewer than ten units stand out from the rest the spread cannot be
estimated; then the share of differing units that n draws may have missed,
`1 - alpha**(1 / G)`, times the span of the outcomes bounds the difference too
(for 0/1 outcomes this is the "rule of three").
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from patchjax.vetting.flips import clopper_pearson, cluster_sums

# Berger & Boos: the chance that the discordance lies outside its interval.
BETA = 1e-4
# Points of the grid over the discordance. The probability is a smooth function
# of it on the scale of one standard error, and the interval spans about eight.
_GRID = 49
# Fewer units than this that differ from the median: the spread is unknown.
_FEW = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
  """The comparison of two models on the same examples.

  Attributes:
    difference: mean of new minus old.
    low: lower end of the two-sided 1 - 2 alpha interval (-inf if unknown).
    high: upper end (inf if unknown).
    p_above: p-value against "the true difference is at most the null".
    p_below: p-value against "the true difference is at least the null".
    variance: variance of one example's difference, clustering included, so
      that the squared standard error is `variance / n`; used for planning.
    binary: whether all outcomes are 0 or 1.
    units: independent units, the examples or the clusters.
  """

  difference: float
  low: float
  high: float
  p_above: float
  p_below: float
  variance: float
  binary: bool
  units: int


def is_binary(*arrays: np.ndarray) -> bool:
  """Returns whether every outcome is 0 or 1."""
  return all(bool(np.all((x == 0) | (x == 1))) for x in arrays)


def score(lost, gained, n: int, null) -> np.ndarray:
  """Tango's score statistic of the paired difference of proportions.

  `(c - b - n null) / sqrt(n (2 p + null - null**2))`, with p the maximum
  likelihood estimate of the probability of a loss under the null, the positive
  root of `2 n p**2 - (s + (c - b - 2 n) null) p - b null (1 - null) = 0`.

  Args:
    lost: examples right before and wrong now; broadcasts.
    gained: examples wrong before and right now; broadcasts.
    n: number of examples.
    null: the difference under the null, in (-1, 1).

  Returns:
    The statistic; 0 where nothing was observed and nothing is asked.

  Example:
    >>> round(float(score(10, 25, 200, 0.0)), 3)
    2.535
  """
  b = np.asarray(lost, np.float64)
  c = np.asarray(gained, np.float64)
  linear = b + c + (c - b - 2.0 * n) * null
  constant = b * null * (1.0 - null)
  root = np.sqrt(np.maximum(linear**2 + 8.0 * n * constant, 0.0))
  least = np.maximum(0.0, -null)
  p = np.clip((linear + root) / (4.0 * n), least, (1.0 - null) / 2.0)
  variance = n * (2.0 * p + null - null * null)
  top = c - b - n * null
  safe = np.where(variance > 0.0, variance, 1.0)
  return np.where(variance > 0.0, top / np.sqrt(safe), 0.0)


def exact_p(lost: int, gained: int, n: int, null: float) -> float:
  """Exact unconditional p-value against "the difference is at most `null`".

  Given s discordant examples the extreme outcomes are those with at least
  `least(s)` gains, since the score grows with the gains at fixed s. At a fixed
  discordance rho their probability is largest at the largest difference that
  the null allows, `min(null, rho)`, so that the supremum over all differences
  at most `null` is one over rho alone.

  Args:
    lost: examples right before and wrong now.
    gained: examples wrong before and right now.
    n: number of examples.
    null: the difference under the null, in (-1, 1).

  Returns:
    The p-value, at least 1e-4 (the part of Berger and Boos).

  Example:
    Nothing differs on 299 examples: a loss of one point or more is excluded.

    >>> exact_p(0, 0, 298, -0.01) <= 0.05, exact_p(0, 0, 299, -0.01) <= 0.05
    (False, True)
  """
  from scipy import special  # deferred: the command line starts without it

  low, high = clopper_pearson(lost + gained, n, alpha=BETA / 2.0)
  # A loss of -null needs that much discordance; a gain at most null does not.
  low = max(low, -null, 1e-12)
  high = min(max(high, 1e-12), 1.0)
  if high < low:
    return BETA  # no difference as bad as the null fits the discordance seen
  rho = np.linspace(low, high, _GRID)
  if low < null < high:
    rho = np.append(rho, null)  # the worst difference has a kink there
  rho = rho[:, None]
  first, last = _window(n, low, high)
  s = np.arange(first, last + 1, dtype=np.float64)
  observed = float(score(lost, gained, n, null))
  least = _least_gains(s, n, null, observed)

  log_choose = (
    special.gammaln(n + 1.0)
    - special.gammaln(s + 1.0)
    - special.gammaln(n - s + 1.0)
  )
  log_mass = log_choose + special.xlogy(s, rho) + special.xlog1py(n - s, -rho)
  share = np.clip((rho + np.minimum(null, rho)) / (2.0 * rho), 0.0, 1.0)
  inside = (least >= 1.0) & (least <= s)
  a = np.where(inside, least, 1.0)
  tail = special.betainc(a, np.where(inside, s - least + 1.0, 1.0), share)
  tail = np.where(inside, tail, np.where(least < 1.0, 1.0, 0.0))
  return min(1.0, float(np.max(np.sum(np.exp(log_mass) * tail, 1))) + BETA)


def _window(n: int, low: float, high: float) -> tuple[int, int]:
  """The numbers of discordant examples outside of which 1e-12 is left."""
  from scipy import special

  first = special.bdtrik(1e-12, n, low)
  # The upper tail by symmetry: 1 - 1e-12 itself would lose its digits.
  last = n - special.bdtrik(1e-12, n, 1.0 - high) if high < 1.0 else n
  first = 0.0 if not math.isfinite(first) else first
  last = float(n) if not math.isfinite(last) else last
  return max(0, math.floor(first) - 1), min(n, math.ceil(last) + 1)


def _least_gains(s, n: int, null: float, observed: float) -> np.ndarray:
  """Fewest gains among s discordant examples that score at least `observed`."""
  low = np.zeros_like(s)
  high = s + 1.0  # s + 1: none does
  slack = 1e-9 * max(1.0, abs(observed))  # equal scores count as extreme
  while np.any(low < high):
    mid = np.floor((low + high) / 2.0)
    enough = score(s - mid, mid, n, null) >= observed - slack
    high = np.where(enough & (low < high), mid, high)
    low = np.where(~enough & (low < high), mid + 1.0, low)
  return high


def score_interval(
  lost: int, gained: int, n: int, *, alpha: float
) -> tuple[float, float]:
  """Tango's score interval of the difference, one-sided level `alpha` an end.

  Args:
    lost: examples right before and wrong now.
    gained: examples wrong before and right now.
    n: number of examples.
    alpha: error at each end; .05 gives a 90 % two-sided interval.

  Returns:
    (low, high), within [-1, 1].

  Example:
    >>> low, high = score_interval(10, 25, 200, alpha=0.025)
    >>> round(low, 3), round(high, 3)
    (0.018, 0.136)
  """
  from scipy import special

  # The score falls with the null: it is z at the lower end and -z at the upper.
  target = np.array([1.0, -1.0]) * special.ndtri(1.0 - alpha)
  d = (gained - lost) / n
  low, high = np.array([-1.0, d]), np.array([d, 1.0])
  for _ in range(50):
    mid = (low + high) / 2.0
    above = score(lost, gained, n, mid) > target
    low, high = np.where(above, mid, low), np.where(above, high, mid)
  ends = (low + high) / 2.0
  return float(ends[0]), float(ends[1])


def compare(
  old: np.ndarray,
  new: np.ndarray,
  *,
  null: float,
  alpha: float,
  clusters: np.ndarray | None = None,
  span: float | None = None,
) -> Paired:
  """Compares paired outcomes with a null difference.

  Args:
    old: outcomes of the old model, [n], higher is better.
    new: outcomes of the new model on the same examples, [n].
    null: the difference to test against: -margin for non-inferiority, 0 (or
      the least gain that is claimed) for superiority.
    alpha: error of each one-sided statement.
    clusters: group of each example, [n]; examples of one group are not
      independent (questions about one document, sentences of one author).
    span: largest possible change of one outcome; default the range of the
      outcomes given, 1 for 0/1.

  Returns:
    A `Paired`.

  Example:
    >>> old = np.array([1.] * 900 + [0.] * 100)
    >>> new = old.copy(); new[:9] = 0; new[900:907] = 1
    >>> r = compare(old, new, null=-0.02, alpha=0.05)
    >>> round(r.difference, 3), r.p_above < 0.05, r.p_below < 0.05
    (-0.002, True, False)
  """
  difference = new - old
  mean = float(np.mean(difference))
  n = difference.size
  binary = is_binary(old, new)
  if binary and clusters is None:
    lost = int(np.sum((old == 1) & (new == 0)))
    gained = int(np.sum((old == 0) & (new == 1)))
    low, high = score_interval(lost, gained, n, alpha=alpha)
    return Paired(
      difference=mean,
      low=low,
      high=high,
      p_above=exact_p(lost, gained, n, null),
      p_below=exact_p(gained, lost, n, -null),
      variance=(lost + gained) / n - mean * mean,
      binary=True,
      units=n,
    )
  if span is None:
    both = np.concatenate([old, new])
    span = 1.0 if binary else float(np.max(both) - np.min(both))
  return _student(difference, mean, null, alpha, clusters, span, binary)


def _student(difference, mean, null, alpha, clusters, span, binary) -> Paired:
  """The t comparison with its guard against too little variation."""
  from scipy import special

  n = difference.size
  sums = cluster_sums(difference, clusters)
  units = sums.size
  if units < 2:
    return Paired(
      difference=mean,
      low=-math.inf,
      high=math.inf,
      p_above=1.0,
      p_below=1.0,
      variance=0.0,
      binary=binary,
      units=units,
    )
  se = math.sqrt(float(np.sum(sums**2)) / n**2 * units / (units - 1.0))
  gap = mean - null
  half = float(special.stdtrit(units - 1.0, 1.0 - alpha)) * se
  if se > 0.0:
    t = gap / se
    above = float(special.stdtr(units - 1.0, -t))
    below = float(special.stdtr(units - 1.0, t))
  else:
    above, below = float(gap <= 0.0), float(gap >= 0.0)
  moved = np.sum(difference != np.median(difference))
  if clusters is not None:
    moved = np.unique(clusters[difference != np.median(difference)]).size
  if moved < _FEW:
    if span <= 0.0:
      half, above, below = math.inf, 1.0, 1.0
    else:
      half = max(half, span * (1.0 - alpha ** (1.0 / units)))
      above = max(above, max(0.0, 1.0 - max(0.0, gap) / span) ** units)
      below = max(below, max(0.0, 1.0 - max(0.0, -gap) / span) ** units)
  return Paired(
    difference=mean,
    low=mean - half,
    high=mean + half,
    p_above=above,
    p_below=below,
    variance=se * se * n,
    binary=binary,
    units=units,
  )
