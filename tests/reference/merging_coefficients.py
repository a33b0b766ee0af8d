"""Methods whose result is a combination with computed coefficients, in numpy.

Model Stock: flavour "mergekit" is checked against outputs of mergekit 0.1.5;
the authors' repository (naver-ai/model-stock) was stored without its notebook,
so the formula is that of FusionBench's `model_stock.py` (which cites it). LiNeS
is wang-kee/LiNeS `src/eval/eval.py`. For MetaGPT only a third party's code was
found, which agrees with the formula.
"""

import re

import numpy as np

from tests.reference import merging_common as common


def model_stock(
  base, models, *, filter_wise=False, masks=None, flavour="paper"
):
  """t mean(x_i) + (1 - t) base with t = k cos / (1 + (k - 1) cos).

  Jang et al. 2024, https://arxiv.org/abs/2403.19522; cos is
  that of the angle between two task vectors of a leaf (of each row along the
  last axis, `filter_wise`), for more than two the mean over pairs. A pair with
  a zero vector has cos 0; t is 0 where the denominator vanishes. mergekit
  divides the dot product by at least 1e-6, which lowers cos in small leaves.
  (FusionBench averages angles, which for two contributors is the same.)
  """
  del masks
  common.check(flavour)
  deltas = common.task_vectors(base, models)
  floor = 1e-6 if flavour == "mergekit" else 1e-30
  k, out = len(models), {}
  for name in base:
    x = [np.atleast_1d(d[name]) for d in deltas]
    axis = -1 if filter_wise else None
    cosines = []
    for i in range(k):
      for j in range(i + 1, k):
        dot = np.sum(x[i] * x[j], axis=axis, keepdims=True)
        norms = [
          np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (x[i], x[j])
        ]
        cosine = dot / np.maximum(norms[0] * norms[1], floor)
        cosines.append(np.clip(cosine, -1, 1))
    cosine = np.mean(cosines, axis=0)
    below = 1 + (k - 1) * cosine
    singular = np.abs(below) < 1e-6
    t = np.where(singular, 0, k * cosine / np.where(singular, 1, below))
    out[name] = (t * (sum(x) / k)).reshape(np.shape(base[name]))
  return common.added(base, out)


def metagpt_coefficients(base, models):
  """||tau_i||^2 / sum_j ||tau_j||^2, over the whole model."""
  deltas = common.task_vectors(base, models)
  squares = np.array([np.sum(common.flat(d) ** 2) for d in deltas])
  return squares / squares.sum()


def metagpt(base, models, *, scale=1.0, masks=None, flavour="paper"):
  """base + sum of coefficient times task vector.

  Zhou et al. 2024, https://arxiv.org/abs/2406.11385 (EMNLP), MetaGPT's closed
  form for orthogonal task vectors.
  """
  del masks
  common.check(flavour)
  c = metagpt_coefficients(base, models)
  deltas = common.task_vectors(base, models)
  joint = {n: sum(ci * d[n] for ci, d in zip(c, deltas)) for n in base}
  return common.added(base, joint, scale)


def lines(
  base,
  models,
  *,
  alpha=None,
  beta=0.5,
  blocks=None,
  masks=None,
  flavour="paper",
):
  """The sum of task vectors times alpha + beta l / (L - 1) in block l of L.

  Wang et al. 2024, https://arxiv.org/abs/2410.17146. The block of
  a leaf is the first number of its name that stands between dots (the code
  looks for ".0.", ".1.", ... in that order); leaves of no block get alpha. For
  merging the code takes alpha = 1/k for sums of task vectors and searches
  beta; for one contributor it searches alpha with beta = 1 - alpha.
  """
  del masks
  common.check(flavour)
  alpha = 1 / len(models) if alpha is None else alpha
  places = {}
  for name in base:
    dotted = f".{name.replace('/', '.')}."
    found = [int(x) for x in re.findall(r"(?<=\.)\d+(?=\.)", dotted)]
    places[name] = min(found, default=None)
  known = [p for p in places.values() if p is not None]
  blocks = max(known, default=0) + 1 if blocks is None else blocks
  deltas = common.task_vectors(base, models)
  out = {}
  for name in base:
    scale = alpha
    if places[name] is not None:
      scale = alpha + beta * places[name] / max(blocks - 1, 1)
    out[name] = scale * sum(d[name] for d in deltas)
  return common.added(base, out)
