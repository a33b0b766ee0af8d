"""Single flipped bits, in every kind of file of a repository.

After each flip every version is read, and compared with what it must be; then
fsck looks. A flip is detected if one of the two says so by an error of ours,
or harmless if all bits came back and fsck has nothing to say: nobody reads the
bit. Everything else is a failure: wrong bits returned as right, an error that
is none of ours, a crash, a process that hangs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.bench import faults_world as world
from experiments.bench.faults_children import Child
from patchjax.history import Repo
from patchjax.trees import report
from patchjax.trees.errors import PatchjaxError

_TIMEOUT = 60.0
_DATA = 10_000  # bytes; what is smaller is no data, but a tree that finds it
OUTCOMES = ("at checkout", "by fsck", "harmless", "failed")

# What a repository is made of: the first that fits names a file.
_KINDS = {
  "payload data": lambda key, size: "/d/" in key and size > _DATA,
  "payload nodes": lambda key, size: "/d/" in key or key.endswith(".ocdbt"),
  "payload index": lambda key, size: key.endswith("/index.json"),
  "payload, other": lambda key, size: key.startswith("payloads/"),
  "blob": lambda key, size: key.startswith("blobs/"),
  "object": lambda key, size: key.startswith("objects/"),
  "note": lambda key, size: key.startswith("refs/notes/"),
  "ref": lambda key, size: key.startswith("refs/"),
  "reflog": lambda key, size: key.startswith("logs/"),
  "cache": lambda key, size: key.startswith("cache/"),
  "marker and settings": lambda key, size: True,
}


@dataclasses.dataclass(frozen=True)
class Flip:
  """A bit to flip.

  Attributes:
    kind: of its file.
    key: the file.
    position: of the byte.
    bit: 0 to 7.
  """

  kind: str
  key: str
  position: int
  bit: int


def draw(path: str, count: int, seed: int) -> list[Flip]:
  """Returns random flips, as many in each kind of file.

  Args:
    path: the repository.
    count: how many.
    seed: of the randomness.
  """
  rng = random.Random(seed)
  kinds: dict[str, list[tuple[str, int]]] = {kind: [] for kind in _KINDS}
  for key in sorted(_keys(path)):
    size = os.path.getsize(os.path.join(path, key))
    kind = next(kind for kind, fits in _KINDS.items() if fits(key, size))
    if size:
      kinds[kind].append((key, size))
  flips = []
  present = [kind for kind, files in kinds.items() if files]
  for number in range(count):
    kind = present[number % len(present)]
    key, size = rng.choice(kinds[kind])
    flips.append(Flip(kind, key, rng.randrange(size), rng.randrange(8)))
  return flips


def _keys(path: str) -> Iterator[str]:
  for place, _, names in os.walk(path):
    for name in names:
      yield os.path.relpath(os.path.join(place, name), path)


def run(
  template: str, path: str, flips: Sequence[Flip]
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
  """Flips bits one by one and says what came of it.

  Args:
    template: a history of `world.build`.
    path: where to work on a copy of it.
    flips: the bits.

  Returns:
    `({kind: how often each of OUTCOMES}, failures)`.
  """
  world.copy(template, path)
  counts = {flip.kind: collections.Counter() for flip in flips}
  failures = []
  waiting = collections.deque(flips)

  def count(outcome: str, what: str) -> None:
    flip = waiting.popleft()
    counts[flip.kind][outcome] += 1
    if outcome == "failed":
      failures.append(f"{flip}: {what}")

  while waiting:
    # One process looks at many flips, until one of them is its end.
    left = list(waiting)
    child = Child(functools.partial(_look_at, path, left))
    while waiting and child.hear(_TIMEOUT) and "outcome" in child.said[-1]:
      count(**child.said[-1])
    status = child.wait(1)
    if len(waiting) and status is None:
      count("failed", "hung")
    elif waiting:
      count("failed", child.trouble or f"died of {status}")
    world.copy(template, path)
  return counts, failures


def _look_at(
  path: str, flips: Sequence[Flip], say: Callable[[Any], None]
) -> None:
  for flip in flips:
    _flip(path, flip)
    outcome, what = _outcome(path)
    _flip(path, flip)
    say({"outcome": outcome, "what": what})


def _flip(path: str, flip: Flip) -> None:
  with open(os.path.join(path, flip.key), "r+b") as file:
    file.seek(flip.position)
    octet = file.read(1)[0]
    file.seek(flip.position)
    file.write(bytes([octet ^ (1 << flip.bit)]))


def _outcome(path: str) -> tuple[str, str]:
  """Returns what a look at everything says: one of OUTCOMES, and why."""
  try:
    repo = Repo(path)
    for ref, value in world.values().items():
      if not _equal(repo.checkout(ref, like=value), value):
        return "failed", f"{ref} has other bits"
  except PatchjaxError as error:
    return "at checkout", str(error)
  try:
    found = Repo(path).fsck()
  except PatchjaxError as error:
    return "by fsck", str(error)
  return ("harmless", "") if found.ok else ("by fsck", str(found))


def _equal(found: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
  return all(
    np.array_equal(found[folder][name], leaf)
    for folder, leaves in value.items()
    for name, leaf in leaves.items()
  )


def table(counts: dict[str, collections.Counter[str]]) -> str:
  """Returns how often what came of flips, by kind of file.

  Args:
    counts: see `run`.
  """
  rows = [
    (kind, str(sum(found.values())), *(str(found[o]) for o in OUTCOMES))
    for kind, found in counts.items()
  ]
  total = [sum(found[o] for found in counts.values()) for o in OUTCOMES]
  rows.append(("all", str(sum(total)), *map(str, total)))
  headings = ["file", "flips", *OUTCOMES]
  return report.table(headings, rows)
