"""How much of a full training's gain does a 0.5 % patch keep?

    python -m experiments.sparse_training --seeds 0,1,2

Trains on each task, with each seed, every entry of the upper layers (dense),
a FISH mask and a random mask of the same size, with the demo's settings, and
prints gains on test texts. Learning rates are the demo's: chosen on
validation texts, one a kind of patch.
"""

import dataclasses
import json

import numpy as np
from absl import app, flags

from patchjax.demo import data, evidence, model, report, tasks, training
from patchjax.demo.config import Config
from patchjax.demo.scoring import Scorer
from patchjax.trees import table

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_TASKS = flags.DEFINE_list("tasks", ["tweets", "bbc"], "Tasks to train on.")
_JSON = flags.DEFINE_string("json", "", "Also write the numbers to this file.")


def _makers(scorer: Scorer, task: str, config: Config):
  yield "dense", config.dense_rate, training.dense_patch(scorer)
  yield "FISH", config.fish_rate, training.fish_patch(scorer, task, config)
  yield (
    "random",
    config.random_rate,
    training.random_patch(scorer, task, config),
  )


def measure(scorer: Scorer, task: str, config: Config) -> dict[str, float]:
  """Gains in points on the test texts of a task, by kind of patch."""
  before = scorer.outcomes(scorer.base, task).mean()
  gains = {}
  for kind, rate, patch in _makers(scorer, task, config):
    patch = training.train(patch, scorer, task, config, rate=rate)
    params = evidence.patched(scorer.base, patch)
    gains[kind] = 100 * float(scorer.outcomes(params, task).mean() - before)
  return gains


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  config = Config()
  files = data.fetch(echo=print)
  most = {"train": config.train_texts, "test": config.test_texts}
  found = tasks.load(files, tokens=config.tokens, most=most)
  scorer = Scorer(
    model.load(files["model.safetensors"]),
    {name: found[name] for name in _TASKS.value},
    depth=config.depth,
  )
  rows, numbers = [], []
  with report.Cost() as cost:
    for task in _TASKS.value:
      shares = []
      for seed in map(int, _SEEDS.value):
        seeded = dataclasses.replace(config, seed=seed)
        gains = measure(scorer, task, seeded)
        numbers.append({"task": task, "seed": seed, **gains})
        shares.append([gains[k] / gains["dense"] for k in ("FISH", "random")])
        rows.append(
          [task, seed, *(f"{gains[k]:+.1f}" for k in gains)]
          + [f"{100 * share:.0f} %" for share in shares[-1]]
        )
      mean = np.mean(shares, axis=0)
      rows.append([task, "mean", "", "", ""])
      rows[-1] += [f"{100 * share:.0f} %" for share in mean]
  columns = ["task", "seed", "dense", "FISH 0.5 %", "random 0.5 %"]
  columns += ["FISH / dense", "random / dense"]
  print(table(columns, rows, title="gain on test texts, points"))
  print(cost)
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(numbers, file, indent=2)


if __name__ == "__main__":
  app.run(main)
