"""Rounds of the history benchmark: every peer stores every version in turn.

In a round each peer starts in an empty folder. Version by version all of them
store it, then all read the first, the middle and the last: A B A B, so that a
slow minute hits all alike. Ratios are taken within a round.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import shutil
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from experiments.bench import timing, workload
from experiments.bench.peers.base import Peer

Maker = Callable[[pathlib.Path], Peer]

_CLOSE = 1e-5  # what sums that are rounded elsewhere may differ by


@dataclasses.dataclass
class Results:
  """What the rounds measured.

  Attributes:
    costs: by (peer, what, version), one a round.
    bytes: by (peer, version): what the folder grew by, the same every round.
    changed: how many numbers of which version a peer gave back with other
      bits, though close to what it was given.
  """

  costs: dict[tuple[str, str, int], list[timing.Cost]]
  bytes: dict[tuple[str, int], int]
  changed: list[str] = dataclasses.field(default_factory=list)

  def timing(self, peer: str, what: str, number: int = 0) -> timing.Timing:
    """Returns what a step took.

    Args:
      peer: name of the peer.
      what: `commit`, `checkout` or a verb of its own.
      number: which version.
    """
    return timing.joined(self.costs[peer, what, number])

  def ratio(self, peer: str, other: str, what: str, number: int) -> float:
    """Returns CPU seconds of a peer as a multiple of another's.

    Args:
      peer: name of the peer.
      other: name of the other.
      what: `commit` or `checkout`.
      number: which version.
    """
    ours = self.timing(other, what, number)
    return ours.ratio(self.timing(peer, what, number))

  def median(self, peer: str, what: str, number: int = 0) -> timing.Cost:
    """Returns the medians of a step; see `timing`."""
    taken = self.timing(peer, what, number)
    return timing.Cost(
      statistics.median(taken.wall), statistics.median(taken.cpu)
    )


def run(
  makers: Sequence[Maker],
  versions: Sequence[workload.Version],
  work: pathlib.Path,
  *,
  repeats: int,
  extra: Callable[[Sequence[Peer]], dict[tuple[str, str], timing.Cost]],
) -> Results:
  """Runs all rounds.

  Args:
    makers: open a peer in a new folder.
    versions: what is stored.
    work: where the folders are.
    repeats: how many rounds.
    extra: at the end of a round, measures what not every peer can do; returns
      costs by (peer, what).
  """
  costs = collections.defaultdict(list)
  sizes: dict[tuple[str, int], int] = {}
  changed: list[str] = []
  for turn in range(repeats):
    place = work / f"round{turn}"
    place.mkdir(parents=True)
    peers = [make(place / str(i)) for i, make in enumerate(makers)]
    try:
      for number, version in enumerate(versions):
        for peer in peers:
          before = peer.size()
          taken = peer.commit(version)
          costs[peer.name, "commit", number].append(taken)
          sizes[peer.name, number] = peer.size() - before
      for number in sampled(versions):
        for peer in peers:
          taken = peer.checkout(number)
          costs[peer.name, "checkout", number].append(taken)
      if not turn:
        changed = _compare(peers, versions)
      for (name, what), taken in extra(peers).items():
        costs[name, what, 0].append(taken)
    finally:
      for peer in peers:
        peer.close()
      shutil.rmtree(place)
  return Results(dict(costs), sizes, changed)


def sampled(versions: Sequence[workload.Version]) -> tuple[int, int, int]:
  """Returns which versions are read: first, middle and last."""
  return 0, len(versions) // 2, len(versions) - 1


def _compare(
  peers: Sequence[Peer], versions: Sequence[workload.Version]
) -> list[str]:
  """Returns what came back with other bits; raises if it is not even close."""
  changed = []
  for peer in peers:
    for number in sampled(versions):
      expected = workload.flat(versions[number].value)
      found = peer.value(number)
      other = 0
      for name, x in expected.items():
        y = np.asarray(found[name])
        if y.tobytes() == x.tobytes():
          continue
        if not np.allclose(y, x, rtol=0, atol=_CLOSE):
          raise AssertionError(
            f"{peer.name} changed {name} of {versions[number].name!r}"
          )
        other += int(np.count_nonzero(y != x))
      if other:
        changed.append(
          f"{peer.name} gives back {other:,} numbers of "
          f"{versions[number].name!r} with other bits"
        )
  return changed
