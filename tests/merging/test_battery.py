"""Merges of several leaves: the same bits however run, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.interop.files import read, write
from tests.merging.models import floats, model, models, put, same_bits

METHODS = {
  "linear": pj.merging.linear(weights=[1.0, 2.0]),
  "task_arithmetic": pj.merging.task_arithmetic(scale=0.4),
  "ties": pj.merging.ties(density=0.2),
  "ties_mergekit": pj.merging.ties(density=0.25, flavour="mergekit"),
  "ties_exact": pj.merging.ties(density=0.2, exact_k=True, weights=[1.0, 2.0]),
  "mean": pj.merging.mean(),
}
merge_jit = jax.jit(pj.merge)


@pytest.fixture(scope="module")
def expected():
  """What each method gives eagerly on one device."""
  cache = {}

  def get(name, dtype):
    if (name, dtype) not in cache:
      base, others = models(2, dtype)
      cache[name, dtype] = pj.merge(base, others, METHODS[name])
    return cache[name, dtype]

  return get


# What rows of the table do not show: options that count in other ways, leaves
# of three axes cut along one by two, and several leaves under one jit.
CASES = [
  ("linear", "float32", "single", "jit"),
  ("linear", "float32", "mesh_explicit", "eager"),
  ("linear", "bfloat16", "mesh_auto", "jit"),
  ("task_arithmetic", "float32", "mesh_explicit", "jit"),
  ("mean", "float32", "single", "jit"),
  ("ties", "float32", "single", "jit"),
  ("ties", "float32", "mesh_auto", "eager"),
  ("ties", "bfloat16", "mesh_explicit", "jit"),
  ("ties_mergekit", "float32", "mesh_explicit", "jit"),
  ("ties_exact", "float32", "mesh_auto", "jit"),
]


@pytest.mark.parametrize(("name", "dtype", "place", "how"), CASES)
def test_same_bits(name, dtype, place, how, expected, request):
  base, others = models(2, dtype)
  wanted = expected(name, dtype)
  for leaf in jax.tree.leaves(wanted):
    assert np.isfinite(np.float32(leaf)).all()
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  merge = merge_jit if how == "jit" else pj.merge
  merged = merge(base, others, METHODS[name])
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  assert same_bits(merged, wanted)
  if place != "single":
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(merged)):
      assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("place", ["single", "mesh_explicit"])
def test_patches_and_params_alike(place, request):
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["ties"])
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  patches = [pj.diff(base, x) for x in others]
  merge = pj.merge if place == "single" else merge_jit
  assert same_bits(merge(base, patches, METHODS["ties"]), wanted)


def test_laws_of_patches_alike():
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["linear"])
  mixed = [others[0], pj.diff(base, others[1], exact=True)]
  assert same_bits(pj.merge(base, mixed, METHODS["linear"]), wanted)
  assert same_bits(merge_jit(base, mixed, METHODS["linear"]), wanted)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [("ties", "float32"), ("linear", "bfloat16")],
)
def test_streamed_from_files(name, dtype, tmp_path, expected):
  base, others = models(2, dtype)
  paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
  write(tmp_path / "base.safetensors", base)
  write(paths[0], others[0])
  pj.diff(base, others[1]).save(paths[1])
  out = tmp_path / "merged.safetensors"
  pj.merging.merge_files(
    tmp_path / "base.safetensors", paths, METHODS[name], out
  )
  assert same_bits(read(out), expected(name, dtype))
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
    ["0.safetensors", "1.safetensors", "base.safetensors", "merged.safetensors"]
  )


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_zero_patches_change_nothing(name):
  base, _ = models(2)
  zero = pj.diff(base, base)
  merged = pj.merge(base, [zero, zero], METHODS[name])
  assert same_bits(merged, base)


def test_mean_of_equal_parameters_is_they_up_to_rounding():
  base, _ = models(2)
  zero = pj.diff(base, base)
  merged = pj.merge(base, [zero, zero], METHODS["linear"])
  for x, y in zip(floats(merged), floats(base), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-7)


def test_one_contributor_is_taken_up_to_rounding():
  base, (other, _) = models(2)
  merged = pj.merge(base, [other], METHODS["mean"])
  for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(other)):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_untouched_leaves_are_the_same_objects():
  base, (other, _) = models(2)
  base = jax.tree.map(jnp.asarray, base)
  other = {**base, "heads": jax.tree.map(jnp.asarray, other["heads"])}
  merged = pj.merge(base, [other], pj.merging.mean())
  assert merged["block"]["kernel"] is base["block"]["kernel"]
  assert merged["heads"][0] is not base["heads"][0]


def test_untouched_leaves_count_in_the_density():
  base = {"a": np.zeros(2, np.float32), "b": np.zeros(8, np.float32)}
  patch = pj.diff(base, {**base, "a": np.float32([1, 2])}, only="a")
  # A fifth of ten numbers is two: both are kept.
  merged = pj.merge(base, [patch, patch], pj.merging.ties(density=0.1))
  assert merged["a"].tolist() == [1, 2]
  merged = pj.merge(base, [patch, patch], pj.merging.ties(density=0.05))
  assert merged["a"].tolist() == [0, 2]


def test_donation_frees_the_base():
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["ties"])
  base = jax.tree.map(jnp.asarray, base)
  merged = pj.merge(base, others, METHODS["ties"], donate=True)
  assert same_bits(merged, wanted)
  assert base["block"]["kernel"].is_deleted()
  assert not base["step"].is_deleted()


def test_no_retrace_for_new_numbers():
  base, others = models(2)
  patches = [pj.diff(base, x) for x in others]
  traces = []

  @jax.jit
  def merged(method):
    traces.append(method)
    return pj.merge(base, patches, method)

  for density, scale in ((0.1, 1.0), (0.2, 0.5), (0.3, 0.25)):
    merged(pj.merging.ties(density=density, scale=scale))
  assert len(traces) == 1
  first = pj.merge(base, patches, pj.merging.ties(density=0.1, scale=1.0))
  with jax.no_tracing():
    second = pj.merge(base, patches, pj.merging.ties(density=0.4, scale=0.3))
  assert not same_bits(first, second)


def test_combine_is_the_patch_of_the_merge():
  base, others = models(2)
  patches = [pj.diff(base, x) for x in others]
  patch = pj.merging.combine(patches, METHODS["ties"])
  assert same_bits(
    pj.apply(base, patch), pj.merge(base, patches, METHODS["ties"])
  )
  exact = [pj.diff(base, x, exact=True, only=".*kernel") for x in others]
  assert pj.merging.combine(exact, pj.merging.mean(), base=base).names == (
    "block/kernel",
  )


def test_only_merges_a_part():
  base, others = models(2)
  merged = pj.merge(base, others, pj.merging.mean(), only="block/.*")
  assert same_bits(merged["heads"], base["heads"])
  assert not same_bits(merged["block"], base["block"])


def test_contributors_elsewhere_are_moved(mesh_auto):
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["ties"])
  merged = pj.merge(put(base, mesh_auto), others, METHODS["ties"])
  assert same_bits(merged, wanted)


def test_eval_shape():
  base, others = models(2)
  out = jax.eval_shape(pj.merge, base, others, METHODS["ties"])
  assert out["block"]["kernel"].shape == (32, 16)
  assert model(0)["block"]["kernel"].dtype == out["block"]["kernel"].dtype
