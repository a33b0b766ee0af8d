"""What a repository costs: `python -m experiments.bench.history`.

One float32 tree of 90 MB, committed, fine-tuned, sparsely changed and checked
out, beside plain Orbax saves and loads of the same values. Bytes are what the
folder grew by.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from orbax.checkpoint import v1 as ocp

import patchjax as pj
from experiments.bench import timing
from experiments.bench.workload import tree
from patchjax.trees import report

ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each way is timed")


def folder_bytes(path: pathlib.Path) -> int:
  """Bytes of all files below a folder."""
  return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def versions() -> dict[str, Any]:
  """The values that are committed one after the other."""
  rng = np.random.default_rng(0)
  first = tree(0)

  def relative(x: np.ndarray) -> np.ndarray:
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return x * (1 + np.float32(1e-3) * noise)

  def sparse(x: np.ndarray) -> np.ndarray:
    return np.where(rng.random(x.shape) < 0.005, relative(x), x)

  tuned = jax.tree.map(relative, first)
  one = tuned | {"embed": relative(tuned["embed"])}
  return {
    "first": first,
    "all leaves, relative 1e-3": tuned,
    "one leaf of half the bytes": one,
    "0.5 % of the entries": jax.tree.map(sparse, one),
  }


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax reports every save
  values = {
    name: jax.tree.map(jnp.array, value) for name, value in versions().items()
  }
  rounds = ROUNDS.value
  with tempfile.TemporaryDirectory() as root:
    repos: list[pj.Repo] = []
    sizes: dict[str, list[int]] = {name: [] for name in values}
    plain: list[pathlib.Path] = []

    def commit(name: str) -> Callable[[], Any]:
      def run() -> None:
        if name == "first":
          folder = pathlib.Path(root, f"repo{len(repos)}")
          repos.append(pj.Repo.init(folder))
        # Fresh objects: nothing is known of arrays that were never committed.
        value = jax.tree.map(jnp.copy, values[name])
        repos[-1].commit(value, message=name)
        sizes[name].append(folder_bytes(pathlib.Path(repos[-1].files.root)))

      return run

    def save(name: str) -> Callable[[], Any]:
      def run() -> None:
        plain.append(pathlib.Path(root, f"plain{len(plain)}"))
        value = jax.tree.map(jnp.copy, values[name])
        ocp.save(plain[-1], value)

      return run

    jobs: dict[str, Callable[[], Any]] = {}
    for name in values:
      jobs[f"commit: {name}"] = commit(name)
      jobs[f"save: {name}"] = save(name)
    jobs["commit: nothing changed"] = lambda: repos[-1].commit(
      values["0.5 % of the entries"], message="again"
    )

    def tiny() -> None:
      repos[-1].branch(f"tiny{len(plain)}")
      for step in range(50):
        repos[-1].commit(
          {"step": np.int32(step)}, message="tiny", branch=f"tiny{len(plain)}"
        )

    jobs["50 tiny commits"] = tiny
    like = values["first"]
    jobs["checkout: first"] = lambda: repos[-1].checkout("main~4", like=like)
    jobs["checkout: last"] = lambda: repos[-1].checkout("main", like=like)
    jobs["load"] = lambda: ocp.load(plain[-1], like)
    jobs["fsck"] = lambda: repos[-1].fsck()
    taken = timing.interleaved(jobs, rounds=rounds)
    saved = folder_bytes(plain[-1])
  rows = []
  before = 0
  for job, this in taken.items():
    kind, _, name = job.partition(": ")
    peer = {"commit": f"save: {name}", "checkout": "load"}.get(kind)
    size = ""
    if kind == "commit" and name in sizes:
      size = f"{(sizes[name][-1] - before) / 1e6:.1f}"
      before = sizes[name][-1]
    elif kind == "save":
      size = f"{saved / 1e6:.1f}"
    ratio = ""
    if peer in taken:
      ratio = f"{1 / this.ratio(taken[peer]):.2f}x"
    rows.append(
      (
        job,
        timing.milliseconds(this.wall),
        timing.milliseconds(this.cpu),
        ratio,
        size,
      )
    )
  size = sum(x.nbytes for x in jax.tree.leaves(like)) / 1e6
  print(
    report.table(
      ["job", "wall ms", "cpu ms", "cpu, of plain Orbax", "MB"],
      rows,
      title=f"a tree of {size:.0f} MB in float32, medians of {rounds}",
    )
  )


if __name__ == "__main__":
  app.run(main)
