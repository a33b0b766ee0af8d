"""kill -9: before every storage operation of each verb, and at random moments.

In the first hunt one process works alone, and is killed before its n-th
operation, for every n. In the second two writers commit to the branch that the
verb works on, and the kill comes at a random moment of it; every other time it
takes a writer along. After each kill the whole repository is checked; see
`faults_world.aftermath`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from experiments.bench import faults_operations as operations
from experiments.bench import faults_world as world
from experiments.bench.faults_children import Child, call
from patchjax.history import Repo
from patchjax.trees import report

_TIMEOUT = 120.0
_AT_ONCE = max(1, (os.cpu_count() or 1))
_AIMS = 9  # how often an operation that was missed is aimed at again
_MOMENT = "random moment"
_ENOUGH = 5  # kills a verb from which on each of them must be met


@dataclasses.dataclass
class Tally:
  """What came of some kills.

  Attributes:
    kills: how many, by verb and step.
    checked: how many repositories were checked afterwards, and were sound.
    failures: what was not sound.
  """

  kills: dict[str, collections.Counter[str]]
  checked: int
  failures: list[str]

  @property
  def ok(self) -> bool:
    """Whether all was sound, and no step was left out."""
    counts = [n for steps in self.kills.values() for n in steps.values()]
    return not self.failures and all(counts) and bool(counts)


def every_operation(
  template: str, folder: str, verbs: Iterable[str], stride: int = 1
) -> Tally:
  """Kills each verb before each of its storage operations.

  Args:
    template: a history of `world.build`.
    folder: where to work.
    verbs: names of `world.VERBS`.
    stride: 1 for every operation, more for every n-th.
  """
  tally = Tally({}, 0, [])
  for verb in verbs:
    path = os.path.join(folder, "list")
    world.copy(template, path)
    listing = os.path.join(folder, "operations")
    call(functools.partial(_run, path, verb, listing=listing))
    steps = operations.steps(listing)
    chosen = _distinct(steps)[::stride]
    # None may be left out, unless it was asked to leave some out.
    tally.kills[verb] = collections.Counter(
      dict.fromkeys(steps, 0) if stride == 1 else {}
    )
    print(f"{verb}: {len(chosen)} kills", file=sys.stderr, flush=True)
    aims = [(number, "") for number in chosen]
    _kill_before(aims, template, folder, verb, tally)
    # Threads take turns as they like, so that an operation is now the n-th,
    # now the one after: what was missed is aimed at by what it is.
    for number in range(_AIMS):
      missed = [step for step, n in tally.kills[verb].items() if not n]
      aims = [(number, step) for step in missed]
      _kill_before(aims, template, folder, verb, tally)
  return tally


def _distinct(steps: list[str]) -> list[int]:
  """Returns the operations to kill before.

  The cache is opened for every search in it, which changes nothing on the
  disk: of a row of such openings the first two stand for all.
  """
  idle = {"mkdir cache", "open cache"}
  return [
    number
    for number in range(len(steps))
    if not idle.issuperset(steps[max(number - 2, 0) : number + 1]) or number < 2
  ]


def _kill_before(
  aims: Iterable[tuple[int, str]],
  template: str,
  folder: str,
  verb: str,
  tally: Tally,
) -> None:
  """Kills a verb before its n-th operation (of a kind), and checks it."""
  waiting = iter(aims)
  # Some wait for the disk while others compute.
  while batch := list(itertools.islice(waiting, _AT_ONCE)):
    children = []
    for i, (number, step) in enumerate(batch):
      path = world.copy(template, os.path.join(folder, f"step{i}"))
      listing = os.path.join(folder, f"operations{i}")
      aim = {"limit": number, "step": step, "listing": listing}
      run = functools.partial(_run, path, verb, **aim)
      children.append((path, listing, Child(lambda say, run=run: run())))
    after = []
    for path, listing, child in children:
      status = child.wait(_TIMEOUT)
      last = operations.killed(listing)
      os.unlink(listing)
      if status == -signal.SIGKILL:
        tally.kills[verb][last] += 1
      elif status != 0:  # 0: it had fewer operations than the last time
        tally.failures.append(f"{verb}: {child.trouble or status}")
      after.append((f"{verb}, before {last}", path, verb))
    _check(after, tally)


def _run(path: str, verb: str, **aim: Any) -> None:
  repo = Repo(path)
  operations.arm(os.path.dirname(path), **aim)
  world.VERBS[verb](repo)


def _check(places: Iterable[tuple[str, str, str]], tally: Tally) -> None:
  """Checks repositories after an accident, side by side."""
  children = []
  for what, path, verb in places:
    child = Child(lambda say, at=(path, verb): say(world.aftermath(*at)))
    children.append((what, path, child))
  for what, path, child in children:
    status = child.wait(_TIMEOUT)
    if status == 0 and child.said == [[]]:
      tally.checked += 1
    else:
      said = child.trouble or child.said or f"ended with {status}"
      tally.failures.append(f"{what}: {said}")
    for place in (path, world.remote_of(path)):
      shutil.rmtree(place, ignore_errors=True)


def random_moments(
  template: str, folder: str, verbs: Iterable[str], kills: int, seed: int
) -> Tally:
  """Kills verbs at random moments while two writers are at work.

  Args:
    template: a history of `world.build`.
    folder: where to work.
    verbs: names of `world.VERBS`, taken in turn.
    kills: how many.
    seed: of the moments.
  """
  rng = random.Random(seed)
  names = list(verbs)
  tally = Tally({verb: collections.Counter() for verb in names}, 0, [])
  if kills >= _ENOUGH * len(names):
    for counts in tally.kills.values():
      counts[_MOMENT] = 0  # none may be left out
  longest = dict.fromkeys(names, 1.0)
  path = os.path.join(folder, "random")
  trials = 0
  while (
    sum(n for steps in tally.kills.values() for n in steps.values()) < kills
  ):
    if trials > 20 * kills:
      tally.failures.append("the kills come too late")
      break
    verb = names[trials % len(names)]
    trials += 1
    world.copy(template, path)
    killed, seconds, trouble = _moment(path, verb, rng, longest[verb])
    # Kills that come too late say how long the verb takes.
    longest[verb] = longest[verb] if killed else 0.9 * seconds
    if killed:
      tally.kills[verb][_MOMENT] += 1
    tally.failures += [f"{verb}: {text}" for text in trouble]
    if killed:
      _check([(f"{verb}, at a random moment", path, verb)], tally)
  return tally


def _moment(
  path: str, verb: str, rng: random.Random, longest: float
) -> tuple[bool, float, list[str]]:
  """Returns whether the kill was in time, the seconds, and what went wrong."""
  writers = [
    Child(lambda say, name=name: _write(path, name, say))
    for name in world.WRITERS
  ]
  victim = Child(lambda say: _work(path, verb, say))
  for child in (*writers, victim):
    child.hear(_TIMEOUT)
  start = time.monotonic()
  open(_go(path), "w").close()
  done = victim.hear(rng.uniform(0, longest))
  seconds = time.monotonic() - start
  victim.kill()
  unlucky = rng.randrange(2 * len(writers))
  if unlucky < len(writers):
    writers[unlucky].kill()
  open(_go(path) + "-stop", "w").close()
  trouble = []
  if victim.wait(_TIMEOUT) not in (0, -signal.SIGKILL):
    trouble.append(victim.trouble or f"ended with {victim.status}")
  for child in writers:
    if child.wait(_TIMEOUT) not in (0, -signal.SIGKILL):
      trouble.append(child.trouble or f"a writer ended with {child.status}")
  for name in (_go(path), _go(path) + "-stop"):
    os.unlink(name)
  said = [w for child in writers for w in child.said[1:] if isinstance(w, str)]
  lost = call(lambda: _missing(path, said))
  if lost:
    trouble.append(f"commits that were answered are lost: {lost}")
  return not done, seconds, trouble


def _go(path: str) -> str:
  return f"{path}-go"


def _await(path: str) -> None:
  # Both writers start at one moment: the file is there for both at once.
  while not os.path.exists(_go(path)):
    time.sleep(0.001)


def _work(path: str, verb: str, say: Callable[[Any], None]) -> None:
  repo = Repo(path)
  say("ready")
  _await(path)
  world.VERBS[verb](repo)
  say("done")


def _write(path: str, name: str, say: Callable[[Any], None]) -> None:
  repo = Repo(path)
  say("ready")
  _await(path)
  for step in itertools.count(1):
    say(world.commit_step(repo, name, step))
    if os.path.exists(_go(path) + "-stop"):
      break


def _missing(path: str, said: list[str]) -> list[str]:
  known = {commit.id for commit in Repo(path).log("main")}
  return sorted(set(said) - known)


def table(hunt: str, tally: Tally) -> str:
  """Returns what was killed and what came of it.

  Args:
    hunt: what to call it.
    tally: its counts.
  """
  rows = [
    (hunt, verb, step, str(n))
    for verb, steps in tally.kills.items()
    for step, n in sorted(steps.items())
  ]
  kills = sum(n for steps in tally.kills.values() for n in steps.values())
  return (
    report.table(["hunt", "verb", "killed before", "kills"], rows)
    + f"\n{hunt}: {kills} kills, {tally.checked} repositories sound, "
    f"{len(tally.failures)} failures"
  )
