"""Soups, WiSE-FT and averages of a run, beyond the battery of all methods."""

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import MismatchError, StructureError
from tests.merging.battery_models import DTYPES, models, put
from tests.merging.models import same_bits
from tests.reference import merging_averages


def scored(seed):
  """A score of models: how near they are to one beside their base."""
  base = models(1)[0]["layers"]["0"]["kernel"]
  near = np.random.default_rng(100 + seed).standard_normal((32, 16))
  target = base + 0.1 * near

  def score(model):
    leaf = model.get("layers/0/kernel")
    if leaf is None:
      leaf = model["layers"]["0"]["kernel"]
    leaf = np.asarray(leaf).astype(np.float64)
    return -np.sum(np.square(leaf - target))

  return score


def flat(model):
  return {
    f"layers/{i}/kernel": np.asarray(layer["kernel"]).astype(np.float32)
    for i, layer in model["layers"].items()
  }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_soup(seed, dtype):
  _, others = models(6, dtype)
  # One that is far away, and must not be kept.
  others[2]["layers"]["0"]["kernel"] = 3 * others[2]["layers"]["0"]["kernel"]
  merged, kept = pj.merging.greedy_soup(others, scored(seed))
  assert kept[0] == max(range(6), key=lambda i: scored(seed)(others[i]))
  assert 2 not in kept and len(kept) > 1
  exact = [flat(model) for model in others]

  def score(model):
    # The reference's soups are not rounded: ours are, before they are scored.
    rounded = {k: x.astype(DTYPES[dtype]) for k, x in model.items()}
    return scored(seed)(rounded)

  assert kept == merging_averages.greedy_ingredients(exact, score)
  mean = pj.merge(None, [others[i] for i in kept], pj.merging.uniform_soup())
  for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(mean)):
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = np.float32(x), np.float32(y)
    np.testing.assert_allclose(x, y, rtol=2**-8 if dtype != "float32" else 1e-6)
    assert np.mean(x != y) < (0.2 if dtype == "float32" else 0.001)


def test_greedy_soup_of_equal_scores_takes_the_later_first():
  a, b = {"w": np.float32([1])}, {"w": np.float32([-1])}
  merged, kept = pj.merging.greedy_soup([a, b], lambda model: -1.0)
  assert kept == [1] and merged["w"].tolist() == [-1]


def test_greedy_soup_keeps_places_and_compiles_once(mesh_explicit):
  _, others = models(5)
  # Better with each model that is added.
  calls = []

  def score(model):
    calls.append(model)
    return len(calls)

  there = [put(model, mesh_explicit) for model in others]
  merged, kept = pj.merging.greedy_soup(there, score)
  assert kept == [4, 3, 2, 1, 0] and len(calls) == 9
  leaf = merged["layers"]["0"]["kernel"]
  like = there[0]["layers"]["0"]["kernel"]
  assert leaf.sharding.is_equivalent_to(like.sharding, 2)
  assert merged["step"] == 7
  with jax.no_tracing():
    pj.merging.greedy_soup(there, score)


def test_greedy_soup_checks_its_models():
  a = {"w": np.zeros(2, np.float32), "n": np.int32(1)}
  with pytest.raises(StructureError, match="nothing to merge"):
    pj.merging.greedy_soup([], len)
  with pytest.raises(MismatchError):
    pj.merging.greedy_soup(
      [a, {"w": np.zeros(3, np.float32), "n": a["n"]}], len
    )
  with pytest.raises(MismatchError, match="n: int32"):
    pj.merging.greedy_soup([a, {**a, "n": np.int32(2)}], len)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wise_ft_ends_at_both_models(dtype):
  base, (other,) = models(1, dtype)
  for alpha, wanted in ((0.0, base), (1.0, other)):
    merged = pj.merge(base, [other], pj.merging.wise_ft(alpha=alpha))
    assert same_bits(merged, wanted)


def test_averages_of_a_run_need_no_base():
  _, run = models(4)
  mean = pj.merge(None, run, pj.merging.lawa(window=3))
  assert same_bits(mean, pj.merge(None, run[1:], pj.merging.uniform_soup()))
  last = pj.merge(None, run, pj.merging.ema(decay=0.0))
  assert same_bits(last, run[-1])
  patches = [pj.diff(run[0], x) for x in run]
  both = pj.merging.combine(patches, pj.merging.ema(decay=0.5))
  found = pj.apply(run[0], both)
  wanted = pj.merge(None, run, pj.merging.ema(decay=0.5))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_depth_is_found_in_names():
  base = {
    "embed": np.float32(0),
    "model.layers.0.mlp.experts.7.w": np.float32(0),
    "model.layers.2.mlp": np.float32(0),
    "block_1": {"kernel": np.float32(0)},
    "conv2d": np.float32(0),
  }
  ones = jax.tree.map(np.ones_like, base)
  merged = pj.merge(base, [ones], pj.merging.lines(alpha=0.5, beta=0.5))
  assert merged["embed"] == merged["conv2d"] == 0.5
  assert merged["model.layers.0.mlp.experts.7.w"] == 0.5
  assert merged["block_1"]["kernel"] == 0.75
  assert merged["model.layers.2.mlp"] == 1.0
  method = pj.merging.lines(alpha=0.0, beta=1.0, layer=r"conv(\d)d")
  merged = pj.merge(base, [ones], method)
  assert merged["conv2d"] == 1.0 and merged["block_1"]["kernel"] == 0.0
  with pytest.raises(ValueError, match="must have a group"):
    pj.merging.lines(layer="layer")


def test_depth_after_another_method():
  base, others = models(2)
  scaled = pj.merging.scale_by_depth(alpha=0.25, beta=0.5)
  merged = pj.merge(base, others, pj.chain(pj.merging.mean(), scaled))
  mean = pj.merge(base, others, pj.merging.mean())
  for i, share in (("0", 0.25), ("1", 0.75)):
    x, y, z = (m["layers"][i]["kernel"] for m in (base, merged, mean))
    np.testing.assert_allclose(y - x, share * (z - x), atol=1e-6)


def test_options_are_checked():
  base, others = models(2)
  with pytest.raises(ValueError, match="takes one contributor"):
    pj.merge(base, others, pj.merging.wise_ft())
  with pytest.raises(ValueError, match="at least 1"):
    pj.merging.lawa(window=0)
  with pytest.raises(ValueError, match="needs as many checkpoints, got 2"):
    pj.merge(base, others, pj.merging.lawa(window=3))
