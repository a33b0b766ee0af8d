"""The merging experiment's parts, on a tiny world."""

import csv
import dataclasses
import functools
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import patchjax as pj
from experiments.merging import (
  informed,
  learned,
  measuring,
  paired,
  recipes,
  report,
  running,
  training,
)
from experiments.merging.problem import Problem
from experiments.merging.recipes import Recipe
from experiments.merging.settings import Settings
from patchjax.demo import model
from patchjax.merging.methods import METHODS

ROOT = pathlib.Path(__file__).parents[2]


def _world():
  # Tests are imported file by file, without a package around them.
  path = pathlib.Path(__file__).with_name("merging_world.py")
  spec = importlib.util.spec_from_file_location("merging_world", path)
  module = importlib.util.module_from_spec(spec)
  sys.modules["merging_world"] = module
  spec.loader.exec_module(module)
  return module


world = _world()
SETTINGS = world.SETTINGS


@pytest.fixture(scope="module")
def encoder():
  return world.encoder()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(encoder, cache):
  return training.patches(encoder, SETTINGS, 0, cache)


@pytest.fixture(scope="module")
def problem(encoder, trained):
  patches, costs = trained
  return Problem(
    encoder,
    SETTINGS,
    0,
    [patches[name] for name in world.NAMES],
    encoder.pool("validation"),
    encoder.pool("test"),
    lambda: encoder.pool("train", SETTINGS.statistics_texts).padded(),
    {name: (patches[name], costs[name]) for name in training.UNIONS},
    1.0,
  )


def test_outcomes_are_those_of_the_whole_encoder(encoder):
  found = encoder.outcomes(encoder.base, encoder.pool("test"))
  tasks = encoder.tasks.values()
  parts = [part for task in tasks for part in (task.prompts, task.test)]
  # All texts at once: one shape to compile.
  vectors = jax.jit(functools.partial(model.encode, heads=world.SHAPE.heads))(
    world.params(),
    np.concatenate([part.ids for part in parts]),
    np.concatenate([part.mask for part in parts]),
  )
  cuts = np.cumsum([len(part) for part in parts])[:-1]
  vectors = np.split(np.asarray(vectors), cuts)
  expected = [
    np.argmax(own @ head.T, axis=1) == task.test.labels
    for task, head, own in zip(tasks, vectors[::2], vectors[1::2])
  ]
  np.testing.assert_array_equal(found, np.concatenate(expected))


def test_a_pool_holds_every_text_once_and_means_are_of_tasks(encoder):
  pool = encoder.pool("test", 10)
  rows = np.concatenate([batch.rows for batch in pool.batches])
  assert sorted(rows) == list(range(len(pool))) == list(range(50))
  np.testing.assert_allclose(pool.means(pool.task == 1), [0, 1, 0, 0, 0])


def test_one_task_is_answered_alone(encoder):
  for by_task in (False, True):
    pool = encoder.pool("test", by_task=by_task)
    whole = encoder.outcomes(encoder.base, pool)
    own = pool.task == 3
    found = encoder.outcomes(encoder.base, pool, 3)
    np.testing.assert_array_equal(found[own], whole[own])
  assert len({int(t) for b in pool.batches for t in b.task}) == 5
  # Batches of 16 texts, 16 of each task: every batch is of one.
  assert all(len(set(np.asarray(b.task))) == 1 for b in pool.batches)


def test_training_starts_at_the_base_and_learns(encoder, trained):
  patches, costs = trained
  assert set(patches) == set(costs) == {*world.NAMES, *training.UNIONS}
  kinds = {
    name: {type(d.code) for d in patches[name].deltas.values()}
    for name in ("a", "lora", "random")
  }
  assert [len(k) for k in kinds.values()] == [1, 1, 1]
  assert len(set.union(*kinds.values())) == 3
  for patch in patches.values():
    moved = pj.apply(encoder.base, patch)
    assert any(
      np.any(x != y)
      for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(encoder.base))
    )


def test_patches_come_from_the_cache(encoder, cache, trained, monkeypatch):
  monkeypatch.setattr(training, "_Trainer", None)
  again, costs = training.patches(encoder, SETTINGS, 0, cache)
  assert costs == trained[1]
  for name, patch in trained[0].items():
    for x, y in zip(jax.tree.leaves(patch), jax.tree.leaves(again[name])):
      np.testing.assert_array_equal(x, y)


