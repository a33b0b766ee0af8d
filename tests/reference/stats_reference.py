"""Slow, obvious statistics: sums over every outcome, no scipy."""

import itertools
import math

import numpy as np


def trinomial(b, c, n, lose, gain):
  """Probability of b losses and c gains among n paired examples."""
  return (
    math.comb(n, b)
    * math.comb(n - b, c)
    * lose**b
    * gain**c
    * max(0.0, 1.0 - lose - gain) ** (n - b - c)
  )


def binomial_cdf(k, n, p):
  """P(X <= k)."""
  return sum(
    math.comb(n, i) * p**i * (1.0 - p) ** (n - i) for i in range(k + 1)
  )


def bisect(f, low, high):
  """The root of a falling f."""
  for _ in range(100):
    mid = (low + high) / 2.0
    low, high = (mid, high) if f(mid) > 0.0 else (low, mid)
  return (low + high) / 2.0


def clopper_pearson(k, n, alpha):
  """Bounds by inverting the binomial tails."""
  low = 0.0
  if k > 0:
    low = bisect(lambda p: alpha - (1.0 - binomial_cdf(k - 1, n, p)), 0.0, 1.0)
  high = 1.0
  if k < n:
    high = bisect(lambda p: binomial_cdf(k, n, p) - alpha, 0.0, 1.0)
  return low, high


def score(b, c, n, null):
  """Tango's statistic, its estimate found on a grid of likelihoods."""
  low, high = max(0.0, -null), (1.0 - null) / 2.0

  def log_likelihood(p):
    cells = ((b, p), (c, p + null), (n - b - c, 1.0 - 2.0 * p - null))
    if any(k > 0 and q <= 0.0 for k, q in cells):
      return -math.inf
    return sum(k * math.log(q) for k, q in cells if k > 0)

  for _ in range(12):
    grid = np.linspace(low, high, 101)
    best = int(np.argmax([log_likelihood(p) for p in grid]))
    low, high = grid[max(0, best - 1)], grid[min(100, best + 1)]
  p = grid[best]
  variance = n * (2.0 * p + null - null**2)
  return (c - b - n * null) / math.sqrt(variance) if variance > 0.0 else 0.0


def exact_p(b, c, n, null, statistic, beta=1e-4, points=100):
  """The unconditional p-value by a sum over all outcomes of n examples.

  `statistic(b, c)` is given so that this checks the summation, not the
  statistic again.
  """
  low, high = clopper_pearson(b + c, n, beta / 2.0)
  low = max(low, -null)
  if high < low:
    return beta
  seen = statistic(b, c)
  extreme = [
    (i, j)
    for i in range(n + 1)
    for j in range(n + 1 - i)
    if statistic(i, j) >= seen - 1e-9
  ]
  worst = 0.0
  for rho in (*np.linspace(low, high, points), np.clip(null, low, high)):
    # The null is every difference up to min(null, rho); a few of them will do.
    top = min(null, rho)
    for difference in np.linspace(max(-rho, top - 0.1), top, 3):
      lose, gain = (rho - difference) / 2.0, (rho + difference) / 2.0
      mass = sum(trinomial(i, j, n, lose, gain) for i, j in extreme)
      worst = max(worst, mass)
  return min(1.0, worst + beta)


def mcnemar(b, c):
  """Two-sided exact p-value from all equally likely splits."""
  n = b + c
  extreme = sum(
    math.comb(n, i) for i in range(n + 1) if min(i, n - i) <= min(b, c)
  )
  return extreme / 2**n


def clustered_se(difference, clusters):
  """Miller 2024, with the small-sample factor G / (G - 1)."""
  mean = sum(difference) / len(difference)
  total = 0.0
  names = sorted(set(clusters))
  for name in names:
    part = sum(
      d - mean for d, k in zip(difference, clusters, strict=True) if k == name
    )
    total += part**2
  g = len(names)
  return math.sqrt(total * g / (g - 1)) / len(difference)


def student_tail(t, df, points=200_001):
  """P(T > t) by Simpson's rule on the density of |T| below |t|."""
  x = np.linspace(0.0, abs(t), points)
  log_scale = (
    math.lgamma((df + 1) / 2)
    - math.lgamma(df / 2)
    - 0.5 * math.log(df * math.pi)
  )
  y = np.exp(log_scale - (df + 1) / 2 * np.log1p(x**2 / df))
  weights = np.full(points, 2.0)
  weights[1::2] = 4.0
  weights[[0, -1]] = 1.0
  inside = float(weights @ y) * abs(t) / (points - 1) / 3.0
  return 0.5 - math.copysign(inside, t)


def holm_by_closure(p, alpha):
  """Holm as the closed test of Bonferroni: which hypotheses are rejected."""
  k = len(p)

  def rejects(subset):
    return min(p[i] for i in subset) <= alpha / len(subset)

  subsets = [
    s for r in range(1, k + 1) for s in itertools.combinations(range(k), r)
  ]
  return [all(rejects(s) for s in subsets if i in s) for i in range(k)]
