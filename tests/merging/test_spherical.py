"""Means on spheres and Model Stock, beyond the battery of all methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import NonFiniteError, StructureError
from tests.merging.test_collectives import collectives, numbers
from tests.reference import merging_coefficients, merging_spherical

SPHERICAL = {
  "slerp": pj.merging.slerp(t=0.3),
  "nuslerp": pj.merging.nuslerp(
    weights=[1.0, 2.0], flatten=False, row_wise=True
  ),
  "multislerp": pj.merging.multislerp(weights=[1.0, 2.0]),
  "karcher": pj.merging.karcher(weights=[1.0, 2.0]),
}


def vectors(*rows):
  return [{"w": np.float32(row)} for row in rows]


def random(seed, *shape, spread=1.0):
  rng = np.random.default_rng(seed)
  return (spread * rng.standard_normal(shape)).astype(np.float32)


def tuned(count, *shape, spread):
  """A base and models near it, as fine-tuning leaves them."""
  base = random(0, *shape)
  near = [base + random(i + 1, *shape, spread=spread) for i in range(count)]
  return {"w": base}, [{"w": x} for x in near]


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("name", ["slerp", "multislerp", "karcher"])
def test_fine_tunes_of_any_distance(name, spread):
  """Leaves large enough for blocked sums, at angles of 1e-4 to 1."""
  _, others = tuned(2, 512, 160, spread=spread)
  found = pj.merge(None, others, SPHERICAL[name])
  options = {"t": 0.3} if name == "slerp" else {"weights": [1.0, 2.0]}
  wanted = getattr(merging_spherical, name)(None, others, **options)["w"]
  assert np.abs(found["w"] - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_karcher_is_where_the_pulls_balance():
  models = vectors([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0])
  weights = [1.0, 2.0, 3.0, 0.5]
  method = pj.merging.karcher(weights=weights, iterations=30)
  found = np.float64(pj.merge(None, models, method)["w"])
  mean = found / np.linalg.norm(found)
  pull = np.zeros(3)
  for weight, model in zip(weights, models):
    unit = np.float64(model["w"]) / np.linalg.norm(model["w"])
    angle = np.arccos(unit @ mean)
    pull += weight * angle / np.sin(angle) * (unit - (unit @ mean) * mean)
  assert np.linalg.norm(pull) < 1e-5 * sum(weights)  # the tolerance


@pytest.mark.parametrize(
  "models",
  [
    ([3, 0], [0, 0], [0, 2]),  # no direction, but a length
    ([0, 0], [0, 0], [0, 0]),
    ([1, 1], [1e-7, -1e-7], [2, 0]),
  ],
)
def test_karcher_of_short_vectors(models):
  models = vectors(*models)
  found = pj.merge(None, models, pj.merging.karcher())["w"]
  wanted = merging_spherical.karcher(None, models)["w"]
  np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_opposite_directions():
  a, b = vectors([3, 1], [-3, -1])
  karcher = pj.merge(None, [a, b], pj.merging.karcher())["w"]
  np.testing.assert_allclose(karcher, a["w"], rtol=1e-6)
  straight = pj.merge(None, [a, b], pj.merging.multislerp())["w"]
  assert straight.tolist() == [0, 0]
  slerp = pj.merge(None, [a, b], pj.merging.slerp(t=0.25))["w"]
  np.testing.assert_allclose(slerp, 0.5 * a["w"], rtol=1e-6)


def test_directions_of_three_that_cancel_are_reported():
  angles = 2 * np.pi / 3 * np.arange(3)
  models = vectors(*np.stack([np.cos(angles), np.sin(angles)], 1))
  with pytest.raises(NonFiniteError):
    pj.merge(None, models, pj.merging.multislerp())
  zeros = vectors([0, 0], [0, 0], [0, 0])
  zero = pj.merge(None, zeros, pj.merging.multislerp())
  assert zero["w"].tolist() == [0, 0]


def test_slerp_of_zero_is_a_line():
  zero, one = vectors([0, 0], [2, 4])
  found = pj.merge(None, [zero, one], pj.merging.slerp(t=0.25))
  wanted = merging_spherical.slerp(None, [zero, one], t=0.25)["w"]
  np.testing.assert_allclose(found["w"], wanted, rtol=1e-6)


def test_leaves_of_no_or_one_axis():
  base = {"a": np.float32(2), "b": random(1, 5)}
  models = [{"a": np.float32(i), "b": random(i, 5)} for i in (3, 4)]
  rows = pj.merging.nuslerp(flatten=False, row_wise=True)
  found = pj.merge(None, models, rows)
  whole = pj.merge(None, models, pj.merging.nuslerp())
  near = pj.merge(base, models, pj.merging.model_stock(filter_wise=True))
  wanted = merging_coefficients.model_stock(base, models, filter_wise=True)
  for name in base:
    np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
    np.testing.assert_allclose(near[name], wanted[name], rtol=1e-5)


def test_t_may_differ_by_leaf():
  a = {"x": random(1, 6), "y": random(2, 6)}
  b = {"x": random(3, 6), "y": random(4, 6)}
  t = pj.merging.per_leaf(a, {"x": 0.0}, default=1.0)
  found = pj.merge(None, [a, b], pj.merging.slerp(t=t))
  np.testing.assert_allclose(found["x"], a["x"], rtol=1e-6)
  np.testing.assert_allclose(found["y"], b["y"], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SPHERICAL))
def test_derivatives(name):
  """Those of finite differences; and finite where models agree, or vanish."""
  target, way = random(9, 4, 3), random(5, 4, 3)
  key = "t" if name == "slerp" else "weights"

  @jax.jit
  @jax.value_and_grad
  def loss(at):
    value, first, second = at
    numbers = ({**SPHERICAL[name].numbers[0], key: value},)
    method = pj.Transform(numbers, SPHERICAL[name].stages)
    merged = pj.merge(None, [{"w": first}, {"w": second}], method)
    return jnp.sum(merged["w"] * target)

  value = jnp.float32(SPHERICAL[name].numbers[0][key])
  at = (value, random(1, 4, 3), random(2, 4, 3))
  _, grads = loss(at)
  up = np.float32([1.0, 2.0][: value.size]).reshape(value.shape)
  none, still, step = np.zeros_like(up), np.zeros_like(way), np.float32(1e-2)
  for turn in ((up, still, still), (none, way, still), (none, still, way)):
    ends = [
      loss(tuple(x + s * t for x, t in zip(at, turn)))[0] for s in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    found = sum(np.sum(g * t) for g, t in zip(grads, turn))
    np.testing.assert_allclose(found, slope, rtol=2e-2, atol=2e-3)
  for second in (at[1], still):
    for g in loss((value, at[1], second))[1]:
      assert np.isfinite(g).all()


def test_model_stock_of_angles():
  base, others = tuned(3, 8, 6, spread=0.1)
  deltas = [x["w"].astype(np.float64) - base["w"] for x in others]
  unit = [d / np.linalg.norm(d) for d in deltas]
  pairs = [(0, 1), (0, 2), (1, 2)]
  angle = np.mean([np.arccos(np.sum(unit[i] * unit[j])) for i, j in pairs])
  t = 3 * np.cos(angle) / (1 + 2 * np.cos(angle))
  method = pj.merging.model_stock(average="angles")
  found = pj.merge(base, others, method)["w"]
  wanted = base["w"] + t * np.mean(deltas, axis=0)
  np.testing.assert_allclose(found, wanted, atol=2e-6)
  cosines = pj.merge(base, others, pj.merging.model_stock())["w"]
  assert np.abs(cosines - wanted).max() > 1e-5


def test_model_stock_of_one_direction_and_of_none():
  base = {"w": np.zeros(2, np.float32)}
  same = vectors([3, 4], [3, 4])
  found = pj.merge(base, same, pj.merging.model_stock())
  np.testing.assert_allclose(found["w"], [3, 4], rtol=1e-6)
  opposite = vectors([3, 4], [-3, -4])
  found = pj.merge(base, opposite, pj.merging.model_stock())
  assert found["w"].tolist() == [0, 0]


def test_contributors_are_counted():
  a, b, c = vectors([1, 0], [0, 1], [1, 1])
  with pytest.raises(ValueError, match="takes 2 contributors, got 3"):
    pj.merge(None, [a, b, c], pj.merging.slerp())
  with pytest.raises(ValueError, match="takes 1 contributors, got 2"):
    pj.merge(a, [b, c], pj.merging.slerp(from_base=True))
  with pytest.raises(ValueError, match="at least 2 contributors"):
    pj.merge(a, [b], pj.merging.model_stock())
  with pytest.raises(ValueError, match="flavour must be"):
    pj.merging.nuslerp(flavour="papers")
  with pytest.raises(StructureError):
    pj.merge(None, [a], pj.merging.slerp(from_base=True))


def test_a_mesh_sends_inner_products_only(mesh_explicit):
  sharding = jax.sharding.NamedSharding(mesh_explicit, jax.P("x", "y"))
  models = [
    {"w": jax.device_put(random(i, 32, 16), sharding)} for i in range(2)
  ]
  found = collectives(
    lambda models: pj.merge(None, models, SPHERICAL["slerp"]), models
  )
  assert {operation for _, operation in found} == {"all-reduce"}
  assert max(numbers(shape) for shape, _ in found) <= 3
