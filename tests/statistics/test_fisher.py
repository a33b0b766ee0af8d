"""The Fisher diagonal against the closed form of a linear softmax model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.statistics import fisher_diagonal
from patchjax.trees.errors import DtypeError, NonFiniteError, StructureError

KEY = jax.random.key(0)


def model(params, x):
  return x @ params["w"] + params["b"]


def case(n=64, classes=3):
  rng = np.random.default_rng(0)
  params = {
    "w": 0.5 * rng.standard_normal((4, classes)).astype(np.float32),
    "b": rng.standard_normal(classes).astype(np.float32),
    "step": np.int32(3),
  }
  return params, rng.standard_normal((n, 4)).astype(np.float32)


def closed_form(params, x):
  """`mean_x x_i^2 p_c (1 - p_c)`: the variance of the score of a class."""
  logits = x @ params["w"] + params["b"]
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  variance = p * (1 - p)
  return {"w": (x**2).T @ variance / len(x), "b": variance.mean(0)}


def test_exact_sum_over_classes():
  params, x = case()
  found = fisher_diagonal(model, params, x, labels="exact", chunk=10)
  assert found.n == 64 and set(found.values) == {"w", "b"}
  for name, value in closed_form(params, x).items():
    np.testing.assert_allclose(found.values[name], value, rtol=1e-4, atol=1e-7)


def test_sampled_labels_are_unbiased():
  params, x = case(8)
  # Each example many times: a thousand labels an example.
  many = np.repeat(x, 1000, axis=0)
  found = fisher_diagonal(model, params, many, key=KEY, chunk=500)
  # Standard error of a mean of 1000 squared scores, four of them.
  for name, value in closed_form(params, x).items():
    np.testing.assert_allclose(found.values[name], value, rtol=0.15, atol=0.01)


def test_never_squares_a_batch_mean():
  params, x = case(32)
  x = np.repeat(x[:1], 32, axis=0)
  # Of 32 equal examples the mean gradient has a 32nd of the variance.
  found = fisher_diagonal(model, params, x, labels="exact", chunk=32)
  one = fisher_diagonal(model, params, x[:1], labels="exact")
  np.testing.assert_allclose(found.values["w"], one.values["w"], rtol=1e-5)


def test_chunks_and_batches_do_not_matter():
  params, x = case(30)
  whole = fisher_diagonal(model, params, x, key=KEY, chunk=30)
  chunked = fisher_diagonal(model, params, x, key=KEY, chunk=7)
  stream = iter([x[:11], x[11:11], x[11:]])
  streamed = fisher_diagonal(model, params, stream, key=KEY, chunk=4)
  for other in (chunked, streamed):
    assert other.n == 30
    for name, value in whole.values.items():
      np.testing.assert_allclose(other.values[name], value, rtol=1e-5)


def test_empirical_labels():
  params, x = case(16)
  labels = np.arange(16, dtype=np.int32) % 3
  found = fisher_diagonal(model, params, (x, labels), labels="empirical")
  logits = x @ params["w"] + params["b"]
  p = np.asarray(jax.nn.softmax(logits))
  score = np.eye(3)[labels] - p
  np.testing.assert_allclose(found.values["b"], (score**2).mean(0), rtol=1e-5)
  assert found.labels == "empirical"


def test_positions_are_independent_predictions():
  params, x = case(8)
  pairs = x.reshape(4, 2, 4)

  def score(params, x):
    return x @ params["w"] + params["b"][None]

  found = fisher_diagonal(
    score, params, np.tile(pairs, (500, 1, 1)), key=KEY, chunk=250
  )
  # Scores of positions are independent: variances of an example add up.
  expected = closed_form(params, x)["b"] * 2
  np.testing.assert_allclose(found.values["b"], expected, rtol=0.1)
  with pytest.raises(ValueError, match="one prediction an example"):
    fisher_diagonal(score, params, pairs, labels="exact")


def test_only_and_dtypes():
  params, x = case(8)
  params = {
    k: jnp.asarray(v, jnp.bfloat16) if k == "w" else v
    for k, v in params.items()
  }

  def mixed(params, x):
    return x @ params["w"].astype(jnp.float32) + params["b"]

  found = fisher_diagonal(mixed, params, x, only="w", labels="exact")
  assert set(found.values) == {"w"}
  assert found.values["w"].dtype == jnp.float32
  with pytest.raises(DtypeError, match=r"step \(int32\)"):
    fisher_diagonal(model, params, x, only=".*", key=KEY)


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_sharded_parameters(mesh, request):
  mesh = request.getfixturevalue(mesh)
  params, x = case(8, classes=4)
  expected = closed_form(params, x)
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))
  params["w"] = jax.device_put(params["w"], sharding)

  def sharded(params, x):
    # Products of sharded axes need no rule on an Explicit mesh as sums do.
    return jnp.sum(x[:, None] * params["w"], axis=0) + params["b"]

  found = fisher_diagonal(sharded, params, x, labels="exact")
  np.testing.assert_allclose(found.values["w"], expected["w"], rtol=1e-4)
  assert found.values["w"].sharding.is_equivalent_to(sharding, 2)


def test_bad_input():
  params, x = case(4)
  with pytest.raises(ValueError, match="need key="):
    fisher_diagonal(model, params, x)
  with pytest.raises(ValueError, match="labels must be"):
    fisher_diagonal(model, params, x, labels="true")
  with pytest.raises(StructureError, match="at least one example"):
    fisher_diagonal(model, params, x[:0], key=KEY)
  with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
    fisher_diagonal(model, params, x, key=KEY, chunk=0)
  with pytest.raises(ValueError, match="pair"):
    fisher_diagonal(model, params, x, labels="empirical")
  with pytest.raises(ValueError, match="one first axis"):
    fisher_diagonal(
      model, params, (x, np.zeros(3, np.int32)), labels="empirical"
    )
  with pytest.raises(StructureError, match="no floating point"):
    fisher_diagonal(model, {"n": np.int32(1)}, x, key=KEY)
  broken = params | {"b": np.float32([np.inf, 0, 0])}
  with pytest.raises(NonFiniteError, match="w|b"):
    fisher_diagonal(model, broken, x, key=KEY)
