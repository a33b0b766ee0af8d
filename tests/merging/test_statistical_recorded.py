"""What FusionBench answered, told statistics, as recorded in tests/golden."""

import pathlib

import numpy as np
import pytest
import scipy.sparse.linalg

import patchjax as pj
from patchjax.statistics import Fisher, Gram, LinearLayer
from tests.reference import merging_statistical as reference

PATH = pathlib.Path(__file__).parents[1] / "golden" / "statistical.npz"
TASKS = 3
LAYER = LinearLayer((1,), (0,))


def tree(prefix):
  with np.load(PATH) as file:
    return {
      name.removeprefix(f"{prefix}/"): file[name]
      for name in file
      if name.startswith(f"{prefix}/")
    }


def trees(kind):
  return [tree(f"{kind}/{i}") for i in range(TASKS)]


def fisher():
  fishers = [Fisher(values, 1, "exact") for values in trees("diagonal")]
  return pj.merging.fisher(fishers=fishers, weights=[0.5, 0.3, 0.2], floor=0.0)


def regmean():
  grams = [
    Gram(
      {name: x[None] for name, x in values.items()},
      dict.fromkeys(values, 50),
      50,
      tuple((name, LAYER) for name in values),
    )
    for values in trees("gram")
  ]
  return pj.merging.regmean(grams=grams)


def trust_region():
  return pj.merging.trust_region(
    gradients=trees("gradient"), quantile=0.7, scale=0.4
  )


@pytest.mark.parametrize("make", [fisher, regmean, trust_region])
def test_equals_fusion_bench(make):
  answers = tree(make.__name__)
  found = pj.merge(tree("base/0"), trees("model"), make())
  assert found.keys() == answers.keys()
  for name, answer in answers.items():
    np.testing.assert_allclose(found[name], answer, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("iterations", [3, 50])
def test_the_reference_of_mats_is_scipys_solver(iterations):
  rng = np.random.default_rng(0)
  a, s = (x.T @ x for x in rng.standard_normal((2, 9, 4)))
  right, start = rng.standard_normal((2, 4, 4))
  wanted, _ = scipy.sparse.linalg.cg(
    np.kron(a, s),
    right.reshape(-1),
    start.reshape(-1),
    rtol=1e-6,
    maxiter=iterations,
  )
  bound = 1e-6 * np.linalg.norm(right)
  found = reference._gradients(
    lambda x: a @ x @ s, right, start, iterations, bound
  )
  np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-6)
