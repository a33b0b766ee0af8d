"""Merges of parameters, of task vectors, and of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import Step, Transform, register_step, transform
from patchjax.trees.errors import NonFiniteError, StructureError
from tests.merging.models import floats, models, put, same_bits

LINEAR = pj.merging.linear(weights=[1.0, 3.0])


def _bent(leaf, deltas, base, state, shared):
  del leaf, state, shared
  assert base is None
  return jnp.sqrt(jnp.abs(deltas[0] * deltas[1]))


GEOMETRIC = register_step(
  Step("test_geometric", _bent, reducing=True, space=lambda: "params")
)


def _toward(leaf, deltas, base, state, norms):
  del leaf
  return base + (deltas[0] - base) * (jnp.float32(state["t"]) * norms)


def _start(state, shapes, k):
  del state, shapes, k
  return np.float32(0)


def _distance(leaf, deltas, base, state, carry):
  del leaf, state, carry
  return jnp.sum(jnp.square(deltas[0] - base))


def _finish(total, carry):
  del carry
  return jnp.sqrt(total), jnp.asarray(True)


TOWARD = register_step(
  Step(
    "test_toward",
    _toward,
    start=_start,
    counts=transform.one_count(_distance, _finish, once=True),
    reducing=True,
    space=lambda: "params",
    needs_base=True,
  )
)


def toward(t):
  return Transform.of(TOWARD, {"t": t})


def expected(weights, others):
  weights = np.float32(weights) / np.float32(sum(weights))
  rows = zip(*map(floats, others), strict=True)
  return [sum(w * x for w, x in zip(weights, row)) for row in rows]


def test_linear_needs_no_base():
  base, others = models(2)
  merged = pj.merge(None, others, LINEAR)
  for x, y in zip(floats(merged), expected([1, 3], others), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
  assert same_bits(pj.merge(base, others, LINEAR), merged)
  assert same_bits(jax.jit(pj.merge)(None, others, LINEAR), merged)


def test_base_is_not_read():
  base, others = models(2)
  merged = pj.merge(None, others, LINEAR)
  # Its numbers are in no sum: not even NaN shows.
  broken = jax.tree.map(
    lambda x: x if x.dtype == np.int32 else np.full_like(x, np.nan), base
  )
  assert same_bits(pj.merge(broken, others, LINEAR), merged)


def test_spare_buffers_are_written_over():
  base, others = models(2)
  wanted = pj.merge(base, others, LINEAR)
  base = jax.tree.map(jnp.asarray, base)
  at = base["block"]["kernel"].unsafe_buffer_pointer()
  merged = pj.merge(base, others, LINEAR, donate=True)
  assert same_bits(merged, wanted)
  assert base["block"]["kernel"].is_deleted()
  assert merged["block"]["kernel"].unsafe_buffer_pointer() == at
  first = jax.tree.map(jnp.asarray, others[0])
  merged = pj.merge(None, [first, others[1]], LINEAR, donate=True)
  assert same_bits(merged, wanted)
  assert first["block"]["kernel"].is_deleted()
  # Merged with itself it cannot be given away.
  twice = jax.tree.map(jnp.asarray, others[1])
  merged = pj.merge(None, [twice, twice], LINEAR, donate=True)
  np.testing.assert_allclose(
    merged["block"]["kernel"], others[1]["block"]["kernel"], rtol=2e-7
  )


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_no_base_on_a_mesh(mesh, request):
  _, others = models(2)
  wanted = pj.merge(None, others, LINEAR)
  others = [put(x, request.getfixturevalue(mesh)) for x in others]
  merged = pj.merge(None, others, LINEAR)
  assert same_bits(merged, wanted)
  for x, y in zip(jax.tree.leaves(others[0]), jax.tree.leaves(merged)):
    assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_patches_count_as_the_parameters_they_make():
  base, others = models(2)
  patch = pj.diff(base, others[1], only=".*kernel")
  merged = pj.merge(base, [others[0], patch], LINEAR)
  whole = {**others[1], "heads": base["heads"]}
  for x, y in zip(
    floats(merged), expected([1, 3], [others[0], whole]), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_means_of_patches_need_no_base():
  base, others = models(2)
  patches = [pj.diff(base, x) for x in others]
  patch = pj.merging.combine(patches, LINEAR)
  applied = pj.apply(base, patch)
  for x, y in zip(floats(applied), expected([1, 3], others), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_parameters_alone():
  base, others = models(2)
  method = Transform.of(GEOMETRIC, {})
  merged = pj.merge(base, others, method)
  one, two = (x["block"]["kernel"] for x in others)
  np.testing.assert_allclose(
    merged["block"]["kernel"], np.sqrt(np.abs(one * two)), rtol=1e-6
  )
  # What all share may change too, though it is the base's own object.
  same = pj.merge(base, [base, base], method)
  np.testing.assert_allclose(
    same["heads"][0], np.abs(base["heads"][0]), rtol=1e-6
  )
  patches = [pj.diff(base, x) for x in others]
  with pytest.raises(StructureError, match="base is needed"):
    pj.merging.combine(patches, method)
  patch = pj.merging.combine(patches, method, base=base)
  for x, y in zip(floats(pj.apply(base, patch)), floats(merged), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["single", "mesh_auto", "mesh_explicit"])
def test_counts_may_see_the_base(place, request):
  base, others = models(1)
  distance = np.sqrt(
    sum(
      np.sum((x - y) ** 2)
      for x, y in zip(floats(others[0]), floats(base), strict=True)
    )
  )
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  for run in (pj.merge, jax.jit(pj.merge)):
    merged = run(base, others, toward(0.5))
    for x, y, b in zip(
      floats(merged), floats(others[0]), floats(base), strict=True
    ):
      np.testing.assert_allclose(
        x, b + 0.5 * distance * (y - b), rtol=1e-5, atol=1e-6
      )
  with pytest.raises(StructureError, match="reads it"):
    pj.merge(None, others, toward(0.5))


@pytest.mark.parametrize("place", ["single", "mesh_explicit"])
def test_derivatives_go_through_a_single_pass(place, request):
  start, tuned = np.float32([[1.0, 2.0]] * 4), np.float32([[2.0, 4.0]] * 4)
  place_ = jnp.asarray
  if place != "single":
    mesh = request.getfixturevalue(place)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))

    def place_(x):
      return jax.device_put(x, sharding)

  base = {"w": place_(start)}

  def total(x):
    return jnp.sum(pj.merge(base, [{"w": x}], toward(1.0))["w"])

  found = jax.jit(jax.grad(total))(place_(tuned))
  # sum of b + d |d|: the derivative is |d| + sum(d) d / |d|.
  delta = tuned - start
  norm = np.linalg.norm(delta)
  np.testing.assert_allclose(
    found, norm + delta.sum() * delta / norm, rtol=1e-5
  )


def test_spaces_do_not_mix():
  with pytest.raises(ValueError, match="trim on task vectors"):
    pj.chain(pj.trim(density=0.5), Transform.of(GEOMETRIC, {}))
  assert pj.chain(pj.trim(density=0.5), pj.merging.mean()).space == "deltas"
  with pytest.raises(StructureError, match="needs the base"):
    pj.merge(None, models(2)[1], pj.merging.ties())
  base, others = models(2)
  with pytest.raises(StructureError, match="a patch is a change"):
    pj.merge(None, [pj.diff(base, others[0])], LINEAR)


def test_non_finite_parameters_are_named():
  _, others = models(2)
  others[1]["block"]["kernel"][0, 0] = np.inf
  with pytest.raises(NonFiniteError, match="kernel: 1 entries of the contrib"):
    pj.merge(None, others, LINEAR)
