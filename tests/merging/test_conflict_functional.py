"""Divergence and Gauss-Newton products against explicit matrices."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj

RNG = np.random.default_rng(0)


def draw(*shape, scale=1.0):
  return (scale * RNG.standard_normal(shape)).astype(np.float32)


BASE = {"in": draw(3, 4), "out": {"kernel": draw(4, 3), "bias": draw(3)}}
TUNED = [
  jax.tree.map(lambda x: x + draw(*x.shape, scale=0.02), BASE) for _ in range(3)
]
PROBES = draw(5, 2, 3)  # two axes of probes


def model(params, x):
  hidden = jnp.tanh(jnp.matmul(x, params["in"]))
  logits = jnp.matmul(hidden, params["out"]["kernel"])
  return logits + params["out"]["bias"][None, None]


def dense_ggn(params):
  """G as a matrix, in float64 on the host."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  jacobian = jax.jacobian(lambda v: model(unravel(v), PROBES).reshape(-1, 3))
  jacobian = np.float64(jacobian(flat))
  p = np.float64(jax.nn.softmax(model(params, PROBES))).reshape(-1, 3)
  hessian = np.einsum("nc,cd->ncd", p, np.eye(3)) - p[:, :, None] * p[:, None]
  return np.einsum("nci,ncd,ndj->ij", jacobian, hessian, jacobian) / len(p)


def shifts():
  return [
    jax.flatten_util.ravel_pytree(jax.tree.map(np.subtract, x, BASE))[0]
    for x in TUNED
  ]


def test_ggn_products_equal_those_of_the_dense_matrix():
  report = pj.merging.conflicts(BASE, TUNED, probes=PROBES, apply_fn=model)
  matrix, flat = dense_ggn(BASE), np.float64(np.stack(shifts()))
  wanted = flat @ matrix @ flat.T
  np.testing.assert_allclose(
    np.array(report.total.ggn), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
  )
  assert np.array(report.total.ggn).min() < 0  # some cancel
  # A leaf's part: rows of G that are the leaf's, symmetrised.
  sizes = {"in": 12, "out/bias": 3, "out/kernel": 12}
  start = 0
  for leaf in report.leaves:
    part = slice(start, start + sizes[leaf.name])
    one = flat[:, part] @ (matrix @ flat.T)[part]
    np.testing.assert_allclose(
      np.array(leaf.ggn), (one + one.T) / 2, rtol=0, atol=1e-8
    )
    start = part.stop


def test_the_quadratic_form_is_twice_the_divergence():
  report = pj.merging.conflicts(BASE, TUNED, probes=PROBES, apply_fn=model)
  for i, tuned in enumerate(TUNED):
    back = pj.merging.conflicts(
      BASE, [BASE], probes=PROBES, apply_fn=model, merged=tuned
    )
    kl = back.divergence["contributor 0"]
    assert report.total.ggn[i][i] / 2 == pytest.approx(kl, rel=0.1)


def test_patches_partial_leaves_and_half_precision():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
  moved = {"in": half["in"], "out": half["out"] | {"bias": half["in"][0, :3]}}
  patch = pj.compress(pj.diff(half, moved))
  report = pj.merging.conflicts(
    half, [moved, patch], probes=PROBES.astype(jnp.bfloat16), apply_fn=model
  )
  ggn = np.array(report.total.ggn)
  assert ggn[0, 0] > 0
  np.testing.assert_allclose(ggn, ggn[0, 0], rtol=1e-6)
  assert report.divergence["contributor 0"] >= 0


def test_meshes_give_the_same_products(mesh_auto, mesh_explicit):
  wanted = pj.merging.conflicts(BASE, TUNED, probes=PROBES, apply_fn=model)
  P = jax.sharding.PartitionSpec
  specs = {
    "in": P(None, "x"),
    "out": {"kernel": P("x", None), "bias": P()},
  }
  for mesh in (mesh_auto, mesh_explicit):
    whole = jax.sharding.NamedSharding(mesh, P())

    def put(tree, mesh=mesh):
      named = jax.tree.map(
        lambda spec, mesh=mesh: jax.sharding.NamedSharding(mesh, spec), specs
      )
      return jax.device_put(tree, named)

    def on_mesh(params, x, whole=whole, explicit=mesh is mesh_explicit):
      # A contraction over a sharded axis: Explicit meshes must be told.
      out = {"out_sharding": whole} if explicit else {}
      hidden = jnp.tanh(jnp.matmul(x, params["in"]))
      logits = jnp.matmul(hidden, params["out"]["kernel"], **out)
      return logits + params["out"]["bias"][None]

    found = pj.merging.conflicts(
      put(BASE),
      [put(x) for x in TUNED],
      probes=jax.device_put(PROBES.reshape(-1, 3), whole),
      apply_fn=on_mesh,
    )
    np.testing.assert_allclose(
      np.array(found.total.ggn), np.array(wanted.total.ggn), rtol=1e-3
    )


def test_predictions_are_left_out_where_merge_would_raise():
  odd = TUNED[0] | {"in": np.zeros((2, 4), np.float32)}
  report = pj.merging.conflicts(
    BASE, [odd, TUNED[1]], probes=PROBES, apply_fn=model
  )
  assert report.divergence is None and report.total.ggn is None
  assert report.findings[0].kind == "reshaped"


def test_the_table_names_the_contributors():
  report = pj.merging.conflicts(
    BASE, TUNED[:2], probes=PROBES, apply_fn=model, labels=["duck", "fid"]
  )
  assert list(report.divergence) == ["duck", "fid"]
  assert "duck, fid" in str(report) and "GGN, nats" in str(report)
