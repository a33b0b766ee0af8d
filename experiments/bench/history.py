"""What a history costs: `python -m experiments.bench.history`.

Five versions of a model of 125 million parameters are stored and read, beside
plain Orbax checkpoints, safetensors files, Git LFS and Icechunk; git-theta on
its own workload; the growth with the number of commits; real fine-tunes. All
ratios are taken within one run, round by round. About ten minutes on two idle
cores; `--params 5M` takes one.

Git LFS, git-theta and Icechunk are installed beside, in the cache folder; what
cannot be had is said.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
from absl import app, flags, logging

from experiments.bench import (
  history_growth,
  history_machine,
  history_real,
  history_theta,
  history_versions,
  workload,
)
from experiments.bench.history_tables import Section, Target, targets_table
from experiments.bench.history_versions import Settings

_SECTIONS: dict[str, Callable[[Settings], Section]] = {
  "machine": history_machine.run,
  "float32": lambda settings: history_versions.run(settings, np.float32),
  "bfloat16": lambda settings: history_versions.run(
    settings, ml_dtypes.bfloat16
  ),
  "theta": history_theta.run,
  "growth": history_growth.run,
  "real": history_real.run,
}

_PARAMS = flags.DEFINE_string("params", "125M", "numbers of the model")
_ONLY = flags.DEFINE_list(
  "only", list(_SECTIONS), f"sections of {', '.join(_SECTIONS)}"
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "rounds that are counted")
_INSTALL = flags.DEFINE_bool(
  "install", True, "install the peers that are not here"
)
_MARKDOWN = flags.DEFINE_bool("markdown", False, "print tables for a README")


def main(argv: list[str]) -> None:
  """Runs the sections and prints what they found."""
  del argv
  unknown = set(_ONLY.value) - set(_SECTIONS)
  if unknown:
    raise app.UsageError(
      f"--only: no section {', '.join(sorted(unknown))}; there are "
      + ", ".join(_SECTIONS)
    )
  logging.set_verbosity(logging.ERROR)  # Orbax reports every save
  targets: list[Target] = []
  for name in _ONLY.value:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="patchjax-bench-") as folder:
      section = _SECTIONS[name](
        Settings(
          params=workload.count(_PARAMS.value),
          repeats=_REPEATS.value,
          install=_INSTALL.value,
          folder=pathlib.Path(folder),
        )
      )
    targets += section.targets
    for table in section.tables:
      print(table.text(markdown=_MARKDOWN.value), end="\n\n")
    for remark in section.remarks:
      print(remark, end="\n\n")
    print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)
  if targets:
    print(targets_table(targets).text(markdown=_MARKDOWN.value))


if __name__ == "__main__":
  app.run(main)
