"""Git with Git LFS, and with git-theta: they version a safetensors file.

What is timed are git's own commands; that somebody must write the file before
a commit, and read it after a checkout, comes on top.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

import numpy as np
import safetensors.numpy

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.peers import files, installing
from experiments.bench.peers.base import folder_bytes
from patchjax.patches import Delta, LowRank

SPARSE = "sparse"
"""Start of the names of versions that git-theta is told to store so."""

_FILE = "model.safetensors"


class GitLfs:
  """A git repository that tracks one file with Git LFS.

  Attributes:
    name: `Git LFS`.
  """

  name = "Git LFS"
  _track = ("lfs", "track", _FILE)

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    folder.mkdir(parents=True)
    # A home of its own: neither the user's settings nor changes to them.
    home = folder.with_name(f"{folder.name}-home")
    home.mkdir()
    self._environment = {
      **os.environ,
      "HOME": str(home),
      "XDG_CONFIG_HOME": str(home),
      "TMPDIR": str(home),
      "GIT_CONFIG_NOSYSTEM": "1",
      "GIT_AUTHOR_NAME": "bench",
      "GIT_AUTHOR_EMAIL": "bench@localhost",
      "GIT_COMMITTER_NAME": "bench",
      "GIT_COMMITTER_EMAIL": "bench@localhost",
      **self._variables(),
    }
    self._environment["PATH"] = os.pathsep.join(
      [*self.install(), self._environment["PATH"]]
    )
    self._commits: list[str] = []
    self._git("init", "-q", "-b", "main")
    self._git("lfs", "install", "--local", "--skip-repo")
    self._install()
    self._git(*self._track)
    self._git("add", ".gitattributes")
    self._git("commit", "-q", "-m", "track")

  @classmethod
  def install(cls) -> list[str]:
    """Returns the folders of the executables, once they are there.

    Raises:
      MissingError: if they are not to be had.
    """
    return [installing.git_lfs()]

  def commit(self, version: workload.Version) -> timing.Cost:
    """`git add` and `git commit` of a file that is written before."""
    files.write(self._folder / _FILE, workload.flat(version.value))

    def add() -> None:
      self._add(version)
      self._git("commit", "-q", "-m", version.name)

    taken = timing.cost(add)
    self._commits.append(self._git("rev-parse", "HEAD").strip())
    return taken

  def checkout(self, number: int) -> timing.Cost:
    """`git checkout` of a version into a worktree that has no file."""
    (self._folder / _FILE).unlink(missing_ok=True)
    commit = self._commits[number]
    return timing.cost(
      lambda: self._git("checkout", "-q", "-f", commit, "--", _FILE)
    )

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name."""
    self.checkout(number)
    return safetensors.numpy.load_file(self._folder / _FILE)

  def size(self) -> int:
    """Bytes below .git, without its sample hooks."""
    git = self._folder / ".git"
    return folder_bytes(git) - folder_bytes(git / "hooks")

  def close(self) -> None:
    """There is nothing to end."""

  def _variables(self) -> dict[str, str]:
    return {}

  def _install(self) -> None:
    """Settings of the repository before anything is tracked."""

  def _add(self, version: workload.Version) -> None:
    self._git("add", _FILE)

  def _git(self, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
      ["git", *arguments],
      cwd=self._folder,
      env={**self._environment, **variables},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(
        f"git {' '.join(arguments)}: exit code {done.returncode}:\n"
        + done.stderr[-2000:]
      )
    return done.stdout


class GitTheta(GitLfs):
  """A git repository that tracks the file with git-theta.

  Attributes:
    name: `git-theta`.
  """

  name = "git-theta"
  _track = ("theta", "track", _FILE)

  @classmethod
  def install(cls) -> list[str]:
    """See `GitLfs.install`."""
    python = installing.python(
      "git-theta", "git-theta==0.2.0", "safetensors==0.8.0"
    )
    return [os.path.dirname(python), *super().install()]

  def _variables(self) -> dict[str, str]:
    return {"GIT_THETA_CHECKPOINT_TYPE": "safetensors"}

  def _install(self) -> None:
    self._git("theta", "install")

  def _add(self, version: workload.Version) -> None:
    how = {}
    data = self._folder.with_name(f"{self._folder.name}-update.safetensors")
    if version.patch is not None:
      # Its way for low rank: the factors in a file beside the old checkpoint.
      safetensors.numpy.save_file(_factors(version.patch), data)
      how["GIT_THETA_UPDATE_TYPE"] = "low-rank"
      self._git("checkout", "-q", "-f", "HEAD", "--", _FILE)
    elif version.name.startswith(SPARSE):
      # An empty file: it finds out by itself what has changed.
      safetensors.numpy.save_file({}, data)
      how["GIT_THETA_UPDATE_TYPE"] = "sparse"
    if how:
      how["GIT_THETA_UPDATE_DATA_PATH"] = str(data)
    # Unless the file looks new, git does not ask the filter.
    os.utime(self._folder / _FILE)
    self._git("add", _FILE, **how)


def _factors(patch: pj.Patch) -> dict[str, np.ndarray]:
  """Returns the factors of a patch under git-theta's names."""
  factors = {}
  for name, delta in patch.deltas.items():
    assert isinstance(delta, Delta) and isinstance(delta.code, LowRank)
    factors[f"{name}/R"] = np.asarray(delta.code.a)
    factors[f"{name}/C"] = np.asarray(delta.code.b)
  return factors
