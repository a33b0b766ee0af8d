"""Many processes that commit to one branch at once.

Each takes its own leaf from step to step with `commit(retry=True)`. All the
commits must be in the history, each exactly once, each value that of its step.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.faults_children import Child, call
from patchjax.history import Repo

_TIMEOUT = 600.0


def leaf(writer: int, step: int) -> np.ndarray:
  """Returns what a writer's leaf holds at a step."""
  rng = np.random.default_rng([writer, step])
  return rng.standard_normal(1000).astype(np.float32)


def run(path: str, writers: int, commits: int) -> tuple[str, list[str]]:
  """Lets them write, and checks what is there afterwards.

  Args:
    path: folder of a new repository.
    writers: how many processes.
    commits: how many commits each makes.

  Returns:
    `(a line of counts, failures)`.
  """
  call(lambda: _create(path, writers))
  children = [
    Child(lambda say, w=writer: _write(path, w, commits, say))
    for writer in range(writers)
  ]
  failures = []
  said: list[str] = []
  for writer, child in enumerate(children):
    status = child.wait(_TIMEOUT)
    if status != 0:
      failures.append(f"writer {writer}: {child.trouble or status}")
    said += [word for word in child.said if isinstance(word, str)]
  found = call(lambda: _check(path, writers, commits, said), timeout=_TIMEOUT)
  return found["line"], failures + found["failures"]


def _create(path: str, writers: int) -> None:
  Repo.init(path).commit(_start(writers), message="start")


def _start(writers: int) -> dict[str, np.ndarray]:
  return {f"w{writer}": leaf(writer, 0) for writer in range(writers)}


def _write(
  path: str, writer: int, commits: int, say: Callable[[str], None]
) -> None:
  repo = Repo(path)
  value = _start(len(repo.tree()))
  for step in range(1, commits + 1):
    tip = repo.resolve("main")
    value = repo.checkout(tip, like=value)
    value[f"w{writer}"] = leaf(writer, step)
    message = f"{writer} {step}"
    say(repo.commit(value, message=message, parents=[tip], retry=True))


def _check(
  path: str, writers: int, commits: int, said: list[str]
) -> dict[str, Any]:
  repo = Repo(path)
  history = repo.log("main")[:-1]
  failures = []
  times = collections.Counter(commit.message for commit in history)
  wanted = {f"{w} {s}" for w in range(writers) for s in range(1, commits + 1)}
  if set(times) != wanted or set(times.values()) - {1}:
    failures.append(f"messages: {times}")
  if sorted(said) != sorted(commit.id for commit in history):
    failures.append("the ids that were answered are not those of the history")
  steps = dict.fromkeys(range(writers), 0)
  for commit in reversed(history):  # oldest first
    writer, step = map(int, commit.message.split())
    if step != steps[writer] + 1:
      failures.append(f"{commit.message!r} follows step {steps[writer]}")
    steps[writer] = step
    repo.objects.read(commit.id)  # verifies it
    found = repo.checkout(commit.id, like=_start(writers))
    for other, at in steps.items():
      if not np.array_equal(found[f"w{other}"], leaf(other, at)):
        failures.append(f"{commit.message!r}: leaf w{other} has other bits")
  report = repo.fsck()
  failures += [] if report.ok else [str(report)]
  line = (
    f"{writers} writers, {commits} commits each: {len(history)} commits in the "
    f"history, {len(wanted - set(times))} lost, ids verified"
  )
  return {"line": line, "failures": failures}
