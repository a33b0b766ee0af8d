"""patchjax as a command: files in, files out, one process a step."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import safetensors.numpy

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.peers import files
from experiments.bench.peers.base import folder_bytes


class Command:
  """A repository that is used as git is.

  Attributes:
    name: `patchjax, command`.
  """

  name = "patchjax, command"

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._file = folder.with_name(f"{folder.name}-file.safetensors")
    pj.Repo.init(folder)
    self._commits: list[str] = []
    self._before: workload.Tree = {}

  def commit(self, version: workload.Version) -> timing.Cost:
    """`patchjax commit` of a file that is written before."""
    if version.patch is None:
      files.write(self._file, workload.flat(version.value))
    else:
      self._file.unlink(missing_ok=True)
      version.patch.save(self._file, base=self._before)
    self._before = version.value
    taken = timing.cost(
      lambda: self._run("commit", str(self._file), "-m", version.name)
    )
    self._commits.append(pj.Repo(self._folder).resolve("main"))
    return taken

  def checkout(self, number: int) -> timing.Cost:
    """`patchjax checkout` of a version into a file."""
    self._file.unlink(missing_ok=True)
    return timing.cost(
      lambda: self._run(
        "checkout", self._commits[number], "-o", str(self._file)
      )
    )

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name."""
    self.checkout(number)
    return safetensors.numpy.load_file(self._file)

  def size(self) -> int:
    """Bytes of the repository, without its cache."""
    cache = folder_bytes(self._folder / "cache")
    return folder_bytes(self._folder) - cache

  def close(self) -> None:
    """There is nothing to end."""

  def _run(self, *arguments: str) -> None:
    subprocess.run(
      [
        sys.executable,
        "-m",
        "patchjax.cli",
        "-C",
        str(self._folder),
        *arguments,
      ],
      check=True,
      stdout=subprocess.DEVNULL,
    )
