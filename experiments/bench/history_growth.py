"""Growth with history: what must stay flat from 10 to 1,000 commits.

Every commit changes two leaves of 63, so that chains of differences grow, are
cut, and grow again.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.history_tables import Section, Table, Target
from experiments.bench.history_versions import Settings

_LENGTHS = (10, 100, 1000)


def run(settings: Settings) -> Section:
  """Returns what verbs cost at 10, 100 and 1,000 commits.

  Args:
    settings: with fewer than a million parameters, the lengths are a tenth.
  """
  lengths = [n if settings.params >= 1e6 else n // 10 for n in _LENGTHS]
  rounds = 2 * settings.repeats
  repo = pj.Repo.init(settings.folder / "repo")
  rng = np.random.default_rng(0)
  value = jax.tree.map(jnp.array, workload.decoder(1e5))
  made = 0

  def commit() -> None:
    nonlocal value, made
    embed = workload.relative(
      np.asarray(value["embed"]["positions"]), 1e-3, rng
    )
    value = value | {
      "embed": value["embed"] | {"positions": jnp.array(embed)},
      "norm": value["norm"] + np.float32(1e-3),
    }
    repo.commit(value, message=f"step {made}")
    made += 1

  jobs: dict[str, Callable[[], Any]] = {
    "commit": commit,
    "checkout of the tip": lambda: repo.checkout(like=value),
    "log of 10, opened anew": lambda: _log(settings),
    "log of 10, as a command": lambda: _command(settings),
  }
  found: dict[str, list[float]] = {job: [] for job in jobs}
  for length in lengths:
    while made < length - rounds:
      commit()
    taken = timing.interleaved(jobs, rounds=rounds)
    for job, this in taken.items():
      found[job].append(statistics.median(this.cpu))
  rows = [
    (job, *(f"{1e3 * x:.1f}" for x in times), f"{times[-1] / times[0]:.2f}x")
    for job, times in found.items()
  ]
  columns = ["CPU ms", *(f"{n:,} commits" for n in lengths), "last / first"]
  return Section(
    [Table("growth with history, 63 leaves", columns, rows)],
    [
      Target.at_most(
        f"growth of {job}, {lengths[0]} to {lengths[-1]:,} commits",
        times[-1] / times[0],
        1.5,
        "x",
      )
      for job, times in found.items()
    ],
  )


def _log(settings: Settings) -> None:
  pj.Repo(settings.folder / "repo").log(limit=10)


def _command(settings: Settings) -> None:
  place = str(settings.folder / "repo")
  subprocess.run(
    [sys.executable, "-m", "patchjax.cli", "-C", place, "log", "-n", "10"],
    check=True,
    stdout=subprocess.DEVNULL,
  )
