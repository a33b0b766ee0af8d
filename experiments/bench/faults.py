"""Accidents: `python -m experiments.bench.faults --kills 200 --flips 300`.

* `--kills N`: kill -9 before every storage operation of each verb, then at N
  random moments beside two writers.
* `--flips N`: single bits of files flipped.
* `--writers W --commits C`: W processes commit C times each to one branch.

Prints what happened how often, and ends with 0 only if nothing was lost, and
nothing wrong was returned as right.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from absl import app, flags, logging

from experiments.bench import (
  faults_flips,
  faults_kills,
  faults_operations,
  faults_world,
  faults_writers,
)
from experiments.bench.faults_children import call

KILLS = flags.DEFINE_integer("kills", 0, "kills at random moments")
STRIDE = flags.DEFINE_integer("stride", 1, "kill before every n-th operation")
FLIPS = flags.DEFINE_integer("flips", 0, "bits flipped")
WRITERS = flags.DEFINE_integer("writers", 0, "processes that commit")
COMMITS = flags.DEFINE_integer("commits", 50, "commits of each of them")
SEED = flags.DEFINE_integer("seed", 0, "of all that is random")
VERBS = flags.DEFINE_list(
  "verbs", list(faults_world.VERBS), "verbs that are killed"
)

_SHOWN = 10  # failures printed


def _kills(folder: str) -> bool:
  template = os.path.join(folder, "template")
  call(lambda: faults_world.build(template))
  what = "all" if faults_operations.is_complete() else "Python's"
  print(f"storage operations counted: {what}")
  hunts = {
    "every operation": lambda: faults_kills.every_operation(
      template, folder, VERBS.value, STRIDE.value
    ),
    "beside 2 writers": lambda: faults_kills.random_moments(
      template, folder, VERBS.value, KILLS.value, SEED.value
    ),
  }
  good = True
  for hunt, run in hunts.items():
    tally = run()
    print(faults_kills.table(hunt, tally), flush=True)
    good &= _without(tally.failures) and tally.ok
  return good


def _flips(folder: str) -> bool:
  template = os.path.join(folder, "template")
  call(lambda: faults_world.build(template))
  flips = faults_flips.draw(template, FLIPS.value, SEED.value)
  path = os.path.join(folder, "flipped")
  counts, failures = faults_flips.run(template, path, flips)
  print(faults_flips.table(counts))
  return _without(failures)


def _writers(folder: str) -> bool:
  path = os.path.join(folder, "repo")
  line, failures = faults_writers.run(path, WRITERS.value, COMMITS.value)
  print(line)
  return _without(failures)


def _without(failures: list[str]) -> bool:
  for failure in failures[:_SHOWN]:
    print(f"FAILED {failure}")
  return not failures


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax reports every save
  faults_world.warm_up()
  good = True
  hunts = {
    "kills": (KILLS.value, _kills),
    "flips": (FLIPS.value, _flips),
    "writers": (WRITERS.value, _writers),
  }
  for name, (wanted, hunt) in hunts.items():
    if wanted:
      start = time.monotonic()
      with tempfile.TemporaryDirectory(prefix="patchjax-faults-") as folder:
        good &= hunt(os.path.realpath(folder))
      print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
  print("all is well" if good else "FAILED")
  sys.exit(0 if good else 1)


if __name__ == "__main__":
  faults_operations.preload("experiments.bench.faults")
  app.run(main)
