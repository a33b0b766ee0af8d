"""TIES and its relatives in plain numpy, one line a formula.

Written from the formulas of the TIES paper (Yadav et al. 2023) and of its
published code: trim by a magnitude's rank, elect the sign of the
sum, average what agrees. Leaves are lists of float arrays, one list a model.
"""

import numpy as np


def flat(leaves):
  """All numbers of a model as one float32 vector."""
  return np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves])


def unflat(vector, leaves):
  """The vector cut into arrays of the shapes of `leaves`."""
  ends = np.cumsum([np.size(x) for x in leaves])[:-1]
  parts = np.split(vector, ends)
  return [p.reshape(np.shape(x)) for p, x in zip(parts, leaves)]


def kept(vector, density):
  """Entries at least as large as the (n - k)-th smallest magnitude, else 0.

  That is `topk_values_mask` of the paper's code, where `kthvalue` counts from
  one: k + 1 entries pass if none tie.
  """
  n = len(vector)
  k = n - int(n * density)
  if k == 0:  # kthvalue(0) is an error there; all entries are the top 100 %
    return vector
  threshold = np.sort(np.abs(vector))[k - 1]
  return np.where(np.abs(vector) >= threshold, vector, np.float32(0))


def kept_exactly(vector, density):
  """Exactly k entries: ties go to the lowest index."""
  k = int(density * len(vector))
  order = np.argsort(-np.abs(vector), kind="stable")[:k]
  out = np.zeros_like(vector)
  out[order] = vector[order]
  return out


def trimmed(deltas, density, scope, exact=False):
  """Task vectors (lists of leaves) trimmed over the tree or by leaf."""
  keep = kept_exactly if exact else kept
  result = []
  for delta in deltas:
    if scope == "tree":
      result.append(unflat(keep(flat(delta), density), delta))
    else:
      result.append([keep(x.ravel(), density).reshape(x.shape) for x in delta])
  return result


def elected(vectors, frequency=False, zero="majority"):
  """The sign of each entry: that of the sum, zeros by the global majority."""
  votes = np.sign(vectors) if frequency else vectors
  total = votes[0].copy()
  for vote in votes[1:]:
    total += vote
  sign = np.sign(total)
  if zero == "positive":
    return np.where(sign == 0, np.float32(1), sign)
  return np.where(sign == 0, np.sign(sign.sum()), sign)


def disjoint_mean(vectors, sign, weights):
  """Mean of the entries whose sign was elected; a sign of 0 takes minus."""
  selected = np.where(
    sign > 0, vectors * (vectors > 0), vectors * (vectors < 0)
  )
  mass = ((selected != 0) * weights[:, None]).sum(0)
  total = (selected * weights[:, None]).sum(0)
  return np.where(mass != 0, total / np.where(mass != 0, mass, 1), 0)


def ties(
  base,
  models,
  density,
  *,
  scale=1.0,
  scope="tree",
  weights=None,
  frequency=False,
  flavour="paper",
):
  """The merged leaves, float32."""
  origin = flat(base)
  deltas = [unflat(flat(m) - origin, base) for m in models]
  w = (
    np.ones(len(models), np.float32) if weights is None else np.float32(weights)
  )
  mergekit = flavour == "mergekit"
  vectors = np.stack(
    [flat(d) for d in trimmed(deltas, density, scope, exact=mergekit)]
  )
  if mergekit:
    heavy = vectors * w[:, None]
    sign = elected(heavy, frequency, "positive")
    agree = np.sign(heavy) == sign
    mass = (agree * w[:, None]).sum(0)
    merged = (heavy * agree).sum(0) / np.where(mass != 0, mass, 1)
  else:
    merged = disjoint_mean(vectors, elected(vectors, frequency), w)
  return unflat(origin + np.float32(scale) * merged.astype(np.float32), base)


def linear(base, models, weights=None):
  """The weighted mean of the models, float64."""
  w = np.ones(len(models)) if weights is None else np.asarray(weights)
  vectors = np.stack([flat(m).astype(np.float64) for m in models])
  return unflat((vectors * w[:, None]).sum(0) / w.sum(), base)


def task_arithmetic(base, models, scale, weights=None):
  """base + scale * sum of weighted task vectors, float64."""
  w = np.ones(len(models)) if weights is None else np.asarray(weights)
  origin = flat(base).astype(np.float64)
  total = sum(wi * (flat(m) - origin) for wi, m in zip(w, models))
  return unflat(origin + scale * total, base)
