"""Linear layers, found in functions of many shapes, and laid open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.statistics import LinearLayer, gram, linear_layers, tapping
from patchjax.trees.errors import SelectionError, StructureError


def normal(*shape):
  rng = np.random.default_rng(len(shape) + sum(shape))
  return rng.standard_normal(shape).astype(np.float32)


PARAMS = {
  "plain": normal(3, 4),
  "turned": normal(4, 4),
  "stacked": normal(2, 4, 4),
  "query": normal(4, 2, 2),
  "output": normal(4, 4),
  "grouped": normal(2, 2, 3),
  "bias": normal(4),
  "table": normal(5, 4),
  "norm": normal(4),
  "kernel16": normal(4, 3),
}
X = normal(5, 3)


@jax.checkpoint
def block(params, x):
  return jax.nn.relu(x @ params["plain"] + params["bias"][None])


def network(params, x):
  """Layers in jit, checkpoint, scan and einsum; a tied table."""
  x = block(params, x) * params["norm"][None]

  def step(x, kernel):
    return jax.nn.gelu(jnp.dot(x @ kernel, params["turned"].T)), None

  x, _ = jax.lax.scan(step, x, params["stacked"])
  heads = jnp.einsum("ti,iho->tho", x, params["query"])
  y = jnp.einsum("tho,hoi->ti", heads, params["output"].reshape(2, 2, 4))
  z = jnp.einsum("tho,hop->thp", heads, params["grouped"])
  half = jnp.float16
  small = jax.jit(jnp.matmul)(
    y.astype(half), params["kernel16"].astype(half) * 2
  )
  tied = params["table"][jnp.arange(2)] @ params["table"].T
  return y.sum() + z.sum() + small.astype(jnp.float32).sum() + tied.sum()


LAYERS = {
  "plain": LinearLayer((0,), (1,)),
  "stacked": LinearLayer((1,), (2,), (0,)),
  "turned": LinearLayer((1,), (0,)),
  "query": LinearLayer((0,), (1, 2)),
  "output": LinearLayer((0,), (1,)),
  "grouped": LinearLayer((1,), (2,), (0,)),
}


def cast(params, x):
  half = jnp.float16
  return x.astype(half) @ params["kernel16"].astype(half).T.T


def test_layers_are_found_where_they_are_used():
  found = linear_layers(network, PARAMS, X)
  assert found == LAYERS  # kernel16 is multiplied by a number: no layer
  assert list(found)[0] == "plain"
  four = normal(5, 4)
  assert list(linear_layers(cast, PARAMS, four)) == ["kernel16"]
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS
  )
  assert linear_layers(network, abstract, X) == found


def test_inputs_and_gradients_make_the_gradient_of_the_leaf():
  function, arrays = tapping.by_name(network, PARAMS)
  wires = tapping.Wiring.of(function, arrays, X)

  def joined(uses):
    return jnp.concatenate(uses, axis=1)

  @jax.jit
  def opened(arrays):
    out, seen = wires.run(arrays, X)
    taps = {key: jnp.zeros_like(y) for key, (_, y) in seen.items()}
    gradients = jax.grad(lambda t: wires.run(arrays, X, taps=t)[0])(taps)
    inputs = {k: x for k, (x, _) in seen.items()}
    return (
      out,
      {name: joined(wires.rows(name, inputs, out=False)) for name in LAYERS},
      {name: joined(wires.rows(name, gradients, out=True)) for name in LAYERS},
    )

  out, inputs, outputs = opened(arrays)
  wanted = jax.jit(jax.value_and_grad(network))(PARAMS, X)
  np.testing.assert_allclose(out, wanted[0], rtol=1e-5)
  for name, layer in LAYERS.items():
    batch, ins, outs = layer.sizes(PARAMS[name].shape)
    assert inputs[name].shape[::2] == (batch, ins)
    assert outputs[name].shape[::2] == (batch, outs)
    product = np.einsum("bri,bro->bio", inputs[name], outputs[name])
    found = layer.leaf(jnp.asarray(product), PARAMS[name].shape)
    np.testing.assert_allclose(found, wanted[1][name], rtol=1e-4, atol=1e-4)


def test_leaves_and_matrices():
  layer = LinearLayer((2, 3), (0,), (1,))
  x = jnp.asarray(normal(2, 3, 4, 5))
  matrices = layer.matrices(x)
  assert matrices.shape == (3, 20, 2)
  np.testing.assert_array_equal(matrices[1, 7, 1], x[1, 1, 1, 2])
  np.testing.assert_array_equal(layer.leaf(matrices, x.shape), x)
  with pytest.raises(StructureError, match="every axis"):
    layer.sizes((2, 3, 4))


def multiplied_twice(params, x):
  return x @ params["w"] @ params["w"].T


def scaled(params, x):
  return x @ (2.0 * params["w"])


def carried(params, x):
  def step(carry, _):
    w, x = carry
    return (w[::-1], x @ w), None

  return jax.lax.scan(step, (params["w"], x), None, length=2)[0][1]


def returned(params, x):
  return x @ params["w"], params["w"].T


def split_axis(params, x):
  return jnp.einsum("ab,abo->ao", x.reshape(2, 2), params["w"].reshape(2, 2, 4))


def with_itself(params, x):
  return x @ (params["w"] @ params["w"])


def looped(params, x):
  return jax.lax.fori_loop(0, 2, lambda _, x: x @ params["w"], x)


@pytest.mark.parametrize(
  "function", [multiplied_twice, scaled, carried, returned, with_itself]
)
def test_what_is_no_layer(function):
  params, x = {"w": normal(4, 4)}, normal(1, 4)
  assert linear_layers(function, params, x) == {}
  with pytest.raises(StructureError, match="no linear layer"):
    gram(function, params, x[None])


def test_an_axis_in_two_roles_is_no_layer_and_a_loop_is_a_scan():
  params = {"w": normal(4, 4)}
  assert linear_layers(split_axis, params, normal(1, 4)) == {}
  assert "w" in linear_layers(looped, params, normal(1, 4))


def test_layers_that_are_asked_for():
  x = normal(2, 5, 3)
  some = gram(network, PARAMS, x, layers="query|output")
  assert set(some.values) == {"query", "output"}
  told = {"plain": LAYERS["plain"]}
  assert set(gram(network, PARAMS, x, layers=told).values) == {"plain"}
  with pytest.raises(SelectionError, match="no linear layer"):
    gram(network, PARAMS, x, layers={"table": LinearLayer((0,), (1,))})
  with pytest.raises(SelectionError, match="nothing to select"):
    gram(network, PARAMS, x, layers="nothing")
