"""FISH and random masks: size, place, and independence of order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.statistics import fisher_diagonal
from patchjax.trees.errors import MismatchError, SelectionError

KEY = jax.random.key(3)


def model(params, x):
  return jnp.tanh(x @ params["in"]) @ params["out"]


def case():
  rng = np.random.default_rng(0)
  base = {
    "in": rng.standard_normal((4, 6)).astype(np.float32),
    "out": rng.standard_normal((6, 3)).astype(np.float32),
  }
  return base, rng.standard_normal((20, 4)).astype(np.float32)


def places(patch):
  return {n: d.code.indices.tolist() for n, d in patch.deltas.items()}


def count(patch):
  return sum(map(len, places(patch).values()))


def test_fish_takes_the_largest_fisher_information():
  base, x = case()
  patch = pj.tuning.fish(model, base, x, density=0.25, labels="exact")
  fisher = fisher_diagonal(model, base, x, labels="exact").values
  flat = np.concatenate([np.ravel(fisher[n]) for n in ("in", "out")])
  top = np.sort(np.argsort(-flat, kind="stable")[: int(0.25 * 42)])
  found = places(patch)
  both = found.get("in", []) + [24 + i for i in found.get("out", [])]
  assert both == top.tolist()
  zero = pj.apply(base, patch)
  assert all(np.array_equal(zero[n], base[n]) for n in base)


def test_training_changes_the_mask_alone():
  base, x = case()
  patch = pj.tuning.fish(model, base, x, density=0.2, key=KEY)
  values, rebuild = pj.trainable(patch)
  y = np.arange(20) % 3

  @jax.jit
  def loss(values):
    logits = model(pj.apply(base, rebuild(values)), x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  adam = optax.adam(0.1)
  state = adam.init(values)
  before = loss(values)
  grad = jax.jit(jax.grad(loss))
  # optax itself counts in int32 and multiplies in float32.
  update = jax.jit(adam.update)
  for _ in range(5):
    grads = grad(values)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = update(grads, state)
    values = optax.apply_updates(values, updates)
  assert loss(values) < before
  tuned = pj.apply(base, rebuild(values))
  changed = sum(int((tuned[n] != base[n]).sum()) for n in base)
  assert changed <= count(patch) == int(0.2 * 42)


def test_random_masks_are_exact_and_reproducible():
  base, _ = case()
  for density in (0.1, 0.5, 1.0):
    patch = pj.tuning.random_mask(base, density=density, key=KEY)
    assert count(patch) == int(density * 42)
  one = pj.tuning.random_mask(base, density=0.3, key=KEY)
  assert places(one) == places(
    pj.tuning.random_mask(dict(reversed(base.items())), density=0.3, key=KEY)
  )
  other = jax.random.key(4)
  assert places(one) != places(
    pj.tuning.random_mask(base, density=0.3, key=other)
  )
  only = pj.tuning.random_mask(base, density=0.3, key=KEY, only="out")
  assert only.names == ("out",) and count(only) == 5


def test_random_masks_are_spread_evenly():
  base = {"a": np.zeros(20_000, np.float32), "b": np.zeros(20_000, np.float32)}
  found = places(pj.tuning.random_mask(base, density=0.1, key=KEY))
  assert abs(len(found["a"]) - 2000) < 150
  halves = np.histogram(found["a"], bins=4, range=(0, 20_000))[0]
  assert np.abs(halves - len(found["a"]) / 4).max() < 100


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_masks_on_meshes(mesh, request):
  mesh = request.getfixturevalue(mesh)
  base = {"w": np.zeros((8, 6), np.float32)}
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
  sharded = {"w": jax.device_put(base["w"], sharding)}
  one = pj.tuning.random_mask(base, density=0.3, key=KEY)
  two = pj.tuning.random_mask(sharded, density=0.3, key=KEY)
  assert places(one) == places(two)
  out = pj.apply(sharded, two)["w"]
  assert out.sharding.is_equivalent_to(sharding, 2)


def test_bad_input():
  base, x = case()
  for density in (0.0, 1.5, -1):
    with pytest.raises(SelectionError, match=r"\(0, 1\]"):
      pj.tuning.fish(model, base, x, density=density, key=KEY)
    with pytest.raises(SelectionError, match=r"\(0, 1\]"):
      pj.tuning.random_mask(base, density=density, key=KEY)
  with pytest.raises(SelectionError, match="selects none"):
    pj.tuning.random_mask(base, density=0.001, key=KEY)
  with pytest.raises(MismatchError, match="in: "):
    pj.tuning.mask_patch(base, {"in": np.zeros(3, np.float32)}, density=0.5)
