"""Merges on an accelerator: `python -m experiments.bench.merging_gpu`.

Bytes a second of a merge of four models (slerp: two) of four billion bfloat16
parameters into a base that is given away, beside the device's own copy
bandwidth in the same run, round by round. Where JAX sees no accelerator it
says so, and nothing is measured; `--any` measures whatever device there is.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.history_tables import Table
from experiments.bench.merging_methods import WEIGHTS

_PARAMS = flags.DEFINE_string("params", "4G", "numbers of the model")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds that are counted")
_ANY = flags.DEFINE_bool("any", False, "measure a CPU too")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "print a table for a README")

_ROWS, _COLUMNS = 8192, 8192


def methods() -> dict[str, tuple[pj.Transform, int, bool]]:
  """Returns the merges: method, contributors, and whether the base is read."""
  m = pj.merging
  return {
    "linear": (m.linear(weights=WEIGHTS), 4, False),
    "slerp": (m.slerp(t=0.3), 2, False),
    "ties": (m.ties(density=0.2), 4, True),
    "ties, leaf": (m.ties(density=0.2, scope="leaf"), 4, True),
    "dare_linear": (m.dare_linear(density=0.5), 4, True),
  }


def model(params: float, seed: int, around: Any = None) -> Any:
  """Makes a model on the device, of matrices of 64 M numbers or fewer.

  Args:
    params: how many numbers, roughly.
    seed: of the numbers.
    around: the base, for a model tuned from it.
  """
  size = min(_ROWS, max(8, int(params**0.5)))
  count = max(1, round(params / size**2))
  keys = jax.random.split(jax.random.key(seed, impl="rbg"), count)
  if around is None:
    return {f"w{i}": _drawn(key, size) for i, key in enumerate(keys)}
  return {
    name: _near(x, key)
    for (name, x), key in zip(around.items(), keys, strict=True)
  }


def measure(params: float, rounds: int) -> Table:
  """Times all merges and a copy, in turn.

  Args:
    params: how many numbers a model has.
    rounds: how many are counted.
  """
  base = model(params, 0)
  models = [model(params, i + 1, base) for i in range(4)]
  nbytes = sum(x.nbytes for x in base.values())
  spare: list[Any] = [base]

  def merging(method: pj.Transform, count: int) -> Callable[[], Any]:
    def merge() -> Any:
      # The result of one round is the buffer of the next.
      out = pj.merge(spare.pop(), models[:count], method, donate=True)
      spare.append(out)
      return out

    return merge

  def copying() -> Any:
    out = {name: _turned(x) for name, x in spare.pop().items()}
    spare.append(out)
    return out

  ways: dict[str, Callable[[], Any]] = {"copy": copying}
  moved = {"copy": 2 * nbytes}
  for name, (method, count, reads) in methods().items():
    ways[name] = merging(method, count)
    moved[name] = (count + reads + 1) * nbytes
  costs = collections.defaultdict(list)
  for turn in range(rounds + 1):
    for name, way in ways.items():
      cost = timing.cost(way)
      if turn:
        costs[name].append(cost.wall)
  rates = {n: moved[n] / statistics.median(c) for n, c in costs.items()}
  size = sum(x.size for x in models[0].values())
  return Table(
    f"merging {size / 1e9:.2f} G parameters in bfloat16, donated, on "
    f"{jax.devices()[0].device_kind}",
    ("what", "ms", "GB moved", "GB/s", "of the copy's"),
    [
      (
        name,
        timing.milliseconds(tuple(costs[name])),
        f"{moved[name] / 1e9:.2f}",
        f"{rates[name] / 1e9:.1f}",
        f"{rates[name] / rates['copy']:.2f}",
      )
      for name in ways
    ],
  )


def main(argv: list[str]) -> None:
  """Measures, or says that there is nothing to measure."""
  del argv
  platform = jax.devices()[0].platform
  if platform == "cpu" and not _ANY.value:
    print(
      "JAX sees no accelerator here (its devices are CPUs): nothing measured. "
      "Install jax[cuda13] on a machine with a GPU, or pass --any"
    )
    return
  table = measure(workload.count(_PARAMS.value), _ROUNDS.value)
  print(table.text(markdown=_MARKDOWN.value))


def _draw(key, size):
  return 0.02 * jax.random.normal(key, (size, size), jnp.bfloat16)


def _move(x, key):
  return x + 0.1 * x * jax.random.normal(key, x.shape, x.dtype)


_drawn = jax.jit(_draw, static_argnums=1)
_near = jax.jit(_move)
# Reads and writes each byte once; a plain copy of what is given away is none.
_turned = jax.jit(jnp.negative, donate_argnums=0)


if __name__ == "__main__":
  app.run(main)
