"""Merges weighed by statistics, in numpy, one leaf after another, float64.

Statistics are those of patchjax: their values are used, nothing else.
"""

import numpy as np


def _mean(models, name, weights):
  weights = np.broadcast_to(np.float64(weights), len(models))
  shares = weights / weights.sum()
  return sum(s * np.float64(m[name]) for s, m in zip(shares, models))


def fisher(
  base,
  models,
  *,
  fishers,
  weights=1.0,
  floor=1e-6,
  favor=None,
  normalize=True,
  shrinkage=0.0,
):
  """Matena and Raffel's `_merge_with_coeffs`, and the base where 0/0."""
  known = []
  for f in fishers:
    values = {n: np.float64(x) for n, x in f.values.items()}
    known.append(
      {
        n: (f.n * x + shrinkage * x.mean()) / (f.n + shrinkage)
        for n, x in values.items()
      }
    )
  weights = np.broadcast_to(np.float64(weights), len(models))
  merged = {}
  for name, start in base.items():
    if name not in known[0]:
      merged[name] = _mean(models, name, weights)
      continue
    above = below = 0.0
    for i, (f, w, model) in enumerate(zip(known, weights, models)):
      if normalize:
        w = w / np.sqrt(sum(np.sum(x**2) for x in f.values()))
      diagonal = f[name]
      if favor is None or (favor == "first" and i == 0):
        diagonal = np.maximum(diagonal, floor)
      above = above + w * diagonal * np.float64(model[name])
      below = below + w * diagonal
    sure = below > 0
    if favor == "base":
      sure &= np.max([f[name] for f in known], axis=0) >= floor
    merged[name] = np.where(
      sure, above / np.where(sure, below, 1), np.float64(start)
    )
  return merged


def scaled(matrix, share):
  """`reduce_non_diag` of the code of RegMean."""
  matrix = np.float64(matrix)
  diagonal = np.eye(matrix.shape[-1]) * matrix
  return diagonal + share * (matrix - diagonal)


def _shrunk(matrix, n, examples):
  matrix = np.float64(matrix)
  size = matrix.shape[-1]
  level = np.trace(matrix, axis1=-2, axis2=-1)[:, None, None] / size
  return (n * matrix + examples * level * np.eye(size)) / (n + examples)


def regmean(
  base, models, *, grams, weights=1.0, off_diagonal=0.9, shrinkage=0.0
):
  """Kernels are [inputs, outputs]; one matrix a leaf."""
  del base
  weights = np.broadcast_to(np.float64(weights), len(models))
  merged = {}
  for name in models[0]:
    if name not in grams[0].values:
      merged[name] = _mean(models, name, weights)
      continue
    left = right = 0.0
    for g, w, model in zip(grams, weights, models):
      matrix = _shrunk(g.values[name], g.n, shrinkage)[0]
      matrix = w * scaled(matrix, off_diagonal)
      left = left + matrix
      right = right + matrix @ np.float64(model[name])
    merged[name] = np.linalg.solve(left, right)
  return merged


def mats(
  base,
  models,
  *,
  statistics,
  weights=1.0,
  init=None,
  iterations=100,
  tolerance=1e-5,
  off_diagonal=1.0,
  shrinkage=0.0,
):
  """Conjugate gradients as SciPy's, on operators as in the code of MaTS."""
  del base
  assert shrinkage == 0
  weights = np.broadcast_to(np.float64(weights), len(models))
  merged = {}
  for name in models[0]:
    own = [_operator(s, name, off_diagonal) for s in statistics]
    if own[0] is None:
      merged[name] = _mean(models, name, weights)
      continue

    def operator(x, own=own):
      return sum(w * c(x) for w, c in zip(weights, own))

    right = sum(
      w * c(np.float64(m[name])) for w, c, m in zip(weights, own, models)
    )
    if init is None:
      start = _mean(models, name, weights)
    else:
      start = np.float64(init[name])
    bound = tolerance * np.linalg.norm(right)
    merged[name] = _gradients(operator, right, start, iterations, bound)
  return merged


def _operator(statistic, name, share):
  if hasattr(statistic, "inputs"):
    if name not in statistic.inputs:
      return None
    a = scaled(statistic.inputs[name], share)[0]
    s = scaled(statistic.outputs[name], share)[0]
    return lambda x: a @ x @ s
  if name not in statistic.values:
    return None
  if hasattr(statistic, "rows"):
    g = scaled(statistic.values[name], share)[0]
    return lambda x: g @ x
  diagonal = np.float64(statistic.values[name])
  return lambda x: diagonal * x


def _gradients(operator, right, x, iterations, bound):
  residual = right - operator(x)
  direction, size = residual, np.sum(residual**2)
  for _ in range(iterations):
    if np.sqrt(size) <= bound:
      break
    moved = operator(direction)
    step = size / np.sum(direction * moved)
    x = x + step * direction
    residual = residual - step * moved
    size, before = np.sum(residual**2), size
    direction = residual + size / before * direction
  return x


def trust_region(base, models, *, gradients=None, quantile=0.99, scale=0.3):
  """FusionBench's TATR: one threshold over the flattened model."""
  # Conflicts are compared: in the precision they are computed in.
  deltas = [{n: m[n] - base[n] for n in base} for m in models]
  pulls = gradients
  if pulls is None:
    pulls = [{n: np.abs(d) for n, d in one.items()} for one in deltas]
  conflict = {n: np.zeros_like(x) for n, x in base.items()}
  for name in base:
    for i, pull in enumerate(pulls):
      for j, delta in enumerate(deltas):
        if i != j:
          conflict[name] += pull[name] * np.abs(delta[name])
  flat = np.sort(np.concatenate([c.reshape(-1) for c in conflict.values()]))
  place = max(0, min(int(flat.size * quantile), flat.size - 1))
  return {
    n: np.float64(x)
    + scale
    * sum(np.float64(d[n]) * (conflict[n] < flat[place]) for d in deltas)
    for n, x in base.items()
  }


def regmean_plus_plus(models, data, *, blocks=None, off_diagonal=0.9):
  """Of networks `tanh(x W + b)`, layer on layer: `{"0": {"w", "b"}, ...}`.

  Blocks are lists of names, by default of one layer each. What goes into a
  block comes from the merged ones before it, and inside it each model goes on
  with its own layers.
  """
  inputs = [np.float64(x) for x in data]
  merged = {}
  for block in blocks or [[name] for name in models[0]]:
    own = inputs
    for name in block:
      known = [scaled(x.T @ x / len(x), off_diagonal) for x in own]
      kernels = [np.float64(m[name]["w"]) for m in models]
      right = sum(g @ w for g, w in zip(known, kernels))
      kernel = np.linalg.solve(sum(known), right)
      bias = sum(np.float64(m[name]["b"]) for m in models) / len(models)
      merged[name] = {"w": kernel, "b": bias}
      own = [
        np.tanh(x @ w + m[name]["b"]) for x, w, m in zip(own, kernels, models)
      ]
    for name in block:
      w, b = merged[name]["w"], merged[name]["b"]
      inputs = [np.tanh(x @ w + b) for x in inputs]
  return merged
