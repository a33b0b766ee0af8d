"""mergekit 0.1.5, as a process and as a command, with its own packages.

mergekit is LGPL and brings PyTorch: it lies in a virtual environment under
the cache folder, and nothing of patchjax imports it.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench import timing
from experiments.bench.peers import installing

# The worker's path without importing it: its packages are not ours.
_WORKER = pathlib.Path(__file__).with_name("mergekit_worker.py")


def install() -> str:
  """Returns the Python that has mergekit, once it is there.

  Raises:
    MissingError: if it is not to be had.
  """
  return installing.python("mergekit", "torch==2.13.0", "mergekit==0.1.5")


class Mergekit:
  """A process that holds models, and merges them in mergekit or in PyTorch.

  Attributes:
    about: version of PyTorch, and how many threads it uses.
  """

  def __init__(self, files: Sequence[pathlib.Path]):
    """Starts it and loads models.

    Args:
      files: safetensors files, the base's first.

    Raises:
      MissingError: if mergekit is not to be had.
    """
    self._process = subprocess.Popen(
      [install(), str(_WORKER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      # Threads that have nothing to do sleep: spinning is no work.
      env={**os.environ, "OMP_WAIT_POLICY": "passive"},
      text=True,
    )
    self.about = self._ask(load=[str(file) for file in files])

  def merge(
    self,
    way: str,
    method: str,
    settings: Mapping[str, Any],
    *,
    base: bool,
    count: int,
    warm: bool = False,
    save: pathlib.Path | None = None,
  ) -> timing.Cost:
    """Merges, and returns what it took.

    Args:
      way: "mergekit" or "torch".
      method: mergekit's name of it.
      settings: mergekit's parameters.
      base: whether the method gets the base.
      count: how many contributors.
      warm: whether to merge but the small leaves, so that all is imported.
      save: a safetensors file for the result, not timed.
    """
    answer = self._ask(
      way=way,
      method=method,
      settings=dict(settings),
      base=base,
      count=count,
      warm=warm,
      save=None if save is None else str(save),
    )
    return timing.Cost(answer["wall"], answer["cpu"])

  def close(self) -> None:
    """Ends the process."""
    with self._process as process:
      if process.stdin is not None:
        process.stdin.close()

  def _ask(self, **command: Any) -> dict[str, Any]:
    process = self._process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
      raise RuntimeError(f"the mergekit process ended: {process.wait()}")
    return json.loads(answer)
