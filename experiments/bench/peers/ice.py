"""Icechunk: transactions on Zarr, as a process with its own packages."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import numpy as np

from experiments.bench import timing, workload
from experiments.bench.peers import files, installing
from experiments.bench.peers.base import folder_bytes

# The worker's path without importing it: its packages are not ours.
_WORKER = pathlib.Path(__file__).with_name("icechunk_worker.py")


class Icechunk:
  """An Icechunk repository; bfloat16, which Zarr lacks, is held as uint16.

  Attributes:
    name: `Icechunk`.
  """

  name = "Icechunk"

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._file = folder.with_name(f"{folder.name}-value.safetensors")
    self._commits: list[str] = []
    self._process = subprocess.Popen(
      [self.install(), str(_WORKER), str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, "ICECHUNK_LOG": "error"},
      text=True,
    )

  @classmethod
  def install(cls) -> str:
    """Returns the Python that has Icechunk, once it is there.

    Raises:
      MissingError: if it is not to be had.
    """
    return installing.python(
      "icechunk", "icechunk==1.1.21", "zarr==3.1.6", "safetensors==0.8.0"
    )

  def commit(self, version: workload.Version) -> timing.Cost:
    """Writes every array and commits; the arrays are read beforehand."""
    words = {
      name: x.view(np.uint16) if x.dtype.name == "bfloat16" else x
      for name, x in workload.flat(version.value).items()
    }
    files.write(self._file, words)
    answer = self._ask(file=str(self._file), message=version.name)
    self._commits.append(answer["commit"])
    return timing.Cost(answer["wall"], answer["cpu"])

  def checkout(self, number: int) -> timing.Cost:
    """Reads every array of a version into host memory."""
    answer = self._ask(commit=self._commits[number])
    return timing.Cost(answer["wall"], answer["cpu"])

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name, bfloat16 as words."""
    saved = str(self._file.with_suffix(".npz"))
    self._ask(commit=self._commits[number], save=saved)
    with np.load(saved) as found:
      return dict(found)

  def size(self) -> int:
    """Bytes of the repository."""
    return folder_bytes(self._folder)

  def close(self) -> None:
    """Ends the process."""
    with self._process as process:
      if process.stdin is not None:
        process.stdin.close()

  def _ask(self, **command: str) -> dict[str, Any]:
    process = self._process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
      raise RuntimeError(f"the Icechunk process ended: {process.wait()}")
    return json.loads(answer)
