"""Averages of models in plain numpy: linear, soups, task arithmetic, EMA.

Checked against: mergekit 0.1.5 (outputs in tests/golden), mlfoundations'
model-soups `main.py`. Written from the formulas.
"""

from tests.reference import merging_common as common


def linear(
  base,
  models,
  *,
  weights=None,
  normalize=True,
  masks=None,
  flavour="paper",
):
  """sum_i w_i x_i, over sum_i w_i if `normalize`.

  Wortsman et al. 2022, https://arxiv.org/abs/2203.05482. The base has no vote.
  mergekit agrees; neither guards against weights that sum to 0.
  """
  del base, masks
  common.check(flavour)
  w = common.numbers(weights, len(models))
  mass = w.sum() if normalize else 1.0
  models = [common.wide(m) for m in models]
  return {
    name: sum(wi * m[name] for wi, m in zip(w, models)) / mass
    for name in models[0]
  }


def uniform_soup(base, models, *, masks=None, flavour="paper"):
  """The plain mean (Wortsman et al. 2022, section 2)."""
  return linear(base, models, masks=masks, flavour=flavour)


def greedy_ingredients(models, score):
  """Indices of the models of the greedy soup, in the order they are added.

  Recipe 1 of Wortsman et al. 2022: by falling held-out score; a model stays
  if the soup with it scores better than the soup without it. As in the
  released `main.py`, better is strictly so, and of equal scores the later
  model comes first (it sorts upwards, then reverses).
  """
  scores = [score(common.wide(m)) for m in models]
  order = sorted(range(len(models)), key=lambda i: scores[i])[::-1]
  chosen, best = [order[0]], scores[order[0]]
  for i in order[1:]:
    value = score(linear(None, [models[j] for j in [*chosen, i]]))
    if value > best:
      chosen, best = [*chosen, i], value
  return chosen


def greedy_soup(base, models, *, score, masks=None, flavour="paper"):
  """The mean of `greedy_ingredients`."""
  chosen = greedy_ingredients(models, score)
  return linear(base, [models[i] for i in chosen], flavour=flavour)


def wise_ft(base, models, *, alpha=0.5, masks=None, flavour="paper"):
  """(1 - alpha) base + alpha x, one contributor.

  Wortsman et al. 2021, https://arxiv.org/abs/2109.01903; alpha = 0.5 is
  the paper's recommendation.
  """
  del masks
  common.check(flavour)
  (model,) = map(common.wide, models)
  base = common.wide(base)
  return {n: (1 - alpha) * base[n] + alpha * model[n] for n in base}


def ema(base, models, *, decay=0.9, masks=None, flavour="paper"):
  """Exponential moving average over checkpoints, the oldest first.

  a_0 = x_0, a_i = decay a_(i-1) + (1 - decay) x_i (Polyak-style averaging as
  in Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780).
  """
  del base, masks
  common.check(flavour)
  out, *rest = map(common.wide, models)
  for model in rest:
    out = {n: decay * out[n] + (1 - decay) * model[n] for n in out}
  return out


def lawa(base, models, *, window=None, masks=None, flavour="paper"):
  """Mean of the last `window` checkpoints, the oldest first.

  Kaddour 2022, https://arxiv.org/abs/2209.14981 (LAWA). None: all of them.
  """
  window = len(models) if window is None else window
  return linear(base, models[-window:], masks=masks, flavour=flavour)


def task_arithmetic(
  base,
  models,
  *,
  weights=None,
  scale=1.0,
  normalize=False,
  masks=None,
  flavour="paper",
):
  """base + scale * sum_i w_i tau_i, over sum_i w_i if `normalize`.

  Ilharco et al. 2023, https://arxiv.org/abs/2212.04089. mergekit agrees, and
  does not divide by weights that sum to less than 1e-8.
  """
  del masks
  common.check(flavour)
  w = common.numbers(weights, len(models))
  mass = w.sum() if normalize and abs(w.sum()) >= 1e-8 else 1.0
  deltas = common.task_vectors(base, models)
  mixed = {n: sum(wi * d[n] for wi, d in zip(w, deltas)) / mass for n in base}
  return common.added(base, mixed, scale)


def passthrough(base, models, *, scale=None, masks=None, flavour="paper"):
  """The one contributor, times `scale`. mergekit's method, no paper."""
  del base, masks
  common.check(flavour)
  (model,) = map(common.wide, models)
  return {n: x * (1.0 if scale is None else scale) for n, x in model.items()}
