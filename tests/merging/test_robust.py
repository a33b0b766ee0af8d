"""Robust aggregation, beyond the battery of all methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from tests.reference import merging_robust

ROBUST = {
  "median": pj.merging.median(),
  "trimmed_mean": pj.merging.trimmed_mean(drop=3),
  "geometric_median": pj.merging.geometric_median(iterations=20),
  "krum": pj.merging.krum(attackers=3),
  "multi_krum": pj.merging.krum(attackers=3, chosen=4),
  "centered_clipping": pj.merging.centered_clipping(radius=3.0, iterations=5),
}


def crowd(attack=1e3):
  """Eight updates of one task near 1, and three far away."""
  rng = np.random.default_rng(0)
  good = 1 + 0.1 * rng.standard_normal((8, 40))
  bad = attack * rng.standard_normal((3, 40))
  rows = np.float32(np.concatenate([bad[:1], good, bad[1:]]))
  return {"w": np.zeros(40, np.float32)}, [{"w": row} for row in rows]


@pytest.mark.parametrize("name", sorted(ROBUST))
def test_attackers_do_not_pull_it_away(name):
  base, models = crowd()
  found = pj.merge(base, models, ROBUST[name])["w"]
  mean = pj.merge(base, models, pj.merging.linear())["w"]
  error = np.linalg.norm(found - 1)
  assert error < 2 < np.linalg.norm(mean - 1) / 100


def test_one_honest_skill_among_many_is_lost():
  """What the docstrings warn of: for one task only."""
  base = {"w": np.zeros(4, np.float32)}
  skill = {"w": np.float32([0, 0, 0, 5])}
  others = [{"w": np.float32([1, 1, 1, 0])}] * 4
  for name in ("median", "krum"):
    method = pj.merging.krum() if name == "krum" else ROBUST[name]
    found = pj.merge(base, [skill, *others], method)["w"]
    assert found.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
  "name",
  ["median", "trimmed_mean", "geometric_median", "krum", "centered_clipping"],
)
def test_docstrings_warn(name):
  assert "For updates of one task only" in getattr(pj.merging, name).__doc__


@pytest.mark.parametrize("count", range(1, 10))
def test_order_statistics_of_any_number(count):
  rng = np.random.default_rng(count)
  rows = rng.integers(-3, 4, (count, 50)).astype(np.float32)  # many ties
  leaves = tuple(map(jnp.asarray, rows))

  def result(method, **options):
    ((step, _),) = method.stages
    return step.update(None, leaves, None, {}, None, **options)

  median = result(pj.merging.median())
  assert median.tolist() == np.median(rows, axis=0).tolist()
  for drop in range((count + 1) // 2):
    trimmed = result(pj.merging.trimmed_mean(drop=drop), drop=drop)
    wanted = np.sort(rows, axis=0)[drop : count - drop].mean(axis=0)
    np.testing.assert_allclose(trimmed, wanted, rtol=1e-6, atol=1e-7)


def test_close_models_far_from_zero():
  """Distances are those of differences, not of large inner products."""
  rng = np.random.default_rng(1)
  base = np.float32(10 * rng.standard_normal(4000))
  near = 1e-4 * rng.standard_normal((5, 4000)) * np.arange(1, 6)[:, None]
  models = [{"w": np.float32(base + d)} for d in near]
  for name, options in (
    ("krum", {}),
    ("geometric_median", {"epsilon": 1e-7, "iterations": 10}),
  ):
    found = pj.merge(None, models, getattr(pj.merging, name)(**options))["w"]
    wanted = getattr(merging_robust, name)(None, models, **options)["w"]
    # To the last bit or two of the parameters.
    np.testing.assert_allclose(found, wanted, rtol=2.5e-7, atol=1e-6)
  middle = pj.merge(None, models, pj.merging.krum())["w"]
  assert any(np.array_equal(middle, model["w"]) for model in models)


@pytest.mark.parametrize("name", ["geometric_median", "krum"])
def test_each_leaf_may_be_on_its_own(name):
  rng = np.random.default_rng(2)
  models = [
    {key: np.float32(rng.standard_normal(6)) for key in "ab"} for _ in range(5)
  ]
  method = getattr(pj.merging, name)(scope="leaf")
  found = pj.merge(None, models, method)
  alone = getattr(merging_robust, name)
  for key in "ab":
    wanted = alone(None, [{key: model[key]} for model in models])[key]
    np.testing.assert_allclose(found[key], wanted, rtol=1e-5, atol=1e-6)
  whole = alone(None, models)
  assert any(np.abs(found[key] - whole[key]).max() > 1e-3 for key in "ab")


def test_equal_scores_take_the_first():
  models = [{"w": np.float32([x])} for x in (3, 1, 2, 1, 3, 2)]
  found = pj.merge(None, models, pj.merging.krum(attackers=0))["w"]
  wanted = merging_robust.krum(None, models, attackers=0)["w"]
  assert found.tolist() == wanted.tolist()


def test_derivatives():
  base, models = crowd(attack=2.0)

  @jax.jit
  @jax.grad
  def slopes(radius, x):
    method = pj.merging.centered_clipping(radius=radius, iterations=2)
    merged = pj.merge(base, [{"w": x}, *models[1:]], method)
    return jnp.sum(merged["w"])

  assert np.isfinite(slopes(jnp.float32(3.0), models[0]["w"]))

  @jax.jit
  @jax.value_and_grad
  def loss(weights):
    method = pj.merging.geometric_median(weights=weights)
    return jnp.sum(pj.merge(base, models, method)["w"])

  weights = jnp.linspace(1.0, 2.0, len(models))
  _, grads = loss(weights)
  turn = np.float32(np.arange(len(models)) % 3)
  ends = [loss(weights + s * turn)[0] for s in (np.float32(1e-2), -1e-2)]
  np.testing.assert_allclose(
    np.sum(grads * turn), (ends[0] - ends[1]) / 2e-2, rtol=2e-2
  )

  # Models that agree are at no distance from each other.
  @jax.jit
  @jax.grad
  def at(x):
    method = pj.merging.geometric_median()
    return jnp.sum(pj.merge(None, [{"w": x}] * 3, method)["w"])

  np.testing.assert_allclose(at(jnp.ones(4)), 1, rtol=1e-5)


def test_too_few_contributors():
  base, models = crowd()
  with pytest.raises(ValueError, match="at least 5 contributors, got 4"):
    pj.merge(base, models[:4], pj.merging.krum())
  with pytest.raises(ValueError, match="leaves nothing of 2"):
    pj.merge(base, models[:2], pj.merging.trimmed_mean())
  with pytest.raises(ValueError, match="attackers >= 0"):
    pj.merging.krum(attackers=-1)
  with pytest.raises(ValueError, match="must not be negative"):
    pj.merging.trimmed_mean(drop=-1)
  with pytest.raises(ValueError, match="scope must be 'tree' or 'leaf'"):
    pj.merging.geometric_median(scope="row")
