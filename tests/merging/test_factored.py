"""LoRA patches merged without their products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import Delta, Dense, LowRank
from tests.reference import merging_spectral as reference

m = pj.merging
P = jax.sharding.PartitionSpec
INS, OUTS, RANK = 24, 16, 2


def code(seed, shape=(INS, OUTS), batch=0, rank=RANK):
  rng = np.random.default_rng(seed)
  lead = shape[:batch]
  a = rng.standard_normal((*lead, shape[batch], rank)).astype(np.float32)
  b = rng.standard_normal((*lead, rank, *shape[batch + 1 :])).astype(np.float32)
  return LowRank(a, b, np.float32(0.5), batch)


def lora(*seeds, **more):
  """A patch a seed, of a leaf of low rank."""
  return [pj.Patch({"w": Delta(code(seed, **more), "add")}) for seed in seeds]


def product(patch):
  return np.asarray(patch.deltas["w"].code.dense())


def dense_merge(patches, method, **options):
  zero = {"w": np.zeros(product(patches[0]).shape, np.float32)}
  others = [{"w": product(p)} for p in patches]
  return pj.merge(zero, others, method, **options)["w"]


@pytest.mark.parametrize(
  "method",
  [
    m.task_arithmetic(scale=0.4),
    m.tsv_m(),
    m.wudi(),
    m.star(eta=60.0),
    m.svc(),
  ],
  ids=["task_arithmetic", "tsv_m", "wudi", "star", "svc"],
)
def test_core_space_is_the_dense_merge(method):
  patches = lora(0, 1, 2)
  found = m.core_space(patches, method=method)
  assert isinstance(found.deltas["w"].code, LowRank)
  assert found.deltas["w"].code.rank == 3 * RANK
  wanted = dense_merge(patches, method)
  np.testing.assert_allclose(product(found), wanted, atol=2e-5)


def test_core_space_of_a_selection_is_the_dense_merge_it_stands_for():
  patches = lora(0, 1)
  codes = [p.deltas["w"].code for p in patches]
  p = np.linalg.svd(np.concatenate([c.a for c in codes], 1), False)[0]
  q = np.linalg.svd(np.concatenate([c.b for c in codes], 0), False)[2]
  cores = [{"w": (p.T @ product(x) @ q.T).astype(np.float32)} for x in patches]
  method = m.magmax()
  zero = {"w": np.zeros_like(cores[0]["w"])}
  wanted = p @ np.asarray(pj.merge(zero, cores, method)["w"]) @ q
  found = m.core_space(patches, method=method)
  np.testing.assert_allclose(product(found), wanted, atol=1e-5)


@pytest.mark.parametrize("merge", [m.core_space, m.knots_of_patches])
def test_no_product_is_made(merge):
  patches = lora(0, 1)

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.size for v in equation.outvars)
      for inner in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")
      ):
        if hasattr(inner, "jaxpr"):
          yield from sizes(inner.jaxpr)

  def merged(patches):
    return merge(patches, method=m.task_arithmetic())

  jaxpr = jax.make_jaxpr(merged)(patches)
  assert 0 < max(sizes(jaxpr.jaxpr)) < INS * OUTS


def test_knots_of_patches_is_knots():
  patches = lora(0, 1)
  found = m.knots_of_patches(patches, method=m.ties(density=0.3))
  assert found.deltas["w"].code.rank == 2 * RANK
  zero = {"w": np.zeros((INS, OUTS), np.float32)}
  others = [{"w": product(p)} for p in patches]
  wanted = reference.knots(zero, others, density=0.3)["w"]
  np.testing.assert_allclose(product(found), wanted, atol=1e-5)


def test_one_patch_is_the_patch():
  (patch,) = lora(3)
  for merge in (m.core_space, m.knots_of_patches):
    found = merge([patch], method=m.task_arithmetic())
    np.testing.assert_allclose(product(found), product(patch), atol=5e-6)


def test_batches_and_grouped_outputs():
  shape = (3, 6, 2, 4)
  patches = lora(0, 1, shape=shape, batch=1)
  wanted = sum(map(product, patches))
  for merge in (m.core_space, m.knots_of_patches):
    found = merge(patches, method=m.task_arithmetic())
    assert found.deltas["w"].code.batch == 1
    np.testing.assert_allclose(product(found), wanted, atol=1e-5)
  method = m.tsv_m()
  found = m.core_space(patches, method=method)
  each = [
    dense_merge(
      [
        pj.Patch({"w": Delta(Dense(product(p)[i].reshape(6, 8)), "add")})
        for p in patches
      ],
      method,
    )
    for i in range(3)
  ]
  np.testing.assert_allclose(
    product(found).reshape(3, 6, 8), np.stack(each), atol=2e-5
  )


def test_leaves_that_are_dense_or_missing():
  first, second = lora(0, 1)
  bias = Delta(Dense(np.float32([1, 3])), "add")
  both = [
    pj.Patch(first.deltas | {"bias": bias}),
    pj.Patch({"bias": bias, "v": second.deltas["w"]}),
  ]
  found = m.core_space(both, method=m.linear())
  np.testing.assert_allclose(found.deltas["bias"].code.values, [1, 3])
  # Who lacks a leaf changes nothing there.
  np.testing.assert_allclose(product(found), product(first) / 2, atol=5e-6)
  assert found.deltas["v"].code.rank == RANK


def test_under_jit_and_gradients():
  patches = lora(0, 1)

  @jax.jit
  def merged(patches, scale):
    method = m.task_arithmetic(scale=scale)
    return m.core_space(patches, method=method)

  found = merged(patches, 0.5)
  wanted = 0.5 * sum(map(product, patches))
  np.testing.assert_allclose(product(found), wanted, atol=1e-5)

  def loss(scale):
    out = merged(patches, scale).deltas["w"].code.dense()
    return jnp.sum(out * out)

  total = sum(map(product, patches))
  grad = jax.grad(loss)(0.5)
  np.testing.assert_allclose(grad, np.sum(total**2), rtol=1e-4)


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize("merge", [m.core_space, m.knots_of_patches])
def test_on_meshes(merge, mesh, request):
  mesh = request.getfixturevalue(mesh)
  patches = lora(0, 1)

  def put(patch):
    c = patch.deltas["w"].code
    a, b = (
      jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
      for x, spec in ((c.a, P("x", None)), (c.b, P(None, "y")))
    )
    code = LowRank(a, b, c.scale, c.batch)
    return pj.Patch({"w": Delta(code, "add")})

  method = m.tsv_m()
  wanted = merge(patches, method=method)
  found = merge([put(p) for p in patches], method=method)
  assert "x" in str(found.deltas["w"].code.a.sharding.spec)
  np.testing.assert_allclose(
    np.asarray(found.deltas["w"].code.a) @ np.asarray(found.deltas["w"].code.b),
    product(wanted),
    atol=1e-5,
  )
