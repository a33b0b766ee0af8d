"""How fast a merge is: `python -m experiments.bench.merging`.

A tree of the shapes of a six-layer encoder (22.7 M parameters), four
contributors; beside numpy code that does the same in the obvious way (for TIES
one partition of the concatenated magnitudes, as the paper's code does it) and
the time that the bytes read and written take at this machine's copy bandwidth.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import patchjax as pj
from experiments.bench import timing
from experiments.bench.workload import tree
from patchjax.trees import report

CONTRIBUTORS = flags.DEFINE_integer("contributors", 4, "how many are merged")
ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each way is timed")

DENSITY = 0.2


def numpy_linear(base: Any, models: list[Any]) -> list[np.ndarray]:
  """The mean of the task vectors, added to the base."""
  return [
    leaf + sum(other - leaf for other in others) / np.float32(len(models))
    for leaf, *others in zip(
      jax.tree.leaves(base), *map(jax.tree.leaves, models), strict=True
    )
  ]


def numpy_ties(base: Any, models: list[Any]) -> np.ndarray:
  """TIES on the flattened model, with one partition a contributor."""

  def flat(tree: Any) -> np.ndarray:
    return np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

  start = flat(base)
  deltas = []
  for model in models:
    delta = flat(model) - start
    magnitude = np.abs(delta)
    keep = int(DENSITY * delta.size)
    threshold = np.partition(magnitude, delta.size - keep)[delta.size - keep]
    deltas.append(np.where(magnitude >= threshold, delta, 0))
  stacked = np.stack(deltas)
  total = stacked.sum(0)
  sign = np.sign(total)
  sign[sign == 0] = np.sign(np.sign(total).sum())
  agrees = np.where(sign > 0, stacked > 0, stacked < 0)
  count = np.maximum(agrees.sum(0), 1).astype(np.float32)
  return start + (stacked * agrees).sum(0) / count


def main(argv: list[str]) -> None:
  del argv
  base = tree(0)
  rng = np.random.default_rng(1)
  models = [
    jax.tree.map(
      lambda x: x + 0.01 * rng.standard_normal(x.shape, dtype=np.float32), base
    )
    for _ in range(CONTRIBUTORS.value)
  ]
  size = sum(x.size for x in jax.tree.leaves(base))
  bandwidth = timing.copy_bandwidth()
  limit = 4 * size * (len(models) + 2) / bandwidth
  on_device = functools.partial(jax.tree.map, jnp.array)
  held = [on_device(model) for model in models]
  start = on_device(base)
  rows = []
  for name, method, reference in (
    ("linear", pj.merging.linear(), numpy_linear),
    ("ties", pj.merging.ties(density=DENSITY), numpy_ties),
  ):
    spare: list[Any] = []

    def donated(method=method, spare=spare):
      # The result of the last round is overwritten: no fresh memory.
      out = pj.merge(spare.pop(), held, method, donate=True)
      spare.append(out)
      return out

    spare.append(on_device(base))
    taken = timing.interleaved(
      {
        "patchjax": lambda m=method: pj.merge(start, held, m),
        "patchjax, donated": donated,
        "numpy": lambda f=reference: f(base, models),
      },
      rounds=ROUNDS.value,
    )
    for way, this in taken.items():
      rows.append(
        (
          name,
          way,
          timing.milliseconds(this.wall),
          timing.milliseconds(this.cpu),
          f"{this.ratio(taken['numpy'], 'wall'):.1f}x",
          f"{this.ratio(taken['numpy'], 'cpu'):.1f}x",
          f"{np.median(this.wall) / limit:.1f}",
        )
      )
  columns = [
    "method", "way", "wall ms", "cpu ms", "numpy's wall", "numpy's cpu",
    "of the limit",
  ]  # fmt: skip
  print(
    report.table(
      columns,
      rows,
      title=f"merging {len(models)} models of {size / 1e6:.1f} M parameters "
      f"(limit: the bytes at {bandwidth / 1e9:.1f} GB/s take "
      f"{1e3 * limit:.0f} ms)",
    )
  )


if __name__ == "__main__":
  app.run(main)
