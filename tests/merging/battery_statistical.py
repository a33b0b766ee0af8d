"""Rows of the methods that are told statistics; see `battery.py`.

The statistics are made up, of the battery's leaves: lists of one a
contributor, which go to the method and to its reference alike.
"""

import numpy as np

from patchjax.statistics import Fisher, Gram, KFac, LinearLayer
from tests.merging.battery_case import OTHER, SHAPE, WEIGHTS, Case

LEAVES = ("layers/0/kernel", "layers/1/kernel")
LAYER = LinearLayer((0,), (1,))
ROWS = 400


def drawn(seed, leaf):
  """Random numbers of a contributor and a leaf."""
  return np.random.default_rng([seed, LEAVES.index(leaf)])


def fishers(count, leaves=LEAVES):
  """Diagonals over many orders of magnitude, some of them 0."""

  def one(i, leaf):
    rng = drawn(10 + i, leaf)
    values = 10.0 ** rng.uniform(-9, -2, SHAPE)
    return np.where(rng.random(SHAPE) < 0.1, 0, values).astype(np.float32)

  return [
    Fisher({leaf: one(i, leaf) for leaf in leaves}, 50 + i, "exact")
    for i in range(count)
  ]


def _squares(seed, leaf, size):
  rng = drawn(seed, leaf)
  rows = rng.standard_normal((ROWS, size)) * rng.uniform(0.8, 1.25, size)
  return (rows.T @ rows / ROWS).astype(np.float32)[None]


def grams(count, leaves=LEAVES):
  """Gram matrices of random rows."""
  return [
    Gram(
      {leaf: _squares(20 + i, leaf, SHAPE[0]) for leaf in leaves},
      dict.fromkeys(leaves, ROWS),
      ROWS,
      tuple((leaf, LAYER) for leaf in leaves),
    )
    for i in range(count)
  ]


def factors(count):
  """Kronecker factors of random rows and gradients."""
  return [
    KFac(
      {leaf: _squares(30 + i, leaf, SHAPE[0]) for leaf in LEAVES},
      {leaf: 1e-6 * _squares(40 + i, leaf, SHAPE[1]) for leaf in LEAVES},
      dict.fromkeys(LEAVES, ROWS),
      ROWS,
      "exact",
      tuple((leaf, LAYER) for leaf in LEAVES),
    )
    for i in range(count)
  ]


def gradients(count):
  """Mean absolute gradients."""

  def one(i, leaf):
    return np.abs(drawn(50 + i, leaf).standard_normal(SHAPE)).astype("f4")

  return [{leaf: one(i, leaf) for leaf in LEAVES} for i in range(count)]


CASES: dict[str, Case] = {
  "fisher": Case(
    {"fishers": fishers(3), "weights": WEIGHTS},
    swept={"weights": OTHER, "floor": 1e-4},
    alone={},
    agreed={},
  ),
  "fisher/first": Case(
    {"fishers": fishers(3), "favor": "first", "shrinkage": 20.0},
    swept={"shrinkage": 5.0},
    symmetric=False,
  ),
  "fisher/base": Case(
    {
      "fishers": fishers(3, LEAVES[1:]),
      "favor": "base",
      "floor": 1e-5,
      "normalize": False,
    },
  ),
  "regmean": Case(
    {"grams": grams(3), "weights": WEIGHTS},
    swept={"weights": OTHER, "off_diagonal": 0.1},
    exact=False,
    alone={},
    agreed={},
    close=2e-6,
  ),
  "regmean/some": Case(
    {"grams": grams(2, LEAVES[1:]), "off_diagonal": 1.0, "shrinkage": 30.0},
    base=False,
    contributors=2,
    exact=False,
    close=2e-6,
  ),
  "mats": Case(
    {"statistics": grams(3), "weights": WEIGHTS, "tolerance": 1e-7},
    swept={"weights": OTHER, "off_diagonal": 0.5},
    exact=False,
    alone={},
    agreed={},
    close=5e-6,
  ),
  "mats/factors": Case(
    {"statistics": factors(2), "tolerance": 1e-7, "iterations": 200},
    base=False,
    contributors=2,
    exact=False,
    close=1e-5,
  ),
  "mats/few": Case(
    {"statistics": grams(2), "iterations": 3},
    base=False,
    contributors=2,
    exact=False,
    close=1e-5,
  ),
  "trust_region": Case(
    {"gradients": gradients(3), "quantile": 0.9, "scale": 0.4},
    swept={"quantile": 0.7, "scale": 0.3},
    local=False,
  ),
  "trust_region/vectors": Case({"quantile": 0.5, "scale": 0.4}, local=False),
}
