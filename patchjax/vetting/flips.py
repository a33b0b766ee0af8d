"""Flips: examples that were right and are wrong now, and how often at most.

Two models of equal accuracy may be wrong on different examples; whoever built
on the old one notices each example that was right. With b of n examples lost
the negative-flip rate is b / n (Yan et al. 2021, "Positive-congruent
training"); a gate holds an exact upper bound of it against a cap.
"""

from __future__ import annotations

import numpy as np


def clopper_pearson(k: float, n: float, *, alpha: float) -> tuple[float, float]:
  """Exact one-sided bounds of a proportion, each with error `alpha`.

  Clopper and Pearson 1934, as quantiles of the beta distribution; fractional
  counts (effective sample sizes) are allowed.

  Args:
    k: number of events.
    n: number of trials.
    alpha: error of each bound by itself.

  Returns:
    (lower, upper).

  Example:
    No event in 299: at most 1 % with 95 % confidence.

    >>> round(clopper_pearson(0, 299, alpha=0.05)[1], 4)
    0.01
  """
  from scipy import special

  low = 0.0 if k <= 0 else float(special.betaincinv(k, n - k + 1.0, alpha))
  high = (
    1.0 if k >= n else float(special.betaincinv(k + 1.0, n - k, 1.0 - alpha))
  )
  return low, high


def flip_bounds(
  flips: np.ndarray, *, alpha: float, clusters: np.ndarray | None = None
) -> tuple[float, float]:
  """Exact one-sided bounds of the negative-flip rate.

  Clopper and Pearson; with clusters on the effective sample size n / deff,
  deff >= 1 the design effect (Korn and Graubard 1998, Survey Methodology 24).

  Args:
    flips: 1 where the old model was right and the new one is wrong, [n].
    alpha: error of each bound by itself.
    clusters: group of each example, [n].

  Returns:
    (lower, upper).

  Example:
    >>> flips = np.zeros(299)
    >>> round(flip_bounds(flips, alpha=0.05)[1], 4)
    0.01
  """
  n = float(flips.size)
  rate = float(np.mean(flips))
  if clusters is not None:
    sums = cluster_sums(flips, clusters)
    units = sums.size
    plain = rate * (1.0 - rate) / n
    if units < 2:
      n = 1.0
    elif plain > 0.0:
      clustered = float(np.sum(sums**2)) / n**2 * units / (units - 1.0)
      n = n / max(1.0, clustered / plain)
    else:
      n = float(units)  # none or all flipped: one observation a cluster
  return clopper_pearson(rate * n, n, alpha=alpha)


def cluster_sums(
  difference: np.ndarray, clusters: np.ndarray | None
) -> np.ndarray:
  """Sums of the centred differences, one a cluster (an example without)."""
  centred = difference - np.mean(difference)
  if clusters is None:
    return centred
  _, index = np.unique(clusters, return_inverse=True)
  return np.bincount(index.reshape(-1), weights=centred)


def mcnemar(lost: int, gained: int) -> float:
  """Exact two-sided McNemar p-value, `2 BinomCDF(min(b, c); b + c, 1/2)`.

  It describes a difference from zero. It never accepts anything: "no
  significant difference" is what too few examples always give.

  Example:
    >>> round(mcnemar(10, 25), 4), mcnemar(0, 0)
    (0.0167, 1.0)
  """
  from scipy import special

  n = lost + gained
  if n == 0:
    return 1.0
  return min(1.0, 2.0 * float(special.bdtr(min(lost, gained), n, 0.5)))
