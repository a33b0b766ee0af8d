"""A patch of one container fits the others; nnx and equinox are at home."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax import interop, trees
from patchjax.trees.errors import MismatchError
from tests import containers


@pytest.mark.parametrize("container", containers.SHARED)
@pytest.mark.parametrize("exact", [False, True])
def test_a_patch_of_the_pure_dict_fits_every_container(container, exact):
  patch = pj.diff(
    containers.pure_dict(), containers.pure_dict(1000.0), exact=exact
  )
  tree = containers.SHARED[container]()
  new = pj.apply(tree, patch)
  assert type(new) is type(tree)
  assert jax.tree.structure(new) == jax.tree.structure(tree)
  assert trees.tree_id(new) == trees.tree_id(containers.pure_dict(1000.0))


@pytest.mark.parametrize("container", containers.SHARED)
def test_a_patch_of_every_container_fits_the_pure_dict(container):
  make = containers.SHARED[container]
  patch = pj.diff(make(), make(1000.0))
  new = pj.apply(containers.pure_dict(), patch)
  assert trees.tree_id(new) == trees.tree_id(make(1000.0))


def nnx_model():
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(3, 4, rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      return self.drop(self.norm(self.dense(x)))

  return Net(nnx.Rngs(0))


def test_nnx_modules_are_updated_in_place_and_only_their_params():
  from flax import nnx

  model = nnx_model()
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
  base = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tuned = jax.tree.map(lambda x: x + 1.0, base)
  kernel, dense = model.dense.kernel, model.dense
  assert interop.nnx.update(model, pj.diff(base, tuned)) is None
  assert model.dense is dense and model.dense.kernel is kernel
  np.testing.assert_allclose(kernel[...], base["dense"]["kernel"] + 1.0)
  after = nnx.state(model, nnx.BatchStat)
  assert trees.tree_id(after) == trees.tree_id(before)


def test_nnx_filters_choose_what_a_patch_is_for():
  from flax import nnx

  model = nnx_model()
  stats = nnx.state(model, nnx.BatchStat)
  patch = pj.diff(stats, jax.tree.map(lambda x: x + 2.0, stats))
  interop.nnx.update(model, patch, wrt=nnx.BatchStat)
  np.testing.assert_array_equal(model.norm.mean[...], np.full(4, 2.0))
  with pytest.raises(MismatchError, match="norm/mean"):
    interop.nnx.update(model, patch)


def test_a_patch_of_an_nnx_model_trains_beside_the_frozen_model():
  from flax import nnx

  model = nnx_model()
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  # flax may share the variables of a state with the module: keep the values.
  base = nnx.to_pure_dict(params)
  patch = pj.tuning.lora(jax.random.key(0), base, rank=2, only=r"dense/kernel")
  values, rebuild = pj.trainable(patch)
  x = jax.random.normal(jax.random.key(1), (8, 3))

  @jax.jit
  def loss(values):
    net = nnx.merge(graph, pj.apply(params, rebuild(values)), rest)
    net.eval()
    return jnp.mean((net(x) - 1.0) ** 2)

  optimizer = optax.adam(0.1)
  state, start = optimizer.init(values), loss(values)
  for _ in range(5):
    grads = jax.grad(loss)(values)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
      update, state = optimizer.update(grads, state, values)
    values = optax.apply_updates(values, update)
  assert loss(values) < start
  interop.nnx.update(model, rebuild(values))
  changed = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), changed, base)
  assert {n for n, v in trees.named_leaves(same).items() if not v} == {
    "dense/kernel"
  }


def test_equinox_models_with_functions_inside_are_patched_under_jit():
  import equinox as eqx

  model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
  params = eqx.filter(model, eqx.is_array)
  patch = pj.diff(params, jax.tree.map(lambda x: x * 2.0, params))
  new = eqx.filter_jit(interop.equinox.update)(model, patch)
  assert new.activation is model.activation
  want = trees.tree_id(jax.tree.map(lambda x: x * 2.0, params))
  assert trees.tree_id(eqx.filter(new, eqx.is_array)) == want
  # The model itself will do as well.
  assert trees.tree_id(pj.apply(model, patch)) == want


def test_comparison_works_across_frameworks():
  found = interop.comparison.compare_params(
    containers.nnx_module(), containers.equinox_module()
  )
  assert not found and found.same == 4
  found = interop.comparison.compare_params(
    containers.nnx_module(), containers.pure_dict(1.0)
  )
  assert found.changed == tuple(sorted(containers.NAMES))
  assert found.count == 24
