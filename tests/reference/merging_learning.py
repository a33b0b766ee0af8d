"""AdaMerging in numpy, float64, from the paper and its released code.

Yang et al. 2024, https://arxiv.org/abs/2310.02575: coefficients of task
vectors, one a task or one a task and tensor, clipped to [0, 1], by gradient
descent on the entropy of predictions. Derivatives are written out for models
that are linear: `logits = x @ w + b`.
"""

import numpy as np


def entropies(logits):
  """Entropy of the softmax of each row, and its derivative in the logits."""
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  p = np.exp(log_p)
  entropy = -(p * log_p).sum(-1)
  return entropy, -p * (log_p + entropy[:, None])


def adamerging_step(base, vectors, tasks, coefficients):
  """Returns the loss, and its derivative in the coefficients.

  Args:
    base: `{"w", "b"}`.
    vectors: task vectors, one dict a contributor.
    tasks: inputs, one array a task.
    coefficients: `{leaf: [k]}`.
  """
  merged = {
    n: base[n]
    + sum(np.clip(c, 0, 1) * v[n] for c, v in zip(coefficients[n], vectors))
    for n in base
  }
  loss, grads = 0.0, {n: np.zeros_like(base[n]) for n in base}
  for x in tasks:
    entropy, slope = entropies(x @ merged["w"] + merged["b"])
    loss += entropy.mean()
    grads["w"] += x.T @ slope / len(x)
    grads["b"] += slope.mean(0)
  return loss, {
    n: np.array(
      [
        np.sum(grads[n] * v[n]) * (0 <= c <= 1)
        for c, v in zip(coefficients[n], vectors)
      ]
    )
    for n in base
  }


def adam(coefficients, slopes, rate=1e-3, steps=1):
  """Returns coefficients after Adam (betas .9 and .999, epsilon 1e-8).

  Args:
    coefficients: `{leaf: [k]}`.
    slopes: called with coefficients, returns derivatives.
    rate: the learning rate.
    steps: how many.
  """
  first = {n: np.zeros_like(c) for n, c in coefficients.items()}
  second = {n: np.zeros_like(c) for n, c in coefficients.items()}
  for t in range(1, steps + 1):
    grads, new = slopes(coefficients), {}
    for n, g in grads.items():
      first[n] = 0.9 * first[n] + 0.1 * g
      second[n] = 0.999 * second[n] + 0.001 * g * g
      m, v = first[n] / (1 - 0.9**t), second[n] / (1 - 0.999**t)
      new[n] = coefficients[n] - rate * m / (np.sqrt(v) + 1e-8)
    coefficients = new
  return coefficients


def selected_entries(vectors, density):
  """What AdaMerging++ keeps: TIES's trim over the model, and its election."""
  names = list(vectors[0])
  flat = np.stack(
    [np.concatenate([v[n].ravel() for n in names]) for v in vectors]
  )
  size = flat.shape[1]
  place = size - int(size * density) - 1  # k-th smallest, from 1
  cuts = np.sort(np.abs(flat), axis=1)[:, place]
  flat = np.where(np.abs(flat) >= cuts[:, None], flat, 0)
  sign = np.sign(flat.sum(0))
  sign[sign == 0] = np.sign(sign.sum())
  flat = np.where(np.where(sign > 0, flat > 0, flat < 0), flat, 0)
  out = []
  for row in flat:
    parts = np.split(row, np.cumsum([vectors[0][n].size for n in names])[:-1])
    out.append(
      {n: p.reshape(vectors[0][n].shape) for n, p in zip(names, parts)}
    )
  return out
