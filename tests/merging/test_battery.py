"""Every method, dtype and placement: same bits however it is run."""

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
  "ties_leaf": pj.merging.ties(density=0.2, scope="leaf"),
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


# Each method, each dtype, each kind of counting on a mesh: they share code.
CASES = [(name, "float32", "single") for name in METHODS]
CASES += [(name, "float32", "mesh_auto") for name in ("ties", "ties_exact")]
CASES += [
  (name, "float32", "mesh_explicit") for name in ("linear", "ties", "ties_leaf")
]
CASES += [("ties", "bfloat16", "mesh_auto"), ("linear", "bfloat16", "single")]
CASES += [("ties", "float16", "single")]


@pytest.mark.parametrize(("name", "dtype", "place"), CASES)
def test_same_bits(name, dtype, place, expected, request):
  base, others = models(2, dtype)
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  wanted = expected(name, dtype)
  eager = pj.merge(base, others, METHODS[name])
  jitted = merge_jit(base, others, METHODS[name])
  for merged in (eager, jitted):
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert same_bits(merged, wanted)
    if place != "single":
      for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(merged)):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
  for leaf in jax.tree.leaves(eager):
    assert np.isfinite(np.float32(leaf)).all()


@pytest.mark.parametrize("place", ["single", "mesh_explicit"])
def test_patches_and_params_alike(place, request):
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["ties"])
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  patches = [pj.diff(base, x) for x in others]
  assert same_bits(pj.merge(base, patches, METHODS["ties"]), wanted)
  assert same_bits(merge_jit(base, patches, METHODS["ties"]), wanted)


def test_laws_of_patches_alike():
  base, others = models(2)
  wanted = pj.merge(base, others, METHODS["linear"])
  mixed = [others[0], pj.diff(base, others[1], exact=True)]
  assert same_bits(pj.merge(base, mixed, METHODS["linear"]), wanted)
  assert same_bits(merge_jit(base, mixed, METHODS["linear"]), wanted)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [("ties", "float32"), ("ties_leaf", "float32"), ("linear", "bfloat16")],
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


@pytest.mark.parametrize("name", ["mean", "ties"])
def test_one_contributor_is_taken_up_to_rounding(name):
  base, (other, _) = models(2)
  method = {"mean": pj.merging.mean(), "ties": pj.merging.ties(density=1.0)}
  merged = pj.merge(base, [other], method[name])
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
  jax.clear_caches()
  with jax.log_compiles(False):
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
