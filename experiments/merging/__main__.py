"""Remakes the table and the figure of merges of MiniLM's specialists.

    python -m experiments.merging --config=configs/merging_minilm.py

Model, texts, trained specialists and compiled programs are kept in a cache
folder: that of `--cache`, of the environment's PATCHJAX_CACHE, or the
platform's. The first run also trains; what it writes goes to `--workdir`.
"""

import json
import pathlib

import jax
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments.merging import recipes, running
from experiments.merging.settings import Settings
from patchjax.demo import data

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  "configs/merging_minilm.py",
  "Numbers of the experiment.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/merging", "Where to write.")
_CACHE = flags.DEFINE_string(
  "cache", None, "Where trained patches are kept; default the demo's cache."
)
_METHODS = flags.DEFINE_list(
  "methods", None, "Only these rows; default all. task_arithmetic is needed."
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Take rows that the workdir holds already from there."
)


def main(argv: list[str]) -> None:
  """Runs the experiment and prints the table."""
  del argv
  given = _CONFIG.value.to_dict()
  settings = Settings(**given)
  chosen = recipes.named(_METHODS.value)
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  said = json.dumps(given, indent=2, sort_keys=True)
  workdir.joinpath("config.json").write_text(said + "\n")
  cache = pathlib.Path(_CACHE.value) if _CACHE.value else data.cache_dir()
  # What one run compiles the next one need not: a sixth of its time.
  jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  running.run(
    running.encoder(settings, tqdm.write),
    settings,
    workdir,
    cache=cache,
    methods=chosen,
    resume=_RESUME.value,
    echo=tqdm.write,
  )
  print(workdir.joinpath("table.md").read_text())


if __name__ == "__main__":
  app.run(main)
