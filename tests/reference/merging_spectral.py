"""Merges by singular vectors, in plain numpy and float64.

After the papers, and read for defaults and rounding in the authors' code:
AntoAndGar/task_singular_vectors `TSVM_utils.py`, danielm1405/iso-merging
`iso.py`, IBM/STAR `STAR.py`, nathanielyvo/WUDI-Merging `wudi_main.py`,
gstoica27/KnOTS `task_merger.py`, lyymuwu/SVC `merge_func.py`. These hold
weights as outputs by inputs; leaves here are inputs by outputs.
"""

import numpy as np

from tests.reference import merging_common as common
from tests.reference import merging_sparse


def _matrices(base, models, layout):
  """Task vectors of each leaf, outputs by inputs."""
  deltas = common.task_vectors(base, models)
  turn = layout == "in_out"
  return {
    name: [d[name].T if turn and d[name].ndim == 2 else d[name] for d in deltas]
    for name in base
  }


def _added(base, found, scale, layout):
  turn = layout == "in_out"
  delta = {
    name: x.T if turn and x.ndim == 2 else x for name, x in found.items()
  }
  return common.added(base, delta, scale)


def _each(function, base, models, scale, layout, others="mean"):
  """A function of the matrices of each leaf; the mean of other leaves."""
  found = {}
  for name, tasks in _matrices(base, models, layout).items():
    if tasks[0].ndim == 2:
      found[name] = function(tasks)
    else:
      found[name] = np.mean(tasks, axis=0) * (others == "mean")
  return _added(base, found, scale, layout)


def _svd(x):
  return np.linalg.svd(x, full_matrices=False)


def polar(x):
  """The nearest matrix with orthonormal columns or rows."""
  u, _, vt = _svd(x)
  return u @ vt


def tsv_m(base, models, *, share=None, scale=1.0, layout="in_out"):
  """Task singular vectors, merged: https://arxiv.org/abs/2412.00081.

  Algorithm 1. The code fills r columns with int(r / k) triplets of each task.
  """
  part = 1 / len(models) if share is None else share

  def one(tasks):
    rank = int(min(tasks[0].shape) * part)
    found = [_svd(x) for x in tasks]
    u = np.concatenate([u[:, :rank] for u, _, _ in found], axis=1)
    s = np.concatenate([s[:rank] for _, s, _ in found])
    vt = np.concatenate([vt[:rank] for _, _, vt in found])
    return polar(u) @ np.diag(s) @ polar(vt)

  return _each(one, base, models, scale, layout)


def star(base, models, *, eta=40.0, scale=1.0, rank=None, layout="in_out"):
  """Spectral truncation and rescaling: https://arxiv.org/abs/2502.10339."""
  etas = common.numbers(eta, len(models))

  def truncated(x, eta):
    u, s, vt = _svd(x)
    s = s[:rank]
    count = np.searchsorted(np.cumsum(s), s.sum() * eta / 100) + 1
    kept = s[:count] * (s.sum() / s[:count].sum())
    return u[:, : len(kept)] @ np.diag(kept) @ vt[: len(kept)]

  def one(tasks):
    return np.mean([truncated(x, e) for x, e in zip(tasks, etas)], axis=0)

  return _each(one, base, models, scale, layout)


def iso_c(base, models, *, scale=1.0, layout="in_out"):
  """Isotropic merging in the common subspace: arXiv 2502.04959, algorithm 1."""

  def one(tasks):
    u, s, vt = _svd(sum(tasks))
    return s.mean() * (u @ vt)

  return _each(one, base, models, scale, layout)


def iso_cts(base, models, *, common=0.8, scale=1.0, layout="in_out"):
  """Iso-C with task-specific subspaces: arXiv 2502.04959, algorithm 2."""

  def one(tasks):
    most, k = min(tasks[0].shape), len(tasks)
    each = round((most - int(most * common)) / k)
    u, s, vt = (x for x in _svd(sum(tasks)))
    shared = most - each * k
    u, s, vt = u[:, :shared], s[:shared], vt[:shared]
    left, values, right = [u], [s], [vt]
    for x in tasks:
      a, b, c = _svd(x - u @ u.T @ x)
      left.append(a[:, :each])
      values.append(b[:each])
      right.append(c[:each])
    mean = np.concatenate(values).mean()
    left, right = np.concatenate(left, axis=1), np.concatenate(right)
    return mean * polar(left) @ polar(right)

  return _each(one, base, models, scale, layout)


def wudi(
  base,
  models,
  *,
  solver="closed",
  scale=1.0,
  ridge=0.0,
  learning_rate=1e-5,
  iterations=300,
  others="base",
  layout="in_out",
):
  """Least interference: https://arxiv.org/abs/2503.08099, equation 12.

  The normal equations, or the steps of torch's Adam from the sum.
  """

  def one(tasks):
    total = sum(tasks)
    gram = sum(x.T @ x / np.sum(x**2) for x in tasks)
    right = sum(x @ x.T @ x / np.sum(x**2) for x in tasks)
    if solver == "closed":
      eye = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
      return (right + total @ eye) @ np.linalg.pinv(gram + eye, hermitian=True)
    found, first, second = total, 0.0, 0.0
    for t in range(1, iterations + 1):
      gradient = 2 * (found @ gram - right)
      first = 0.9 * first + 0.1 * gradient
      second = 0.999 * second + 0.001 * gradient**2
      root = np.sqrt(second / (1 - 0.999**t)) + 1e-8
      found = found - learning_rate * first / (1 - 0.9**t) / root
    return found

  return _each(one, base, models, scale, layout, others)


def knots(base, models, *, inner="ties", layout="in_out", **options):
  """KnOTS: https://arxiv.org/abs/2410.19735, around a sparse method.

  The method sees the parts of all leaves as one model.
  """
  zeros, parts, back = {}, [{} for _ in models], {}
  for name, tasks in _matrices(base, models, layout).items():
    if tasks[0].ndim != 2:
      back[name] = None
      aligned = tasks
    else:
      u, s, vt = _svd(np.concatenate(tasks, axis=1))
      keep = s > 1e-5
      back[name] = u[:, keep]
      aligned = np.split(s[keep, None] * vt[keep], len(tasks), axis=1)
    zeros[name] = np.zeros_like(aligned[0])
    for part, x in zip(parts, aligned):
      part[name] = x
  method = getattr(merging_sparse, inner)
  merged = method(zeros, parts, **options)
  found = {
    name: x if back[name] is None else back[name] @ x
    for name, x in merged.items()
  }
  return _added(base, found, 1.0, layout)


def svc(base, models, *, alpha=0.1, formula="code", layout="in_out"):
  """Singular value calibration of task arithmetic: arXiv 2602.05536.

  Around 0.3 times the sum, as the code has it.
  """

  def one(tasks):
    merged = 0.3 * sum(tasks)
    u, s, vt = _svd(merged)
    shares = []
    for x in tasks:
      own = u.T @ x
      shares.append(
        np.sum((u.T @ merged) * own, axis=1) / np.sum(own**2, axis=1)
      )
    shares = np.stack(shares)
    if formula == "paper":
      factors = 1 / np.mean(np.maximum(shares, alpha), axis=0)
    else:
      mean = np.maximum(shares.mean(axis=0), alpha)
      factors = np.where((shares > 0).all(axis=0), 1 / mean, 1.0)
    return u @ np.diag(factors * s) @ vt

  found = {
    name: one(tasks) if tasks[0].ndim == 2 else 0.3 * sum(tasks)
    for name, tasks in _matrices(base, models, layout).items()
  }
  return _added(base, found, 1.0, layout)
