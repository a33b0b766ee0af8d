"""Checkpoints of a training loop: `python -m experiments.bench.checkpoints`.

The state of an adam run of `--params` numbers is saved at each of `--steps`
steps, keeping the last three and every tenth: by patchjax's `Checkpointer`
and by Orbax's `CheckpointManager`, each waiting for the disk, and each in the
background. What the steps themselves cost is measured without saving, and
taken off. With `--frozen` the embeddings are not trained.
"""

from __future__ import annotations

import functools
import logging as std_logging
import pathlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from experiments.bench import timing, workload
from patchjax.history import Checkpointer, Repo

_PARAMS = flags.DEFINE_float("params", 10e6, "numbers of the model")
_STEPS = flags.DEFINE_integer("steps", 20, "steps, each of them saved")
_FROZEN = flags.DEFINE_bool("frozen", False, "leave the embeddings as they are")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds that are counted")

_LAST, _EVERY = 3, 10

State = dict[str, Any]
Save = Callable[[int, State], Any]


def main(argv: list[str]) -> None:
  """Runs the rounds and prints the table."""
  del argv
  std_logging.disable(std_logging.WARNING)
  warnings.simplefilter("ignore")
  initial, step = training()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="checkpoints-"))
  ways = {
    "steps alone": lambda path: run(initial, step, lambda number, state: None),
    "Orbax": lambda path: orbax(path, initial, step, background=False),
    "Orbax, background": lambda path: orbax(
      path, initial, step, background=True
    ),
    "patchjax": lambda path: ours(path, initial, step, background=False),
    "patchjax, background": lambda path: ours(
      path, initial, step, background=True
    ),
  }
  costs: dict[str, list[timing.Cost]] = {name: [] for name in ways}
  blocked: dict[str, list[float]] = {name: [] for name in ways}
  restored: dict[str, list[float]] = {name: [] for name in ways}
  sizes = dict.fromkeys(ways, 0)
  try:
    for counted in range(_ROUNDS.value + 1):
      for name, way in ways.items():
        path = folder / "run"
        found: list[Any] = []
        taken = timing.cost(functools.partial(_collect, found, way, path))
        if counted:
          costs[name].append(taken)
          blocked[name].append(found[0])
          restored[name].append(found[1])
        sizes[name] = sum(
          f.stat().st_size for f in path.rglob("*") if f.is_file()
        )
        shutil.rmtree(path, ignore_errors=True)
  finally:
    shutil.rmtree(folder)
  bytes_ = sum(x.nbytes for x in jax.tree.leaves(initial))
  print(f"state of {bytes_ / 1e6:.0f} MB, {_STEPS.value} steps")
  print(f"{'':22}{'wall s':>8}{'CPU s':>8}{'loop waits s':>14}", end="")
  print(f"{'restore s':>11}{'MB on disk':>12}")
  base = timing.joined(costs["steps alone"])
  for name in ways:
    total = timing.joined(costs[name])
    wall = middle(a - b for a, b in zip(total.wall, base.wall))
    cpu = middle(a - b for a, b in zip(total.cpu, base.cpu))
    if name != "steps alone":
      print(
        f"{name:22}{wall:8.2f}{cpu:8.2f}{middle(blocked[name]):14.2f}"
        f"{middle(restored[name]):11.2f}{sizes[name] / 1e6:12.0f}"
      )


def _collect(found: list[Any], way: Any, path: pathlib.Path) -> None:
  found.extend(way(path))


def middle(numbers: Any) -> float:
  """Returns the median."""
  numbers = sorted(numbers)
  return numbers[len(numbers) // 2]


def training() -> tuple[State, Callable[[State], State]]:
  """Returns the state of a run that has not begun, and one step of it."""
  params = jax.tree.map(jnp.asarray, workload.decoder(_PARAMS.value))
  frozen = {"embed": params.pop("embed")} if _FROZEN.value else {}
  optimizer = optax.adam(1e-3)

  @jax.jit
  def update(trained: Any, opt: Any, key: Any) -> Any:
    key, now = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(trained)
    keys = jax.random.split(now, len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    updates, opt = optimizer.update(jax.tree.unflatten(treedef, noise), opt)
    return optax.apply_updates(trained, updates), opt, key

  def step(state: State) -> State:
    trained, opt, key = update(state["trained"], state["opt"], state["key"])
    return {**state, "trained": trained, "opt": opt, "key": key}

  state = {
    "trained": params,
    "frozen": frozen,
    "opt": optimizer.init(params),
    "key": jax.random.key(0),
  }
  return state, step


def run(state: State, step: Callable[[State], State], save: Save) -> Any:
  """Trains, saving every step; returns how long the loop waited, and 0."""
  waited = 0.0
  for number in range(1, _STEPS.value + 1):
    state = jax.block_until_ready(step(state))
    start = time.perf_counter()
    save(number, state)
    waited += time.perf_counter() - start
  return waited, 0.0


def ours(path: pathlib.Path, state: State, step: Any, background: bool) -> Any:
  """The run with patchjax; see `run`; and how long the restore took."""
  saver = Checkpointer(
    Repo.init(path),
    keep_last=_LAST,
    keep_every=_EVERY,
    asynchronous=background,
    grace=0,
  )
  waited, _ = run(state, step, saver.save)
  saver.close()
  saver = Checkpointer(Repo(path), keep_last=_LAST, keep_every=_EVERY)
  assert len(saver.all_steps) == len(kept())
  return waited, timing.cost(lambda: saver.restore(state)).wall


def orbax(path: pathlib.Path, state: State, step: Any, background: bool) -> Any:
  """The run with Orbax; see `ours`."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    max_to_keep=_LAST, keep_period=_EVERY, enable_async_checkpointing=background
  )

  def save(number: int, state: State) -> None:
    manager.save(number, args=ocp.args.StandardSave(state))

  with ocp.CheckpointManager(path, options=options) as manager:
    waited, _ = run(state, step, save)
  with ocp.CheckpointManager(path, options=options) as manager:
    assert len(manager.all_steps()) == len(kept())
    arguments = ocp.args.StandardRestore(state)
    latest = manager.latest_step()
    return waited, timing.cost(
      lambda: manager.restore(latest, args=arguments)
    ).wall


def kept() -> set[int]:
  """The steps that are there at the end."""
  steps = range(1, _STEPS.value + 1)
  return {*steps[-_LAST:], *(n for n in steps if n % _EVERY == 0)}


if __name__ == "__main__":
  app.run(main)
