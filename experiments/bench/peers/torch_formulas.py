"""Merge methods in plain PyTorch, as one writes them who knows it well.

Each takes one leaf: the base (or None), the models, and settings in mergekit's
names; it computes in float32, in place where that spares memory, and rounds
once. Runs in mergekit's environment; imports nothing of patchjax.
"""

import math

import torch


def linear(base, models, weight):
  """The weighted mean."""
  del base
  total = models[0].float() * (weight[0] / sum(weight))
  for model, w in zip(models[1:], weight[1:], strict=True):
    total.add_(model, alpha=w / sum(weight))
  return total.to(models[0].dtype)


def task_arithmetic(base, models, weight, **settings):
  """The base plus a sum of weighted task vectors."""
  return _added(base, zip(_deltas(base, models), weight), settings["lambda"])


def slerp(base, models, t):
  """The point at t on the arc from the base to the other model."""
  a, b = base.float().flatten(), models[0].float().flatten()
  cosine = torch.dot(a, b) / (torch.linalg.norm(a) * torch.linalg.norm(b))
  cosine = cosine.clamp(-1, 1).item()
  if abs(cosine) > 0.9995:
    first, second = 1 - t, t
  else:
    angle = math.acos(cosine)
    first = math.sin((1 - t) * angle) / math.sin(angle)
    second = math.sin(t * angle) / math.sin(angle)
  return (a * first).add_(b, alpha=second).view_as(base).to(base.dtype)


def ties(base, models, weight, density):
  """Trims by a k-th value, elects signs, averages what agrees."""
  deltas = []
  for delta in _deltas(base, models):
    size = delta.abs()
    drop = delta.numel() - max(1, int(density * delta.numel()))
    if drop:
      cut = torch.kthvalue(size.flatten(), drop + 1).values
      delta.masked_fill_(size < cut, 0)
    deltas.append(delta)
  return _elected(base, deltas, weight, normalize=True)


def dare_linear(base, models, weight, density):
  """Drops at random, keeps the norm, adds."""
  dropped = (_dropped(d, density) for d in _deltas(base, models))
  return _added(base, zip(dropped, weight), 1.0)


def dare_ties(base, models, weight, density):
  """Drops at random, keeps the norm, elects signs."""
  dropped = [_dropped(d, density) for d in _deltas(base, models)]
  return _elected(base, dropped, weight, normalize=False)


def della(base, models, weight, density, epsilon):
  """Drops at random, the smaller the likelier, by rank in a row."""
  deltas = []
  for delta in _deltas(base, models):
    rows = delta if delta.ndim > 1 else delta[None]
    places = torch.arange(rows.shape[1], dtype=torch.float32)
    likely = density - epsilon + places * (2 * epsilon / (rows.shape[1] - 1))
    order = rows.abs().argsort(dim=1)
    likely = torch.empty_like(rows).scatter_(1, order, likely.expand_as(rows))
    kept = rows * (torch.rand_like(rows) < likely)
    deltas.append(_as_long(kept, rows).view_as(delta))
  return _elected(base, deltas, weight, normalize=True)


def breadcrumbs(base, models, weight, density, gamma):
  """Keeps magnitudes between two k-th values, adds."""

  def middle(delta):
    n = delta.numel()
    kept = int(density * n)
    low = max(0, n - kept - int(gamma * n))
    size = delta.abs().flatten()
    first = torch.kthvalue(size, low + 1).values
    last = torch.kthvalue(size, low + kept).values if kept else first - 1
    size = size.view_as(delta)
    return delta.mul_((size >= first) & (size <= last))

  vectors = (middle(delta) for delta in _deltas(base, models))
  return _added(base, zip(vectors, weight), 1.0)


def sce(base, models, select_topk):
  """Selects by variance, weighs by energy, elects signs."""
  deltas = torch.stack(list(_deltas(base, models)))
  variance = deltas.var(dim=0, unbiased=False)
  kept = int(torch.count_nonzero(variance) * select_topk)
  if kept:
    size = variance.numel()
    cut = torch.kthvalue(variance.flatten(), size - kept + 1).values
    deltas.mul_(variance >= cut)
  else:
    deltas.zero_()
  energy = deltas.square().flatten(1).mean(1)
  total = energy.sum()
  if total < 1e-6:
    weight = torch.full_like(energy, 1 / len(energy))
  else:
    weight = energy / total
  up = deltas.sum(0) >= 0
  agrees = torch.where(up, deltas > 0, deltas < 0)
  weight = weight.view(-1, *[1] * base.ndim) * agrees
  mixed = (deltas * weight).sum(0).div_(weight.sum(0).clamp_(min=1e-6))
  return mixed.add_(base).to(base.dtype)


METHODS = {
  f.__name__: f
  for f in (
    linear,
    task_arithmetic,
    slerp,
    ties,
    dare_linear,
    dare_ties,
    della,
    breadcrumbs,
    sce,
  )
}


def _deltas(base, models):
  wide = base.float()
  return (model.float() - wide for model in models)


def _added(base, weighted, scale):
  total = None
  for delta, w in weighted:
    total = delta.mul_(w) if total is None else total.add_(delta, alpha=w)
  return total.mul_(scale).add_(base).to(base.dtype)


def _elected(base, deltas, weight, normalize):
  for delta, w in zip(deltas, weight, strict=True):
    delta.mul_(w)
  up = sum(deltas[1:], deltas[0]) >= 0
  mixed, mass = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
  for delta, w in zip(deltas, weight, strict=True):
    agrees = torch.where(up, delta > 0, delta < 0)
    mixed.add_(delta.mul_(agrees))
    if normalize:
      mass.add_(agrees, alpha=w)
  if normalize:
    mixed.div_(mass.masked_fill_(mass == 0, 1))
  return mixed.add_(base).to(base.dtype)


def _dropped(delta, density):
  kept = delta * (torch.rand_like(delta) < density)
  return _as_long(kept, delta)


def _as_long(kept, delta):
  """Returns what was kept, scaled to the L1 norm it had."""
  norm = kept.abs().sum()
  return kept.mul_(delta.abs().sum() / norm) if norm > 1e-7 else kept
