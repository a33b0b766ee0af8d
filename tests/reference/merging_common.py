"""What the references of merge methods share: task vectors, numbers a model.

A model is a dict of name to array. A reference returns float64 leaves that are
not yet rounded to the base's dtype, so a test rounds once and compares.
"""

import numpy as np


def task_vectors(base, models):
  """x_i - base of each model, rounded to float32 once, as float64.

  float64 leaves keep their precision.
  """

  def delta(model, name):
    kind = np.float64 if base[name].dtype == np.float64 else np.float32
    difference = np.asarray(model[name], kind) - np.asarray(base[name], kind)
    return difference.astype(np.float64)

  return [{name: delta(model, name) for name in base} for model in models]


def added(base, delta, scale=1.0):
  """base + scale * delta, float64."""
  return {
    name: np.asarray(base[name], np.float64) + scale * delta[name]
    for name in base
  }


def wide(model):
  """The model's leaves as float64."""
  return {name: np.asarray(x, np.float64) for name, x in model.items()}


def numbers(value, count):
  """A setting as one number a model."""
  if value is None:
    value = 1.0
  return np.broadcast_to(np.asarray(value, np.float64), (count,))


def flat(model):
  """All leaves as one vector, in the order of the dict."""
  return np.concatenate([np.ravel(x) for x in model.values()])


def unflat(vector, like):
  """The vector cut into leaves of the shapes of `like`."""
  out, start = {}, 0
  for name, x in like.items():
    out[name] = vector[start : start + np.size(x)].reshape(np.shape(x))
    start += np.size(x)
  return out


def total(terms):
  """The sum in float32, from the first term on: elections see its sign."""
  out = np.zeros_like(terms[0], np.float32)
  for term in terms:
    out += np.asarray(term, np.float32)
  return out


def consensus(terms):
  """For each term the mask of entries with the sign of the sum.

  A sum of 0 counts as positive and an entry of 0 agrees with nobody, in
  mergekit, DELLA and SCE.
  """
  sign = np.where(total(terms) >= 0, 1, -1)
  return [np.sign(term) == sign for term in terms]


def check(flavour):
  if flavour not in ("paper", "mergekit"):
    raise ValueError(f"flavour must be 'paper' or 'mergekit', got {flavour!r}")
