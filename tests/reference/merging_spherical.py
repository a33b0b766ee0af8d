"""Means on spheres in plain numpy: slerp, nuslerp, multislerp, karcher.

Each leaf is one vector, whatever its shape. Written from the formulas
and checked against
outputs of mergekit 0.1.5 in tests/golden.
"""

import numpy as np

from tests.reference import merging_common as common


def _great_circle(t, a, b, cosine, linear):
  """Coefficients of slerp, or of linear interpolation where `linear`."""
  angle = np.arccos(np.where(linear, 0.0, cosine))
  sine = np.sin(angle)
  first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / sine)
  second = np.where(linear, t, np.sin(t * angle) / sine)
  return first * a + second * b


def slerp(
  base, models, *, t=0.5, threshold=0.9995, masks=None, flavour="paper"
):
  """sin((1-t)W)/sin W x_0 + sin(t W)/sin W x_1, W the angle between them.

  Shoemake 1985, https://doi.org/10.1145/325334.325242. x_0 is the base, or
  the first of two contributors. If |cos W| > threshold the interpolation is
  linear (so in mergekit and in the common implementations; Shoemake has no
  threshold). A norm of at most 1e-8 counts as 1.
  """
  del masks
  common.check(flavour)
  first, second = map(common.wide, models if base is None else [base, *models])
  out = {}
  for name, a in first.items():
    b = second[name]
    norms = [np.linalg.norm(x) for x in (a, b)]
    norms = [x if x > 1e-8 else 1.0 for x in norms]
    cosine = np.clip(np.sum(a / norms[0] * (b / norms[1])), -1, 1)
    out[name] = _great_circle(t, a, b, cosine, abs(cosine) > threshold)
  return out


def nuslerp(
  base,
  models,
  *,
  weights=None,
  flatten=True,
  row_wise=False,
  masks=None,
  flavour="paper",
):
  """Slerp of two contributors with t = w_2 / (w_1 + w_2), of their task
  vectors if there is a base. No paper: mergekit is the source.

  Without `flatten` each column of a leaf (vectors along the first axis) is a
  vector of its own; with `row_wise` each row (along the last). That is what
  mergekit's documentation says; its code does the reverse, and so does
  flavour "mergekit". Linear only where the vectors are parallel; t is 0.5 if
  the weights cancel.
  """
  del masks
  common.check(flavour)
  w = common.numbers(weights, 2)
  t = 0.5 if abs(w.sum()) < 1e-6 else w[1] / w.sum()
  if base is None:
    first, second = map(common.wide, models)
  else:
    first, second = common.task_vectors(base, models)
  rows = row_wise if flavour == "paper" else not row_wise
  out = {}
  for name, a in first.items():
    b = second[name]
    axis = None if flatten else -1 if rows else 0
    norms = [
      np.maximum(np.sqrt(np.sum(x * x, axis=axis, keepdims=True)), 1e-7)
      for x in (a, b)
    ]
    cosine = np.sum(a / norms[0] * (b / norms[1]), axis=axis, keepdims=True)
    cosine = np.clip(cosine, -1, 1)
    # mergekit asks for 1 - cos^2 <= 1e-16 in float32, which is cos = +-1.
    parallel = 1 - np.float32(cosine) ** 2 <= 1e-16
    out[name] = _great_circle(t, a, b, cosine, parallel)
  return out if base is None else common.added(base, out)


def multislerp(
  base,
  models,
  *,
  weights=None,
  normalize=True,
  epsilon=1e-8,
  masks=None,
  flavour="paper",
):
  """One step of the weighted mean on the sphere, from the Euclidean mean.

  https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. With unit vectors
  u_i and m their normalised weighted mean: T = sum_i w_i (u_i - (u_i.m) m),
  result (sum_i w_i ||x_i||) (m cos ||T|| + T sin ||T|| / ||T||). Of task
  vectors if there is a base. One model: that model. Weights are divided by
  their sum if `normalize`.
  """
  del masks
  common.check(flavour)
  if len(models) == 1:
    return common.wide(models[0])
  w = common.numbers(weights, len(models))
  if normalize:
    w = w / w.sum()
  if base is None:
    vectors = [common.wide(m) for m in models]
  else:
    vectors = common.task_vectors(base, models)
  out = {}
  for name in vectors[0]:
    x = [v[name] for v in vectors]
    norms = [np.linalg.norm(v) for v in x]
    units = [v / (n + epsilon) for v, n in zip(x, norms)]
    mean = sum(wi * u for wi, u in zip(w, units))
    length = np.linalg.norm(mean)
    if length < epsilon:
      if len(models) != 2:
        raise ValueError("the weighted directions cancel")
      out[name] = w[0] * x[0] + w[1] * x[1]
      continue
    mean = mean / length
    tangent = sum(wi * (u - np.sum(u * mean) * mean) for wi, u in zip(w, units))
    angle = np.linalg.norm(tangent) + epsilon
    point = mean * np.cos(angle) + tangent * (np.sin(angle) / angle)
    out[name] = point * sum(wi * n for wi, n in zip(w, norms))
  return out if base is None else common.added(base, out)


def karcher(
  base,
  models,
  *,
  weights=None,
  iterations=10,
  tolerance=1e-5,
  masks=None,
  flavour="paper",
):
  """The Riemannian mean of directions, times the mean of the norms.

  https://arxiv.org/abs/2603.04972, whose authors' code is mergekit's (there
  with equal weights only). u <- exp_u(sum_i a_i log_u(u_i)) from the normalised
  Euclidean mean, at most `iterations` times, until the step is shorter than
  `tolerance`. Vectors no longer than `tolerance` have no direction, but count
  in the mean norm. If the Euclidean mean vanishes, from the first direction.
  """
  del base, masks
  common.check(flavour)
  if len(models) == 1:
    return common.wide(models[0])
  alpha = common.numbers(weights, len(models))
  alpha = alpha / alpha.sum()
  vectors = [common.wide(m) for m in models]
  out = {}
  for name in vectors[0]:
    norms = [np.linalg.norm(v[name]) for v in vectors]
    known = [i for i, n in enumerate(norms) if n > tolerance]
    if not known:
      out[name] = np.zeros_like(vectors[0][name])
      continue
    units = [vectors[i][name] / norms[i] for i in known]
    a = alpha[known] / alpha[known].sum()
    mean = sum(ai * u for ai, u in zip(a, units))
    length = np.linalg.norm(mean)
    mean = units[0] if length < tolerance else mean / length
    for _ in range(iterations):
      step = np.zeros_like(mean)
      for ai, u in zip(a, units):
        cosine = np.clip(np.sum(mean * u), -1, 1)
        angle = np.arccos(cosine)
        if angle >= tolerance:
          step += ai * (angle / np.sin(angle)) * (u - cosine * mean)
      length = np.linalg.norm(step)
      if length < tolerance:
        break
      mean = np.cos(length) * mean + np.sin(length) / length * step
      mean = mean / np.linalg.norm(mean)
    out[name] = mean * sum(ai * n for ai, n in zip(alpha, norms))
  return out
