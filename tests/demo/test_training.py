"""Scoring from the cached lower layers, and training nothing but a patch."""

import dataclasses

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.demo import model, training
from tests.demo import world

CONFIG = world.CONFIG


@pytest.fixture(scope="module")
def scorer():
  return world.scorer()


def by_hand(scorer, params, task):
  texts = scorer.tasks[task].test
  prompts = scorer.tasks[task].prompts
  heads = world.SHAPE.heads
  head = model.encode(scorer.base, prompts.ids, prompts.mask, heads=heads)
  vectors = model.encode(params, texts.ids, texts.mask, heads=heads)
  return np.asarray(vectors @ head.T).argmax(axis=1) == texts.labels


@pytest.mark.parametrize("task", ["bbc", "tweets"])
def test_outcomes_equal_the_whole_encoder(scorer, task):
  params = model.initial(jax.random.key(1), world.SHAPE)
  for version in (scorer.base, params, jax.tree.map(np.array, scorer.base)):
    found = scorer.outcomes(version, task)
    np.testing.assert_array_equal(found, by_hand(scorer, version, task))


def test_changed_lower_layers_are_noticed(scorer):
  params = jax.tree.map(np.array, scorer.base)
  params["layers"]["0"]["mlp"]["in"]["kernel"] += 3.0
  found = scorer.outcomes(params, "bbc")
  np.testing.assert_array_equal(found, by_hand(scorer, params, "bbc"))
  # And forgotten again.
  found = scorer.outcomes(scorer.base, "bbc")
  np.testing.assert_array_equal(found, by_hand(scorer, scorer.base, "bbc"))


@pytest.mark.parametrize("kind", ["fish", "random"])
def test_masks_have_the_asked_size(scorer, kind):
  make = getattr(training, f"{kind}_patch")
  patch = make(scorer, "tweets", CONFIG)
  layers = sum(
    leaf.size
    for name, leaf in pj.trees.named_leaves(scorer.base).items()
    if name.startswith("layers/")
  )
  held = sum(delta.code.values.size for delta in patch.deltas.values())
  assert held == pytest.approx(CONFIG.share * layers, abs=1)
  assert all(name.startswith("layers/2/") for name in patch.names)


@pytest.mark.parametrize("keep", [None, "bbc"])
@pytest.mark.parametrize("kind", ["fish", "random", "dense"])
def test_training_changes_the_patch_only(scorer, kind, keep):
  if kind == "dense":
    patch = training.dense_patch(scorer)
  else:
    patch = getattr(training, f"{kind}_patch")(scorer, "tweets", CONFIG)
  before = jax.tree.map(np.array, scorer.base)
  trained = training.train(
    patch, scorer, "tweets", CONFIG, rate=0.01, keep=keep
  )
  assert trained.names == patch.names
  for name, delta in patch.deltas.items():
    after = trained.deltas[name].code
    assert np.any(np.asarray(after.values))
    assert not np.any(np.asarray(delta.code.values))
    if kind != "dense":
      np.testing.assert_array_equal(after.indices, delta.code.indices)
  jax.tree.map(np.testing.assert_array_equal, before, scorer.base)


def test_training_is_repeatable_and_learns(scorer):
  config = dataclasses.replace(CONFIG, steps=40, share=0.2)
  patch = training.random_patch(scorer, "tweets", config)
  once, again = (
    training.train(patch, scorer, "tweets", config, rate=0.03) for _ in range(2)
  )
  jax.tree.map(np.testing.assert_array_equal, once, again)
  score = scorer.outcomes(pj.apply(scorer.base, once), "tweets", "train")
  assert score.mean() > scorer.outcomes(scorer.base, "tweets", "train").mean()
