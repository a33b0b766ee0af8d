"""Other people's tools, each in a place of its own, never in ours.

Python packages go into a virtual environment a tool, under the cache folder;
git-lfs is taken from the path, or unpacked from Debian's package beside them.
What cannot be had says what was tried.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence

from patchjax.demo.data import cache_dir


class MissingError(Exception):
  """A tool that is not here and could not be installed."""


def folder() -> pathlib.Path:
  """Returns where tools are installed."""
  return cache_dir() / "bench"


@functools.cache
def python(name: str, *requirements: str) -> str:
  """Returns the Python of a virtual environment that has some packages.

  Args:
    name: of the environment.
    *requirements: what pip installs, pinned.

  Raises:
    MissingError: if pip cannot.
  """
  place = folder() / name
  wanted = "\n".join(requirements) + "\n"
  done = place / "installed.txt"
  executable = place / "bin" / "python"
  if done.is_file() and done.read_text() == wanted:
    return str(executable)
  shutil.rmtree(place, ignore_errors=True)
  _run([sys.executable, "-m", "venv", str(place)])
  pip = [str(executable), "-m", "pip", "install", "-q", "--no-input"]
  _run([*pip, *requirements])
  done.write_text(wanted)
  return str(executable)


@functools.cache
def git_lfs() -> str:
  """Returns the folder that git-lfs lies in.

  Raises:
    MissingError: if there is none.
  """
  found = shutil.which("git-lfs")
  if found is not None:
    return os.path.dirname(found)
  place = folder() / "git-lfs"
  binary = place / "usr" / "bin" / "git-lfs"
  if not binary.is_file():
    work = folder() / f"git-lfs-{uuid.uuid4().hex}"
    work.mkdir(parents=True)
    try:
      _run(["apt-get", "download", "-q", "git-lfs"], cwd=work)
      (package,) = work.glob("git-lfs_*.deb")
      _run(["dpkg-deb", "-x", str(package), str(work / "unpacked")])
      shutil.rmtree(place, ignore_errors=True)
      (work / "unpacked").rename(place)
    finally:
      shutil.rmtree(work, ignore_errors=True)
  return str(binary.parent)


def _run(command: Sequence[str], cwd: pathlib.Path | None = None) -> None:
  """Runs a command.

  Raises:
    MissingError: if it fails; says how.
  """
  spelled = " ".join(command)
  try:
    done = subprocess.run(
      command, cwd=cwd, capture_output=True, text=True, check=False
    )
  except OSError as error:
    raise MissingError(f"tried `{spelled}`: {error}") from error
  if done.returncode:
    said = "; ".join(done.stderr.strip().splitlines()[-2:])
    raise MissingError(
      f"tried `{spelled}`: exit code {done.returncode}: {said}"
    )
