"""Merges of models that do not fit here, compiled for meshes that are not here.

Leaves are abstract (`jax.ShapeDtypeStruct` with a sharding), devices are
simulated by the CPU backend: nothing is allocated, and the compiled program
says what it would send between devices and how much memory it would need.
Leaves of one shape and sharding share a program, as in a merge outside `jit`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import patchjax as pj
from experiments.bench.history_tables import Table

P = jax.sharding.PartitionSpec

_CONTRIBUTORS = 4
_OPERATION = re.compile(
  r"= (\S[^=]*?) (all-reduce|all-gather|all-to-all|reduce-scatter|"
  r"collective-permute|collective-broadcast)(?:-start)?\("
)
_TYPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
_SMALL = 1 << 16  # bytes of a collective: counts and histograms, no parameters


@dataclasses.dataclass(frozen=True)
class Llama:
  """Shapes of a llama-like model.

  Attributes:
    layers: how many.
    width: of the residual stream.
    hidden: of the feed-forward layers.
    keys: of all heads of keys together.
    vocabulary: number of tokens.
  """

  layers: int
  width: int
  hidden: int
  keys: int
  vocabulary: int

  def leaves(self) -> dict[str, tuple[tuple[int, ...], P, int]]:
    """Returns shape, placement and number of each kind of leaf."""
    wide, n = self.width, self.layers
    columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")
    return {
      "embed": ((self.vocabulary, wide), rows, 1),
      "unembed": ((wide, self.vocabulary), columns, 1),
      "query": ((wide, wide), columns, n),
      "key, value": ((wide, self.keys), columns, 2 * n),
      "output": ((wide, wide), rows, n),
      "gate, up": ((wide, self.hidden), columns, 2 * n),
      "down": ((self.hidden, wide), rows, n),
      "norms": ((wide,), P("fsdp"), 2 * n + 1),
    }

  def stacked(self) -> dict[str, tuple[tuple[int, ...], P]]:
    """Returns shape and placement of the leaves of a model that is scanned."""
    out = {}
    for name, (shape, spec, number) in self.leaves().items():
      for part in name.split(", "):
        each = number // len(name.split(", "))
        many = each > 1
        out[part] = ((each, *shape), P(None, *spec)) if many else (shape, spec)
    return out

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(math.prod(s) * n for s, _, n in self.leaves().values())


MODELS = {
  "70b": Llama(80, 8192, 28672, 1024, 128256),
  "405b": Llama(126, 16384, 53248, 1024, 128256),
}
"""By name; the numbers are Llama 3's."""


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled program would do on each device.

  Attributes:
    sent: how many collectives there are, and the bytes of the largest, by
      operation; those in a loop count once.
    arguments: bytes of the arguments.
    temporary: bytes beside arguments and result.
    seconds: to lower and to compile.
  """

  sent: Mapping[str, tuple[int, int]]
  arguments: int
  temporary: int
  seconds: float

  def check(self) -> None:
    """Raises AssertionError if anything but small sums would be sent."""
    for operation, (count, most) in self.sent.items():
      if operation != "all-reduce" or most > _SMALL:
        raise AssertionError(
          f"{count} {operation} of up to {most} bytes: parameters are sent"
        )


def methods() -> dict[str, tuple[pj.Transform, int, bool]]:
  """Returns the merges: method, contributors, whether in one program.

  One program holds the whole tree, where what is counted is counted over it.
  """
  m = pj.merging
  return {
    "linear": (m.linear(weights=[1.0, 2.0, 3.0, 4.0]), _CONTRIBUTORS, False),
    "slerp": (m.slerp(t=0.3), 2, False),
    "dare_linear": (m.dare_linear(density=0.5), _CONTRIBUTORS, False),
    "ties, leaf": (m.ties(density=0.2, scope="leaf"), _CONTRIBUTORS, False),
    "ties, tree": (m.ties(density=0.2), _CONTRIBUTORS, True),
  }


def mesh_of(devices: int) -> jax.sharding.Mesh:
  """Returns a mesh of 8 by what is left, or of fewer.

  Args:
    devices: how many.
  """
  first = math.gcd(8, devices) if devices > 8 else max(1, devices // 2)
  return jax.make_mesh((first, devices // first), ("fsdp", "tensor"))


def abstract(
  shape: Sequence[int], spec: P, mesh: jax.sharding.Mesh, dtype: Any
) -> jax.ShapeDtypeStruct:
  """Returns a leaf that is not there.

  Args:
    shape: global shape.
    spec: where it lies.
    mesh: on which devices.
    dtype: of the numbers.
  """
  place = jax.sharding.NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)


def compiled(tree: Any, method: pj.Transform, count: int) -> Program:
  """Compiles a merge into a base that is given away.

  Args:
    tree: abstract leaves.
    method: the method; its numbers are arguments of the program.
    count: how many contributors.
  """

  def merge(base, contributors, method):
    return pj.merge(base, contributors, method)

  start = time.perf_counter()
  jitted = jax.jit(merge, donate_argnums=0)
  program = jitted.lower(tree, [tree] * count, method).compile()
  seconds = time.perf_counter() - start
  memory = program.memory_analysis()
  assert memory is not None  # no backend that compiles here lacks it
  return Program(
    sent(program.as_text() or ""),
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    seconds,
  )


def sent(text: str) -> dict[str, tuple[int, int]]:
  """Returns how many collectives a program has, and bytes of the largest.

  Args:
    text: the compiled HLO.
  """
  found = collections.defaultdict(list)
  for type_, operation in _OPERATION.findall(text):
    found[operation].append(
      sum(
        _width(name) * math.prod(int(d) for d in dims.split(",") if d)
        for name, dims in _TYPE.findall(type_)
      )
    )
  return {name: (len(sizes), max(sizes)) for name, sizes in found.items()}


def programs(
  model: Llama,
  mesh: jax.sharding.Mesh,
  *,
  dtype: Any = jnp.bfloat16,
  only: Sequence[str] | None = None,
) -> dict[str, list[tuple[int, Program]]]:
  """Compiles all merges of a model.

  Args:
    model: its shapes.
    mesh: the devices.
    dtype: of the parameters.
    only: names of some of the merges.

  Returns:
    by method, each program and how many leaves it serves.

  Raises:
    AssertionError: if one would send parameters.
  """
  out = {}
  for name, (method, count, whole) in methods().items():
    if only is not None and name not in only:
      continue
    if whole:
      tree = {
        leaf: abstract(shape, spec, mesh, dtype)
        for leaf, (shape, spec) in model.stacked().items()
      }
      made = [(len(tree), compiled(tree, method, count))]
    else:
      kinds: dict[Any, int] = collections.Counter()
      for shape, spec, number in model.leaves().values():
        kinds[shape, spec] += number
      made = [
        (
          number,
          compiled({"w": abstract(shape, spec, mesh, dtype)}, method, count),
        )
        for (shape, spec), number in kinds.items()
      ]
    for _, program in made:
      program.check()
    out[name] = made
  return out


def run(name: str, devices: int) -> Table:
  """Compiles in a process of its own, and returns what it found.

  Args:
    name: of the model.
    devices: how many are simulated.
  """
  module = "experiments.bench.merging_aot"
  command = [sys.executable, "-m", module, name, str(devices)]
  flags = f"--xla_force_host_platform_device_count={devices}"
  done = subprocess.run(
    command,
    check=True,
    stdout=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  found = json.loads(done.stdout.splitlines()[-1])
  return Table(
    f"merging {_CONTRIBUTORS} models (slerp: 2) of {found['size'] / 1e9:.1f} G "
    f"parameters in bfloat16 on {devices} simulated devices ({found['mesh']}), "
    f"compiled only; host RSS {found['rss'] / 1e9:.2f} GB",
    (
      "method",
      "programs",
      "leaves",
      "collectives in all programs",
      "largest, bytes",
      "arguments / device, GB",
      "temporary / device, KB",
      "seconds",
    ),
    found["rows"],
  )


def main(arguments: Sequence[str]) -> None:
  """Compiles, and prints what was found as JSON.

  Args:
    arguments: name of the model, and number of devices.
  """
  name, devices = arguments[0], int(arguments[1])
  model, mesh = MODELS[name], mesh_of(devices)
  rows = [_row(method, made) for method, made in programs(model, mesh).items()]
  found = {
    "rows": rows,
    "size": model.size,
    "mesh": " x ".join(f"{k} {v}" for k, v in mesh.shape.items()),
    "rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  print(json.dumps(found))


def _row(method: str, made: list[tuple[int, Program]]) -> list[str]:
  counts = collections.Counter()
  for _, program in made:
    counts.update({op: count for op, (count, _) in program.sent.items()})
  largest = [most for _, p in made for _, most in p.sent.values()]
  # Whole trees are one program; else all leaves are held at once.
  whole = len(made) == 1
  arguments = sum((1 if whole else n) * p.arguments for n, p in made)
  return [
    method,
    str(len(made)),
    str(sum(n for n, _ in made)),
    ", ".join(f"{n} {op}" for op, n in counts.items()) or "none",
    str(max(largest, default=0)),
    f"{arguments / 1e9:.2f}",
    f"{max(p.temporary for _, p in made) / 1e3:.1f}",
    f"{sum(p.seconds for _, p in made):.1f}",
  ]


def _width(name: str) -> int:
  """Bytes of a number of an HLO type, such as `s32`, `bf16` or `pred`."""
  return max(1, int(re.sub(r"\D", "", name) or 8) // 8)


if __name__ == "__main__":
  main(sys.argv[1:])
