"""Listing a history is fast: no jax, and under half a CPU second."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from patchjax.history import Repo

HEAVY = ("jax", "jaxlib", "numpy", "orbax", "tensorstore", "scipy", "rich")
LIGHT = [
  ["--help"],
  ["--version"],
  ["log"],
  ["log", "--oneline", "-n", "3"],
  ["log", "--json"],
  ["branch"],
  ["tag"],
  ["init", "."],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("light") / "repo"
  repo = Repo.init(path)
  for i in range(20):
    repo.commit({"w": np.full(4, i, np.int32)}, message=f"step {i}")
  repo.tag("v1")
  return path


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_verbs_import_no_array_library(folder, arguments):
  command = [sys.executable, "-X", "importtime", "-m", "patchjax.cli"]
  done = subprocess.run(
    [*command, "-C", str(folder), *arguments], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  imported = {
    line.rsplit("|", 1)[1].strip().split(".")[0]
    for line in done.stderr.splitlines()
    if line.startswith("import time:")
  }
  assert {"click", "patchjax"} <= imported
  assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["log"], ["branch"]])
def test_light_verbs_start_in_half_a_cpu_second(folder, arguments):
  command = [sys.executable, "-m", "patchjax.cli", "-C", str(folder)]
  best = min(cpu_seconds([*command, *arguments]) for _ in range(3))
  assert best < 0.5


def cpu_seconds(command):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  user = after.ru_utime - before.ru_utime
  return user + after.ru_stime - before.ru_stime
