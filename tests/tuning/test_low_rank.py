"""LoRA patches: zero, trainable, shaped and sharded like their leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import DtypeError, SelectionError

KEY = jax.random.key(5)


def base():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  return {
    "dense": {"kernel": draw(16, 8), "bias": draw(8)},
    "query": draw(8, 4, 2),
    "out": draw(4, 2, 8),
    "layers": draw(3, 8, 6),
    "n": np.int32(1),
  }


RULES = {"in_axes": {"out": 2}, "batch_axes": {"layers": 1}}


def test_shapes_follow_axes():
  patch = pj.tuning.lora(KEY, base(), rank=2, **RULES)
  shapes = {
    n: (d.code.a.shape, d.code.b.shape, d.code.batch)
    for n, d in patch.deltas.items()
  }
  assert shapes == {
    "dense/kernel": ((16, 2), (2, 8), 0),
    "query": ((8, 2), (2, 4, 2), 0),
    "out": ((4, 2, 2), (2, 8), 0),
    "layers": ((3, 8, 2), (3, 2, 6), 1),
  }
  params = base()
  patched = pj.apply(params, patch)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(patched)):
    assert np.array_equal(x, y)


def test_scale_and_spread():
  kernel = {"w": np.zeros((400, 50), np.float32)}
  code = pj.tuning.lora(KEY, kernel, rank=8, alpha=16).deltas["w"].code
  assert float(code.scale) == 2.0
  assert np.std(code.a) == pytest.approx(400**-0.5, rel=0.05)
  assert not np.any(code.b)


def test_trains_batches_of_layers():
  params = base()
  patch = pj.tuning.lora(KEY, params, rank=2, only="layers", **RULES)
  values, rebuild = pj.trainable(patch)
  target = params["layers"] + np.float32(0.1)

  def loss(values):
    patched = pj.apply(params, rebuild(values))
    return jnp.mean(jnp.square(patched["layers"] - target))

  before = loss(values)
  step = jax.jit(
    lambda v: jax.tree.map(lambda x, g: x - g, v, jax.grad(loss)(v))
  )
  for _ in range(20):
    values = step(values)
  assert loss(values) < before


def test_factors_depend_on_names_alone():
  one = pj.tuning.lora(KEY, base(), rank=2, **RULES)
  two = pj.tuning.lora(KEY, {"query": base()["query"]}, rank=2)
  a, b = (p.deltas["query"].code.a for p in (one, two))
  assert np.array_equal(a, b)
  assert not np.array_equal(a, one.deltas["layers"].code.a[0])


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_sharding_policies(mesh, request):
  mesh = request.getfixturevalue(mesh)
  P = jax.sharding.PartitionSpec
  specs = {"w": P("x", "y"), "layers": P(None, "x", "y")}
  params = {"w": base()["dense"]["kernel"], "layers": base()["layers"]}
  params = {
    n: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[n]))
    for n, x in params.items()
  }
  patch = pj.tuning.lora(KEY, params, rank=2, **RULES)
  code = patch.deltas["w"].code
  assert code.a.sharding.spec == P("x", None)
  assert code.b.sharding.spec == P(None, "y")
  assert patch.deltas["layers"].code.a.sharding.spec == P(None, "x", None)
  patched = pj.apply(params, patch)
  assert patched["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
  whole = pj.tuning.lora(KEY, params, rank=2, sharding="replicate", **RULES)
  assert whole.deltas["w"].code.a.sharding.is_fully_replicated
  assert np.array_equal(whole.deltas["w"].code.a, code.a)


def test_bad_input():
  with pytest.raises(SelectionError, match="bias"):
    pj.tuning.lora(KEY, base(), rank=2, only="dense/.*")
  with pytest.raises(SelectionError, match="rank"):
    pj.tuning.lora(KEY, base(), rank=0)
  with pytest.raises(DtypeError, match="int32"):
    pj.tuning.lora(KEY, base(), rank=2, only="n")
  with pytest.raises(SelectionError, match="found none"):
    pj.tuning.lora(KEY, {"b": np.zeros(3, np.float32)}, rank=2)
  with pytest.raises(ValueError, match="sharding"):
    pj.tuning.lora(KEY, base(), rank=2, sharding="row")


def test_leaves_without_rows():
  base = {"w": np.ones((4, 3), np.float32), "z": np.ones((0, 3), np.float32)}
  patch = pj.tuning.lora(jax.random.key(0), base, rank=2)
  assert patch.deltas["z"].code.a.shape == (0, 2)
  assert pj.apply(base, patch)["z"].shape == (0, 3)
