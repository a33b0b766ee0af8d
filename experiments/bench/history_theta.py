"""git-theta's own workload: 51 tensors of 98.6 MB in safetensors.

Its goals are sizes that git-theta reached, and the times of plain Git LFS on
the same files. git-theta runs once (it takes seconds a step), the others as
often as asked. Git's commands start from a file and end with one: the row
"patchjax, command" does the same, with a process a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from experiments.bench import history_rounds, timing, workload
from experiments.bench.history_tables import (
  Section,
  Table,
  Target,
  megabytes,
  times,
)
from experiments.bench.history_versions import Settings, peers_of
from experiments.bench.peers import git
from experiments.bench.peers.base import Peer
from experiments.bench.peers.command import Command
from experiments.bench.peers.ours import Patchjax

_FULL = 25e6  # parameters of the workload at its own size
_SIZES = {2: 1.42, 3: 1.72}  # MB that git-theta took for a version
_US, _COMMAND = Patchjax.name, Command.name
_LFS, _THETA = git.GitLfs.name, git.GitTheta.name


def run(settings: Settings) -> Section:
  """Returns what the four versions cost.

  Args:
    settings: with fewer parameters than its own, the workload shrinks.
  """
  scale = min(1.0, settings.params / _FULL) ** 0.5
  versions = _versions(scale)
  makers, remarks = peers_of(settings, [Patchjax, Command], [git.GitLfs])
  once = functools.partial(history_rounds.run, repeats=1, extra=_none)
  if settings.params >= 1e6:
    once(makers, _versions(1 / 32), settings.folder / "warm")
  results = history_rounds.run(
    makers, versions, settings.folder, repeats=settings.repeats, extra=_none
  )
  theirs, why = peers_of(settings, [], [git.GitTheta])
  if theirs:
    found = once(theirs, versions, settings.folder / "theta")
    results.costs.update(found.costs)
    results.bytes.update(found.bytes)
    results.changed.extend(found.changed)
  peers = list(dict.fromkeys(name for name, _, _ in results.costs))
  size = workload.nbytes(versions[0].value) / 1e6
  return Section(
    [
      _table(results, versions, peers, f"{size:.3g} MB in 51 tensors"),
      Table(
        "MB stored",
        ("version", *peers),
        [
          (v.name, *(megabytes(results.bytes[p, n]) for p in peers))
          for n, v in enumerate(versions)
        ],
      ),
    ],
    _targets(results, versions, peers, scale),
    [*remarks, *why, *results.changed],
  )


def _versions(scale: float) -> list[workload.Version]:
  rng = np.random.default_rng(0)
  first = workload.encoder(scale)
  tuned = workload.tuned(first, 1e-3, rng)
  sparse = workload.sparse(tuned, 0.01, rng)
  patch = workload.low_rank(sparse, 8, rng)
  return [
    workload.Version("first", first),
    workload.Version("all leaves, relative 1e-3", tuned),
    workload.Version(f"{git.SPARSE}, 1 %", sparse),
    workload.Version("rank 8", workload.patched(sparse, patch), patch),
  ]


def _none(peers: Sequence[Peer]) -> dict[tuple[str, str], timing.Cost]:
  del peers
  return {}


def _table(
  results: history_rounds.Results,
  versions: Sequence[workload.Version],
  peers: Sequence[str],
  title: str,
) -> Table:
  rows = []
  for what, numbers in (
    ("commit", range(len(versions))),
    ("checkout", history_rounds.sampled(versions)),
  ):
    rows += [
      (
        f"{what}: {versions[number].name}",
        *(times(results.timing(peer, what, number)) for peer in peers),
      )
      for number in numbers
    ]
  return Table(f"CPU ms / wall ms ({title})", ("step", *peers), rows)


def _targets(
  results: history_rounds.Results,
  versions: Sequence[workload.Version],
  peers: Sequence[str],
  scale: float,
) -> list[Target]:
  found = []
  if scale == 1:
    found += [
      Target.at_most(
        f"git-theta's workload, bytes: {versions[number].name}",
        results.bytes[_US, number] / 1e6,
        goal,
        " MB",
      )
      for number, goal in _SIZES.items()
    ]
  for other, goal in ((_LFS, 1.0), (_THETA, 0.1)):
    if other not in peers:
      continue
    for what, numbers in (
      ("commit", range(len(versions))),
      ("checkout", history_rounds.sampled(versions)),
    ):
      worst = max(
        results.median(_US, what, number).wall
        / results.median(other, what, number).wall
        for number in numbers
      )
      found.append(
        Target.at_most(
          f"git-theta's workload, slowest {what}, wall of {other}",
          worst,
          goal,
          "x",
        )
      )
  return found
