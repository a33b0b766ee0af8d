"""TIES and its steps against numpy versions of the published formulas."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import SelectionError
from tests.merging.models import floats, models
from tests.reference import ties_reference as reference


def check(merged, expected, tolerance=2e-6):
  for x, y in zip(floats(merged), expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_equals_paper(scope, density):
  base, others = models(3)
  method = pj.merging.ties(density=density, scale=0.7, scope=scope)
  merged = pj.merge(base, others, method)
  check(
    merged,
    reference.ties(
      floats(base), [floats(x) for x in others], density, scale=0.7, scope=scope
    ),
  )


def test_frequency_and_weights():
  base, others = models(3)
  weights = [1.0, 2.0, 0.5]
  method = pj.merging.ties(density=0.3, weights=weights, method="frequency")
  check(
    pj.merge(base, others, method),
    reference.ties(
      floats(base),
      [floats(x) for x in others],
      0.3,
      weights=weights,
      frequency=True,
    ),
  )


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_mergekit_flavour(scope):
  base, others = models(2)
  weights = [1.0, 3.0]
  method = pj.merging.ties(
    density=0.3, weights=weights, flavour="mergekit", scope=scope
  )
  check(
    pj.merge(base, others, method),
    reference.ties(
      floats(base),
      [floats(x) for x in others],
      0.3,
      weights=weights,
      scope=scope,
      flavour="mergekit",
    ),
  )


@hypothesis.given(
  data=st.lists(
    st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    min_size=2,
    max_size=3,
  ),
  density=st.sampled_from([0.1, 0.25, 0.5, 0.75]),
)
@hypothesis.settings(max_examples=25)
def test_ties_and_cancelling_entries(data, density):
  # Small integers: magnitudes tie, sums cancel, the majority decides.
  base = {"a": np.zeros(5, np.float32), "b": np.zeros((7,), np.float32)}
  others = [
    {"a": np.float32(row[:5]), "b": np.float32(row[5:])} for row in data
  ]
  merged = pj.merge(base, others, pj.merging.ties(density=density))
  expected = reference.ties(floats(base), [floats(x) for x in others], density)
  check(merged, expected)


def test_majority_of_none_takes_minus():
  # Signs balance over the model: the paper's code keeps negative entries.
  base = {"w": np.zeros(3, np.float32)}
  others = [{"w": np.float32([1, 2, 3])}, {"w": np.float32([-1, -3, -2])}]
  merged = pj.merge(base, others, pj.merging.ties(density=1.0))
  assert merged["w"].tolist() == [-1.0, -3.0, 3.0]
  positive = pj.merging.ties(density=1.0, flavour="mergekit")
  assert pj.merge(base, others, positive)["w"].tolist() == [1.0, -3.0, 3.0]


def test_density_per_contributor():
  base = {"w": np.zeros(4, np.float32)}
  others = [{"w": np.float32([4, 3, 2, 1])}, {"w": np.float32([1, 2, 3, 4])}]
  merged = pj.merge(base, others, pj.merging.ties(density=[0.25, 0.5]))
  assert merged["w"].tolist() == [4.0, 2.5, 3.0, 4.0]
  plain = pj.merging.ties(density=[0.25, 0.5], one_more=False)
  assert pj.merge(base, others, plain)["w"].tolist() == [4.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("density", [0.01, 0.5, 0.999, 1.0])
def test_one_more_is_never_more_than_all(density):
  from patchjax.patches import shares

  for size in (1, 4095, 4096, 10_000):
    k = min(int(density * size) + 1, size)
    for given in (density, jnp.float32(density)):
      high, low = shares.entries_of(given, size, more=1)
      assert (int(high) << shares.LIMB) + int(low) == k, (size, given)


def test_exact_k_breaks_ties_over_leaves():
  base = {"b": np.zeros(4, np.float32), "a": np.zeros(3, np.float32)}
  tuned = jax.tree.map(np.ones_like, base)
  method = pj.chain(pj.trim(density=5 / 7, exact_k=True), pj.merging.mean())
  merged = pj.merge(base, [tuned], method)
  assert merged["a"].tolist() == [1, 1, 1]
  assert merged["b"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_linear_and_task_arithmetic(weights):
  base, others = models(3)
  named = {} if weights is None else {"weights": weights}
  plain = [floats(x) for x in others]
  check(
    pj.merge(base, others, pj.merging.linear(**named)),
    reference.linear(floats(base), plain, weights),
  )
  check(
    pj.merge(base, others, pj.merging.task_arithmetic(scale=0.3, **named)),
    reference.task_arithmetic(floats(base), plain, 0.3, weights),
  )


def test_order_of_contributors_does_not_matter():
  base, others = models(3)
  method = pj.merging.ties(density=0.2)
  one = pj.merge(base, others, method)
  other = pj.merge(base, others[::-1], method)
  for x, y in zip(floats(one), floats(other), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_step_of_each_kind_alone(k):
  base, others = models(k)
  full = pj.chain(pj.trim(density=1.0), pj.merging.mean())
  check(
    pj.merge(base, others, full),
    reference.linear(floats(base), [floats(x) for x in others]),
  )


def test_bad_options():
  with pytest.raises(SelectionError, match=r"\(0, 1\]"):
    pj.merging.ties(density=0.0)
  with pytest.raises(SelectionError, match=r"\(0, 1\]"):
    pj.trim(density=1.5)
  with pytest.raises(ValueError, match="flavour"):
    pj.merging.ties(flavour="paperr")
  with pytest.raises(ValueError, match="scope"):
    pj.trim(density=0.5, scope="layer")
  with pytest.raises(SelectionError, match="one a contributor"):
    base, others = models(3)
    pj.merge(base, others, pj.merging.linear(weights=jnp.ones(2)))
