"""What a merge costs: `python -m experiments.bench.merging`.

Four models of 50 million parameters are merged in patchjax, in mergekit 0.1.5
and in plain PyTorch, beside the time that the bytes take; then files of 151
million parameters by both command lines. The ways take turns within one
run; ratios are those of their medians.

`--aot 70b --devices 256` instead compiles merges of a model of that size for
that many devices, and prints what they would send and need; a GPU is measured
by `python -m experiments.bench.merging_gpu`.

mergekit is installed beside, in the cache folder; what cannot be had is said.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from experiments.bench import merging_aot, merging_core, merging_files, workload
from experiments.bench.history_tables import Section, Target, targets_table
from experiments.bench.merging_core import Settings
from experiments.bench.merging_methods import BY_NAME, MAIN

_SECTIONS: dict[str, Callable[[Settings], Section]] = {
  "float32": lambda settings: merging_core.run(settings, "float32"),
  "bfloat16": lambda settings: merging_core.run(settings, "bfloat16"),
  "files": merging_files.run,
}

_AOT = flags.DEFINE_enum(
  "aot", None, list(merging_aot.MODELS), "compile for a model of this size"
)
_DEVICES = flags.DEFINE_integer("devices", 256, "simulated, with --aot")
_METHODS = flags.DEFINE_list(
  "methods", list(MAIN), f"of {', '.join(BY_NAME)}; or all"
)
_PARAMS = flags.DEFINE_string("params", "50M", "numbers of the model")
_ONLY = flags.DEFINE_list(
  "only", list(_SECTIONS), f"sections of {', '.join(_SECTIONS)}"
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "rounds that are counted")
_INSTALL = flags.DEFINE_bool("install", True, "install mergekit if need be")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "print tables for a README")
_FILE_PARAMS = flags.DEFINE_string(
  "file_params", "151M", "numbers of the models in files"
)


def sections(settings: Settings, names: list[str], *, markdown: bool) -> None:
  """Runs sections and prints what they found.

  Args:
    settings: how.
    names: of the sections.
    markdown: whether tables are for a README.
  """
  targets: list[Target] = []
  for name in names:
    start = time.perf_counter()
    section = _SECTIONS[name](settings)
    targets += section.targets
    for table in section.tables:
      print(table.text(markdown=markdown), end="\n\n")
    for remark in section.remarks:
      print(remark, end="\n\n")
    print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)
  if targets:
    print(targets_table(targets).text(markdown=markdown))


def main(argv: list[str]) -> None:
  """Runs what the flags say."""
  del argv
  if _AOT.value is not None:
    table = merging_aot.run(_AOT.value, _DEVICES.value)
    print(table.text(markdown=_MARKDOWN.value))
    return
  methods = list(BY_NAME) if _METHODS.value == ["all"] else _METHODS.value
  for what, found, there in (
    ("methods", methods, BY_NAME),
    ("only", _ONLY.value, _SECTIONS),
  ):
    if unknown := set(found) - set(there):
      raise app.UsageError(
        f"--{what}: no {', '.join(sorted(unknown))}; there are "
        + ", ".join(there)
      )
  with tempfile.TemporaryDirectory(prefix="patchjax-bench-") as folder:
    settings = Settings(
      params=workload.count(_PARAMS.value),
      repeats=_REPEATS.value,
      install=_INSTALL.value,
      folder=pathlib.Path(folder),
      methods=methods,
      file_params=workload.count(_FILE_PARAMS.value),
    )
    sections(settings, _ONLY.value, markdown=_MARKDOWN.value)


if __name__ == "__main__":
  app.run(main)
