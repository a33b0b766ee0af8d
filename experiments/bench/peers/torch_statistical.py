"""Merges that are told statistics, in plain PyTorch.

As in `torch_formulas`: one leaf, in float32, rounded once. The statistics are
made of the models' own numbers, see `merging_statistics`, once: what is timed
is the merge.
"""

import torch

_MADE = {}


def fisher(base, models):
  """The mean weighed by diagonals, where those are not nearly 0."""
  diagonals = _made("fisher", models, lambda x: x.square())
  wide = base.float()
  total = torch.zeros_like(wide)
  mass = torch.zeros_like(wide)
  for model, diagonal in zip(models, diagonals, strict=True):
    diagonal = diagonal.clamp(min=1e-6)
    total.addcmul_(diagonal, model.float() - wide)
    mass.add_(diagonal)
  return total.div_(mass).add_(wide).to(base.dtype)


def regmean(base, models, off_diagonal):
  """The least squares of all layers' own answers."""
  del base
  known = _grams(models)
  if known is None:
    return _mean(models)
  left, right = _sums(known, models, off_diagonal)
  return torch.linalg.solve(left, right).to(models[0].dtype)


def mats(base, models, iterations):
  """The same by conjugate gradients from the mean."""
  del base
  known = _grams(models)
  if known is None:
    return _mean(models)
  left, right = _sums(known, models, 1.0)
  x = sum(model.float() for model in models) / len(models)
  bound = 1e-5 * torch.linalg.norm(right)
  residual = right - left @ x
  direction, size = residual, residual.square().sum()
  for _ in range(iterations):
    if size.sqrt() <= bound:
      break
    moved = left @ direction
    step = size / (direction * moved).sum()
    x = x + step * direction
    residual = residual - step * moved
    size, before = residual.square().sum(), size
    direction = residual + size / before * direction
  return x.to(models[0].dtype)


METHODS = {f.__name__: f for f in (fisher, regmean, mats)}


def _made(what, models, make):
  key = what, tuple(model.data_ptr() for model in models)
  if key not in _MADE:
    _MADE[key] = [make(model.float()) for model in models]
  return _MADE[key]


def _grams(models):
  x = models[0]
  if x.ndim != 2 or not 16 <= x.shape[0] <= 8192:
    return None

  def gram(x):
    return x @ x.T / x.shape[1] + 1e-4 * torch.eye(x.shape[0])

  return _made("gram", models, gram)


def _sums(known, models, off_diagonal):
  left, right = 0.0, 0.0
  for gram, model in zip(known, models, strict=True):
    damped = gram * off_diagonal
    damped.diagonal().copy_(gram.diagonal())
    left = left + damped
    right = right + damped @ model.float()
  return left, right


def _mean(models):
  total = models[0].float()
  for model in models[1:]:
    total = total + model
  return total.div_(len(models)).to(models[0].dtype)
