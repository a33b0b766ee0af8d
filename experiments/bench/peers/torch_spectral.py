"""Merges by singular vectors in plain PyTorch, for leaves inputs by outputs.

As in `torch_formulas`: one leaf, in float32, rounded once. Vectors get the
mean, as in the authors' code.
"""

import torch


def tsv_m(base, models, scale):
  """The leading singular vectors of each task, made orthonormal together."""

  def merged(tasks):
    rank = int(min(tasks[0].shape) * (1 / len(tasks)))
    found = [torch.linalg.svd(x, full_matrices=False) for x in tasks]
    u = _polar(torch.cat([u[:, :rank] for u, _, _ in found], 1))
    s = torch.cat([s[:rank] for _, s, _ in found])
    vt = _polar(torch.cat([vt[:rank] for _, _, vt in found]))
    return (u * s) @ vt

  return _each(merged, base, models, scale)


def iso_c(base, models, scale):
  """The sum, with one singular value."""

  def merged(tasks):
    u, s, vt = torch.linalg.svd(sum(tasks), full_matrices=False)
    return (u @ vt) * s.mean()

  return _each(merged, base, models, scale)


def star(base, models, eta):
  """Each spectrum truncated and scaled up, averaged."""

  def truncated(x):
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    cut = s.sum() * eta / 100
    rank = int(torch.searchsorted(torch.cumsum(s, 0), cut)) + 1
    s = s[:rank] * (s.sum() / s[:rank].sum())
    return (u[:, :rank] * s) @ vt[:rank]

  def merged(tasks):
    return sum(map(truncated, tasks)) / len(tasks)

  return _each(merged, base, models, 1.0)


def wudi(base, models, scale):
  """The normal equations of the least interference, by singular vectors.

  The matrix of an embedding's equations would have the square of its inputs.
  """

  def merged(tasks):
    units = [x / torch.linalg.norm(x) for x in tasks]
    right = sum(u @ (u.T @ x) for u, x in zip(units, tasks, strict=True))
    beside = torch.cat(units, 1)
    u, s, _ = torch.linalg.svd(beside, full_matrices=False)
    least = s[0] * max(beside.shape) * torch.finfo(s.dtype).eps
    inverse = torch.where(s > least, s.square().reciprocal(), 0.0)
    return u @ (inverse[:, None] * (u.T @ right))

  return _each(merged, base, models, scale, others=0.0)


def svc(base, models, alpha):
  """Task arithmetic, its over-counted directions scaled down."""

  def merged(tasks):
    v, s, ut = torch.linalg.svd(0.3 * sum(tasks), full_matrices=False)
    rows = v * s
    shares = []
    for x in tasks:
      own = x @ ut.T
      shares.append((rows * own).sum(0) / own.square().sum(0).clamp_(min=1e-12))
    shares = torch.stack(shares)
    factors = shares.mean(0).clamp_(min=alpha)
    factors = torch.where((shares > 0).all(0), factors, 1.0)
    return (v * (s / factors)) @ ut

  return _each(merged, base, models, 1.0, others=0.3 * len(models))


METHODS = {f.__name__: f for f in (tsv_m, iso_c, star, wudi, svc)}


def _each(function, base, models, scale, others=1.0):
  wide = base.float()
  tasks = [model.float() - wide for model in models]
  if base.ndim == 2:
    found = function(tasks)
  else:
    found = sum(tasks) * (others / len(tasks))
  return found.mul_(scale).add_(wide).to(base.dtype)


def _polar(x):
  u, _, vt = torch.linalg.svd(x, full_matrices=False)
  return u @ vt