def test_other_settings_have_another_folder(tmp_path):
  here = training.folder(tmp_path, SETTINGS, 0)
  other = Settings(**{**vars(SETTINGS), "rate": 1e-3})
  more = Settings(**{**vars(SETTINGS), "test_texts": 3})
  assert training.folder(tmp_path, other, 0) != here
  assert training.folder(tmp_path, more, 0) == here
  assert training.folder(tmp_path, SETTINGS, 1) != here


def test_the_union_sees_what_the_specialists_see(encoder):
  trainer = training._Trainer(encoder, SETTINGS, 0)
  own = [
    [np.sort(x[:, 0, 0]) for x, *_ in trainer._batches(number)]
    for number in range(len(world.NAMES))
  ]
  mixed = [
    np.concatenate([x[:, 0, 0] for x, *_ in training._mixed(group)])
    for group in zip(
      *(trainer._batches(number) for number in range(len(world.NAMES)))
    )
  ]
  for step, found in enumerate(mixed):
    expected = np.concatenate([batches[step] for batches in own])
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


def test_the_scale_of_a_recipe_is_the_methods_own(problem):
  by_recipe = measuring.scaled(
    problem.base,
    pj.merge(problem.base, problem.patches, pj.merging.task_arithmetic()),
    np.float32(0.3),
  )
  own = pj.merge(
    problem.base, problem.patches, pj.merging.task_arithmetic(scale=0.3)
  )
  for x, y in zip(jax.tree.leaves(by_recipe), jax.tree.leaves(own)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_the_best_on_validation_is_tested(problem):
  good = pj.apply(problem.base, problem.patches[0])
  scores = {
    which: problem.encoder.scores(model, problem.validation).mean()
    for which, model in (("good", good), ("base", problem.base))
  }

  def merge(problem, *, which):
    return good if which == "good" else problem.base

  grid = {"which": ("base", "good")}
  result = measuring.measure(Recipe("r", "sums", merge, grid), problem)
  best = max(grid["which"], key=scores.__getitem__)
  assert result.options == {"which": best} and result.tried == 2
  assert result.validation == pytest.approx(scores[best])
  np.testing.assert_array_equal(
    result.outcomes,
    problem.encoder.outcomes(
      good if best == "good" else problem.base, problem.test
    ),
  )


def test_without_a_choice_nothing_is_validated(problem):
  result = measuring.measure(
    Recipe("r", "sums", lambda problem: problem.base), problem
  )
  assert result.validation is None and result.tried == 0


def test_statistics_are_taken_once_and_their_cost_told_apart(problem):
  taken = []

  def merge(problem):
    problem.statistic("s", lambda number: taken.append(number))
    return problem.base

  recipe = Recipe("r", "statistics", merge, statistics=("s",))
  result = measuring.measure(recipe, problem)
  assert taken == list(range(len(world.NAMES)))
  assert result.statistics == problem.costs["s"]


def test_statistics_see_the_texts_of_their_task(problem):
  x, mask, task = informed._examples(problem, 1)
  assert len(x) == len(mask) == SETTINGS.statistics_texts
  np.testing.assert_array_equal(task, 1)
  np.testing.assert_array_equal(informed._mask((x, mask, task)), mask)


def test_one_text_is_answered_as_in_a_batch(problem):
  encoder = problem.encoder
  text = informed._examples(problem, 1)

  @jax.jit
  def both(x, mask, task):
    whole = encoder.logits(encoder.base, x, mask, task, encoder.heads)
    return whole[1], encoder.answer(encoder.base, (x[1], mask[1], task[1]))

  in_batch, alone = both(*text)
  np.testing.assert_allclose(alone, in_batch, rtol=1e-4)


def test_adamerging_sees_every_task_alike_and_no_label(problem):
  batches = list(learned._batches(problem))
  assert len(batches) == SETTINGS.adapt_steps
  for ((x, mask, task),) in batches:
    assert len(x) == len(mask)
    np.testing.assert_array_equal(
      np.bincount(task), [SETTINGS.adapt_batch] * len(world.NAMES)
    )


def test_results_are_files(tmp_path):
  result = measuring.Result(
    np.array([True, False]), 0.5, {"scale": 0.1}, 3, 1.5, 2.0, "of"
  )
  result.save(tmp_path / "r.npz")
  again = measuring.Result.load(tmp_path / "r.npz")
  np.testing.assert_array_equal(again.outcomes, result.outcomes)
  assert again.options == {"scale": 0.1} and again.cost == 1.5
  assert again.stamp == "of"


def test_every_method_is_measured_or_left_out_for_a_reason():
  names = {method.__name__ for method in METHODS}
  measured = {recipe.name for recipe in recipes.recipes()}
  assert not measured & recipes.LEFT_OUT.keys()
  assert names <= measured | recipes.LEFT_OUT.keys()
  assert recipes.LEFT_OUT.keys() <= names


def test_unknown_recipes_are_refused():
  with pytest.raises(ValueError, match="tie"):
    recipes.named(["tie"])


def test_errors_of_one_seed_are_those_of_the_texts():
  task = np.repeat([0, 1], [4, 100])
  outcomes = np.random.default_rng(0).random((1, 104))
  expected = np.sqrt(
    np.var(outcomes[0, :4], ddof=1) / 4 + np.var(outcomes[0, 4:], ddof=1) / 100
  )
  assert paired.standard_error(outcomes, task) == pytest.approx(expected / 2)
  assert paired.mean(outcomes, task) == pytest.approx(
    (outcomes[0, :4].mean() + outcomes[0, 4:].mean()) / 2
  )


@pytest.mark.parametrize("seed_share,text_share", [(1, 0), (0, 1), (0.5, 1)])
def test_errors_are_the_spread_of_the_mean(seed_share, text_share):
  random = np.random.default_rng(0)
  task = np.repeat([0, 1], 60)
  means, variances = [], []
  for _ in range(300):
    outcomes = (
      seed_share * random.standard_normal((3, 1)) / 10
      + text_share * random.standard_normal(120)
      + random.standard_normal((3, 120))
    )
    means.append(paired.mean(outcomes, task))
    variances.append(paired.standard_error(outcomes, task) ** 2)
  # Never much too small; and what is counted twice (a fifth and more here) is
  # taken off again.
  assert 0.9 < np.mean(variances) / np.var(means) < 1.22


def test_equal_methods_do_not_differ():
  outcomes = np.ones((3, 4)) - np.ones((3, 4))
  assert paired.standard_error(outcomes, np.array([0, 0, 1, 1])) == 0


def test_a_run_writes_its_table_and_can_be_resumed(
  encoder, cache, tmp_path, monkeypatch
):
  chosen = recipes.named(["task_arithmetic", "linear"])
  arguments = (encoder, SETTINGS, tmp_path)
  table = running.run(*arguments, cache=cache, methods=chosen)
  assert [row.name for row in table] == [
    *running.BASELINES,
    "task_arithmetic",
    "linear",
  ]
  by_name = {row.name: row for row in table}
  assert by_name["task_arithmetic"].gain == 0
  assert by_name["base"].recovered == 0
  assert by_name["specialists"].recovered == 1
  with (tmp_path / "table.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["name"] for row in rows] == list(by_name)
  assert set(world.NAMES) <= rows[0].keys()
  assert "task_arithmetic" in (tmp_path / "table.md").read_text()
  assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")

  monkeypatch.delattr(measuring.Result, "save")
  said = []
  again = running.run(
    *arguments, cache=cache, methods=chosen, resume=True, echo=said.append
  )
  assert said == []
  assert [row.accuracy for row in again] == [row.accuracy for row in table]
  other = dataclasses.replace(SETTINGS, adapt_rate=1.0)
  with pytest.raises(AttributeError, match="save"):  # measured, not resumed
    running.run(
      encoder, other, tmp_path, cache=cache, methods=chosen, resume=True
    )


def test_what_all_are_compared_with_is_needed(encoder, tmp_path):
  with pytest.raises(ValueError, match="task_arithmetic"):
    chosen = recipes.named(["linear"])
    running.run(encoder, SETTINGS, tmp_path, methods=chosen)


def test_labels_cover_no_other():
  assert report._meet((0, 0, 2, 2), (1, 1, 3, 3))
  assert not report._meet((0, 0, 1, 1), (1, 0, 2, 1))


def test_the_default_config_is_the_settings():
  path = ROOT / "configs" / "merging_minilm.py"
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert Settings(**module.get_config().to_dict()) == Settings()
  quick = Settings(**module.get_config("quick").to_dict())
  assert quick.steps < Settings().steps and quick.tasks == Settings().tasks
  with pytest.raises(ValueError, match="slow"):
    module.get_config("slow")
