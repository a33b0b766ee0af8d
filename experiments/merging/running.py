"""The experiment, seed after seed."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

import patchjax as pj
from experiments.merging import measuring, report, tasks, training
from experiments.merging.encoder import Encoder
from experiments.merging.measuring import Result
from experiments.merging.problem import Problem, timed
from experiments.merging.recipes import Recipe, recipes
from experiments.merging.settings import Settings
from patchjax.demo import data, model

BASELINES = {
  "base": "",
  "specialists": "one model a task, told which",
  "multitask": "all training texts",
  "lora": "all training texts",
  "random": "all training texts",
}
"""Rows that no method made, and what they read."""

Echo = Callable[[str], object]


def encoder(settings: Settings, echo: Echo = lambda line: None) -> Encoder:
  """Fetches the model and the texts, and cuts the model in two.

  Args:
    settings: of the experiment.
    echo: receives one line for every download.
  """
  files = tasks.fetch(settings.tasks, echo)
  most = {
    "train": settings.train_texts,
    "validation": settings.validation_texts,
    "test": settings.test_texts,
  }
  found = tasks.load(settings.tasks, files, tokens=settings.tokens, most=most)
  return Encoder(
    model.load(files["model.safetensors"]),
    found,
    depth=settings.depth,
    batch=settings.evaluation_batch,
  )


def run(
  world: Encoder,
  settings: Settings,
  workdir: pathlib.Path,
  *,
  cache: pathlib.Path | None = None,
  methods: Sequence[Recipe] | None = None,
  resume: bool = False,
  echo: Echo = lambda line: None,
) -> list[report.Row]:
  """Measures every method with every seed, and writes table and figure.

  Args:
    world: base, heads and texts.
    settings: of the experiment.
    workdir: gets `results/`, `table.csv`, `table.md`, `cost.png` and
      `config.json`.
    cache: where trained patches are kept; default the demo's cache.
    methods: default all.
    resume: whether rows that `workdir` holds already are taken from there, if
      they are of these settings.
    echo: receives one line for every row.

  Returns:
    The table.

  Raises:
    ValueError: if the method that all are compared with is not among them.
  """
  methods = recipes() if methods is None else methods
  if report.REFERENCE not in {recipe.name for recipe in methods}:
    raise ValueError(
      f"rows are compared with {report.REFERENCE}, add it to the methods"
    )
  by_name = {recipe.name: recipe for recipe in methods}
  pools = _Pools(world, settings)
  results: dict[str, list[Result]] = {}
  for seed in settings.seeds:
    folder = workdir / "results" / f"seed{seed}"
    problem = _problem(world, settings, seed, pools, cache, echo)
    rows = {name: _baseline(name) for name in BASELINES}
    rows |= {
      recipe.name: functools.partial(measuring.measure, recipe)
      for recipe in methods
    }
    for name, measure in rows.items():
      path = folder / f"{name}.npz"
      stamp = measuring.stamped(settings, by_name.get(name))
      held = Result.load(path) if resume and path.exists() else None
      if held is not None and held.stamp == stamp:
        result = held
      else:
        result, seconds = timed(measure, problem)
        result = dataclasses.replace(result, stamp=stamp)
        result.save(path)
        score = pools.test.means(result.outcomes).mean()
        echo(
          f"seed {seed} {name}: {100 * score:.1f}, {result.options}, merge"
          f" {result.cost:.2f}, in all {seconds:.0f} CPU-s"
        )
      results.setdefault(name, []).append(result)
  families = {name: ("baseline", said) for name, said in BASELINES.items()}
  families |= {r.name: (r.family, r.data) for r in methods}
  table = report.rows(results, families, pools.test.task)
  report.write_csv(workdir / "table.csv", table, world.names)
  workdir.joinpath("table.md").write_text(report.markdown(table, world.names))
  report.draw(workdir / "cost.png", table)
  return table


class _Pools:
  """The texts, behind the lower layers; those of training when asked for."""

  def __init__(self, world: Encoder, settings: Settings):
    self.validation = world.pool("validation", settings.validation_texts)
    self.test = world.pool("test", settings.test_texts, by_task=True)
    self.train = functools.cache(
      lambda: world.pool("train", settings.statistics_texts).padded()
    )


def _problem(
  world: Encoder,
  settings: Settings,
  seed: int,
  pools: _Pools,
  cache: pathlib.Path | None,
  echo: Echo,
) -> Problem:
  root = data.cache_dir() if cache is None else cache
  patches, costs = training.patches(world, settings, seed, root, echo=echo)
  return Problem(
    world,
    settings,
    seed,
    [patches[name] for name in world.names],
    pools.validation,
    pools.test,
    pools.train,
    {name: (patches[name], costs[name]) for name in training.UNIONS},
    sum(costs[name] for name in world.names),
  )


def _baseline(name: str) -> Callable[[Problem], Result]:
  """What measures one of `BASELINES`."""

  def measure(problem: Problem) -> Result:
    world, test = problem.encoder, problem.test
    if name == "base":
      return Result(world.outcomes(problem.base, test))
    if name != "specialists":
      patch, cost = problem.unions[name]
      upper = pj.apply(problem.base, patch)
      return Result(world.outcomes(upper, test), cost=cost)
    right = np.zeros(len(test), bool)
    for number, upper in enumerate(problem.models):
      own = test.task == number
      right[own] = world.outcomes(upper, test, number)[own]
    return Result(right, cost=problem.training)

  return measure
