"""Gram matrices and Kronecker factors against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.statistics import LinearLayer, gram, kfac, linear_layers
from patchjax.trees.errors import NonFiniteError, StructureError

KEY = jax.random.key(0)
MESHES = ["mesh_auto", "mesh_explicit"]


def linear(params, x):
  return x @ params["w"] + params["b"]


def case(n=24, classes=4):
  rng = np.random.default_rng(0)
  params = {
    "w": 0.5 * rng.standard_normal((8, classes)).astype(np.float32),
    "b": rng.standard_normal(classes).astype(np.float32),
    "step": np.int32(3),
  }
  return params, rng.standard_normal((n, 8)).astype(np.float32)


def probabilities(params, x):
  logits = np.float64(x) @ params["w"] + params["b"]
  p = np.exp(logits - logits.max(1, keepdims=True))
  return p / p.sum(1, keepdims=True)


def normal(*shape):
  return np.random.default_rng(5).standard_normal(shape).astype("f4")


def close(found, wanted, tolerance=1e-5):
  np.testing.assert_allclose(
    found, wanted, rtol=0, atol=tolerance * np.max(np.abs(wanted))
  )


def test_gram_of_a_linear_model():
  params, x = case()
  found = gram(linear, params, x, chunk=10)
  assert found.n == 24 and found.rows == {"w": 24}
  assert found.layers == (("w", LinearLayer((0,), (1,))),)
  close(found.values["w"][0], np.float64(x).T @ x / 24)
  close(found.sums["w"][0], np.float64(x).T @ x)


def test_factors_of_a_linear_softmax_model():
  params, x = case()
  found = kfac(linear, params, x, labels="exact", chunk=10)
  p = probabilities(params, x)
  # The covariance of the score: diag(p) - p p^T.
  wanted = np.diag(p.mean(0)) - p.T @ p / len(p)
  close(found.outputs["w"][0], wanted)
  close(found.inputs["w"][0], np.float64(x).T @ x / 24)
  assert found.labels == "exact" and found.n == 24


def test_sampled_labels_are_unbiased_and_empirical_are_the_datas():
  params, x = case(4)
  many = np.repeat(x, 1000, axis=0)
  found = kfac(linear, params, many, key=KEY, chunk=2000)
  p = probabilities(params, x)
  wanted = np.diag(p.mean(0)) - p.T @ p / len(p)
  np.testing.assert_allclose(found.outputs["w"][0], wanted, atol=0.02)
  labels = np.int32([0, 1, 2, 1])
  found = kfac(linear, params, (x, labels), labels="empirical")
  score = np.eye(4)[labels] - p
  close(found.outputs["w"][0], score.T @ score / 4)


def texts(params, x):
  """Two layers over positions, pooled, and one more."""
  hidden = jnp.tanh(x["words"] @ params["one"])
  hidden = jnp.sum(hidden * x["mask"][:, None], 0) / jnp.sum(x["mask"])
  return hidden @ params["two"]


def some_texts(n=6):
  rng = np.random.default_rng(1)
  params = {
    "one": rng.standard_normal((3, 4)).astype("f4"),
    "two": rng.standard_normal((4, 2)).astype("f4"),
  }
  mask = np.float32(rng.random((n, 5)) < 0.6)
  mask[:, 0] = 1
  words = rng.standard_normal((n, 5, 3)).astype("f4")
  return params, {"words": words, "mask": mask}


def test_positions_are_rows_and_padding_is_none():
  params, data = some_texts()
  plain = gram(texts, params, data)
  assert plain.rows == {"one": 30, "two": 6}
  found = gram(texts, params, data, mask=lambda x: x["mask"])
  real = data["words"][data["mask"] > 0]
  assert found.rows == {"one": len(real), "two": 6}
  close(found.sums["one"][0], real.T @ real)
  close(found.values["two"], plain.values["two"])
  both = kfac(texts, params, data, labels="exact", mask=lambda x: x["mask"])
  close(both.inputs["one"][0], real.T @ real / len(real))
  whole = kfac(texts, params, data, labels="exact")
  # Gradients at padding are 0: the same sum over fewer rows.
  close(both.outputs["one"] * len(real), whole.outputs["one"] * 30)


def again(params, x):
  """A layer over positions that is used in two places, and in a loop."""
  hidden = jnp.tanh(x["words"] @ params["w"]) @ params["w"]
  return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ params["w"]), hidden)


def test_padding_is_no_row_wherever_a_layer_is_used():
  _, data = some_texts()
  params = {"w": normal(3, 3)}
  found = gram(again, params, data, mask=lambda x: x["mask"])
  rows = data["words"][data["mask"] > 0]
  seen = [rows, np.tanh(rows @ params["w"])]
  seen.append(seen[-1] @ params["w"])
  seen.append(np.tanh(seen[-1] @ params["w"]))
  assert found.rows == {"w": 4 * len(rows)}
  close(found.sums["w"][0], sum(x.T @ x for x in seen))

  def recurrent(params, x):
    def step(h, word):
      return jnp.tanh(h + word @ params["w"]), None

    return jax.lax.scan(step, jnp.zeros(3), x["words"])[0]

  found = gram(recurrent, params, data, mask=lambda x: x["mask"])
  assert found.rows == {"w": len(rows)}
  close(found.sums["w"][0], rows.T @ rows)
  with pytest.raises(StructureError, match="4 weights .* and w sees 5 rows"):
    gram(recurrent, params, data, mask=lambda x: x["mask"][1:])


def streams(x):
  yield x[:5]
  yield x[5:5]
  yield x[5:]


@pytest.mark.parametrize("measure", ["gram", "kfac"])
def test_batches_and_chunks_do_not_matter(measure):
  params, x = case(13)

  def take(data, chunk):
    if measure == "gram":
      return gram(linear, params, data, chunk=chunk)
    return kfac(linear, params, data, key=KEY, chunk=chunk)

  whole = take(x, 13)
  for other in (take(x, 4), take(streams(x), 64), take(streams(x), 3)):
    assert (other.n, other.rows) == (13, {"w": 13})
    jax.tree.map(close, other, whole)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_is_single(mesh, request):
  mesh = request.getfixturevalue(mesh)
  params, x = case(8)

  def take(params, data, **labels):
    return gram(linear, params, data), kfac(linear, params, data, **labels)

  def put(x, *spec):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

  split = {
    "w": put(params["w"], None, "y"),
    "b": put(params["b"], "y"),
    "step": params["step"],
  }
  for data, how in (
    (x, {"labels": "exact"}),
    (put(x, "x", None), {"key": KEY}),
  ):
    jax.tree.map(close, take(split, data, **how), take(params, x, **how))


def test_layers_that_are_scanned():
  rng = np.random.default_rng(2)
  params = {"w": rng.standard_normal((3, 4, 4)).astype("f4") / 2}
  x = rng.standard_normal((5, 4)).astype("f4")

  def scanned(params, x):
    def step(x, w):
      return jnp.tanh(w @ x), None

    return jax.lax.scan(step, x, params["w"])[0]

  found = gram(scanned, params, x).values["w"]
  assert linear_layers(scanned, params, x[0])["w"].batch_axes == (0,)
  for i in range(3):
    close(found[i], x.T @ x / 5)
    x = np.tanh(x @ params["w"][i].T)


def test_an_explicit_map():
  params, x = case()

  def summed(params, x):
    return jnp.sum(x[:, None] * params["w"], axis=0)

  assert linear_layers(summed, params, x[0]) == {}
  found = gram(summed, params, x, inputs=lambda params, x: {"w": x}, chunk=7)
  wanted = gram(linear, params, x)
  assert (found.layers, found.rows) == (wanted.layers, wanted.rows)
  close(found.values["w"], wanted.values["w"])
  told = {"w": LinearLayer((1,), (0,))}
  with pytest.raises(StructureError, match="a last axis of 4"):
    gram(summed, params, x, layers=told, inputs=lambda params, x: {"w": x})
  with pytest.raises(StructureError, match="no leaf: v"):
    gram(summed, params, x, inputs=lambda params, x: {"v": x})


def test_bad_input():
  params, x = case(4)
  with pytest.raises(StructureError, match="at least one example"):
    gram(linear, params, x[:0])
  with pytest.raises(ValueError, match="chunk must be at least 1, got -1"):
    gram(linear, params, x, chunk=-1)
  with pytest.raises(ValueError, match="need key="):
    kfac(linear, params, x)
  with pytest.raises(ValueError, match="one first axis"):
    gram(lambda params, x: x[0] @ params["w"], params, (x, x[:2]))
  broken = x.copy()
  broken[1, 2] = np.inf
  with pytest.raises(NonFiniteError, match="back to w"):
    gram(linear, params, broken)
  params, data = some_texts()
  with pytest.raises(ValueError, match="one prediction an example"):
    kfac(
      lambda params, x: x["words"] @ params["one"],
      params,
      data,
      labels="exact",
    )
