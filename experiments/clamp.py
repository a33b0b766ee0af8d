"""The CLAMP story with a config file: a thin main over `patchjax.demo`.

    python -m experiments.clamp --config configs/clamp.py --workdir runs/clamp

The workdir gets the repository, the config and the report.
"""

import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

from patchjax import demo

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/clamp.py", "Numbers of the story.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/clamp", "Where to write.")
_FORCE = flags.DEFINE_bool("force", False, "Replace the workdir's repository.")


def main(argv: list[str]) -> int:
  """Runs the story; returns 1 if it did not go as told."""
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  given = _CONFIG.value.to_dict()
  report = demo.run(workdir / "repo", demo.Config(**given), force=_FORCE.value)
  for name, value in (
    ("config.json", given),
    ("facts.json", dict(report.facts)),
  ):
    text = json.dumps(value, indent=2, sort_keys=True)
    workdir.joinpath(name).write_text(text + "\n")
  workdir.joinpath("report.txt").write_text(f"{report}\n")
  return 1 if report.problems else 0


if __name__ == "__main__":
  app.run(main)
