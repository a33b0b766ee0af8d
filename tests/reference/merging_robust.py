"""Robust aggregation in plain numpy.

From the papers' definitions. Read for defaults: the geometric median of RFA (4
iterations, 1e-5, early stop on a relative 1e-6), and the aggregators of
epfml's byzantine-robust repositories as copies of them have it (one iteration
of clipping from zero; their Krum squares squared distances again and their
Multi-Krum does not divide by the number chosen, unlike the paper, which is
followed here). Only `centered_clipping` needs a base: it starts there.
"""

import numpy as np

from tests.reference import merging_common as common


def _stacked(models):
  models = [common.wide(m) for m in models]
  return {n: np.stack([m[n] for m in models]) for n in models[0]}


def _vectors(models):
  """Whole models as rows of one array."""
  return np.stack([common.flat(common.wide(m)) for m in models])


def median(base, models, *, masks=None, flavour="paper"):
  """Median of each entry; of an even number the mean of the middle two.

  Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 1.
  """
  del base, masks
  common.check(flavour)
  return {n: np.median(x, axis=0) for n, x in _stacked(models).items()}


def trimmed_mean(base, models, *, drop=1, masks=None, flavour="paper"):
  """Mean of each entry without its `drop` largest and `drop` smallest values.

  Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 2, with
  drop = beta k.
  """
  del base, masks
  common.check(flavour)
  return {
    n: np.mean(np.sort(x, axis=0)[drop : len(x) - drop], axis=0)
    for n, x in _stacked(models).items()
  }


def geometric_median(
  base,
  models,
  *,
  weights=None,
  iterations=4,
  epsilon=1e-5,
  masks=None,
  flavour="paper",
):
  """Smoothed Weiszfeld over whole models, from the weighted mean.

  Pillutla et al. 2019, https://arxiv.org/abs/1912.13445 (RFA):
  z <- sum_i b_i x_i / sum_i b_i with b_i = w_i / max(epsilon, ||z - x_i||), w
  summing to 1. A fixed number of iterations.
  """
  del base, masks
  common.check(flavour)
  x = _vectors(models)
  w = common.numbers(weights, len(models))
  w = w / w.sum()
  z = w @ x
  for _ in range(iterations):
    b = w / np.maximum(epsilon, np.linalg.norm(x - z, axis=1))
    z = b @ x / b.sum()
  return common.unflat(z, models[0])


def krum_scores(models, attackers):
  """Sum of the squared distances to the k - attackers - 2 nearest others."""
  x = _vectors(models)
  k = len(x)
  squares = np.sum((x[:, None] - x[None]) ** 2, axis=-1)
  near = k - attackers - 2
  return np.array(
    [np.sort(np.delete(squares[i], i))[:near].sum() for i in range(k)]
  )


def krum(base, models, *, attackers=1, chosen=1, masks=None, flavour="paper"):
  """The model of the smallest score; the mean of the `chosen` smallest.

  Blanchard et al. 2017, https://arxiv.org/abs/1703.02757, section 4 (Krum,
  Multi-Krum); of equal scores the first model wins. Needs 2 attackers + 3
  models.
  """
  del base, masks
  common.check(flavour)
  order = np.argsort(krum_scores(models, attackers), kind="stable")[:chosen]
  stacked = _stacked(models)
  return {n: np.mean(x[np.sort(order)], axis=0) for n, x in stacked.items()}


def centered_clipping(
  base, models, *, radius=1.0, iterations=1, masks=None, flavour="paper"
):
  """z <- z + mean_i (x_i - z) min(1, radius / ||x_i - z||), from the base.

  Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, there from
  the aggregate of the round before. Norms of whole models.
  """
  del masks
  common.check(flavour)
  x = np.stack([common.flat(d) for d in common.task_vectors(base, models)])
  z = np.zeros(x.shape[1])
  for _ in range(iterations):
    length = np.maximum(np.linalg.norm(x - z, axis=1), 1e-30)
    factor = np.minimum(1.0, radius / length)
    z = z + np.mean((x - z) * factor[:, None], axis=0)
  return common.added(base, common.unflat(z, base))
