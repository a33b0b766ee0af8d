"""Storing and reading five versions of a model, beside other stores."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.bench import (
  history_limits,
  history_rounds,
  timing,
  workload,
)
from experiments.bench.history_tables import (
  Section,
  Table,
  Target,
  megabytes,
  times,
)
from experiments.bench.peers import git, ice, installing, ours
from experiments.bench.peers.base import Peer
from experiments.bench.peers.files import Safetensors
from experiments.bench.peers.orbax import Orbax
from experiments.bench.peers.ours import Patchjax

US, ORBAX = Patchjax.name, Orbax.name


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all sections are told.

  Attributes:
    params: numbers of the model.
    repeats: rounds that are counted.
    install: whether peers may be installed.
    folder: where to work; empty.
  """

  params: float
  repeats: int
  install: bool
  folder: pathlib.Path


def run(settings: Settings, dtype: Any) -> Section:
  """Returns what the versions of one dtype cost.

  Args:
    settings: see there.
    dtype: float32 or bfloat16.
  """
  versions = workload.versions(settings.params, dtype)
  makers, remarks = peers_of(
    settings,
    [Patchjax, ours.Holding, Orbax, Safetensors],
    [git.GitLfs, ice.Icechunk],
  )
  if settings.params >= 1e6:
    # What only happens once in a process is nobody's cost.
    small = workload.versions(1e5, dtype)
    warm = settings.folder / "warm"
    history_rounds.run(makers, small, warm, repeats=1, extra=_verbs)
  results = history_rounds.run(
    makers, versions, settings.folder, repeats=settings.repeats, extra=_verbs
  )
  limits = [
    history_limits.version_limit(new, old)
    for new, old in zip(versions, [None, *versions], strict=False)
  ]
  kind = np.dtype(dtype).name
  size = workload.nbytes(versions[0].value)
  title = f"{kind}, {size / 1e6:,.0f} MB, medians of {settings.repeats}"
  peers = list(dict.fromkeys(name for name, _, _ in results.costs))
  return Section(
    tables=[
      _times(results, versions, peers, title),
      _bytes(results, versions, peers, limits, kind),
      _others(results, title),
    ],
    targets=_targets(results, versions, limits, kind),
    remarks=[*remarks, *results.changed],
  )


def peers_of(
  settings: Settings, always: Sequence[Any], others: Sequence[Any]
) -> tuple[list[history_rounds.Maker], list[str]]:
  """Returns the peers that are to be had, and why the others are not.

  Args:
    settings: see there.
    always: classes of peers that need nothing.
    others: those that have to be installed.
  """
  makers, remarks = list(always), []
  for other in others:
    if not settings.install:
      remarks.append(f"{other.name}: left out (--noinstall)")
      continue
    try:
      other.install()
      makers.append(other)
    except installing.MissingError as error:
      remarks.append(f"{other.name}: {error}")
  return makers, remarks


def _verbs(peers: Sequence[Peer]) -> dict[tuple[str, str], timing.Cost]:
  """Measures what belongs to a repository, and its like in Orbax."""
  found = {}
  for peer in peers:
    if type(peer) is Patchjax:
      found |= {(US, what): cost for what, cost in ours.verbs(peer).items()}
    elif isinstance(peer, Orbax):
      found[ORBAX, ours.PARTIAL] = peer.partial(-1, "layers/3/")
  return found


def _times(
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
    for number in numbers:
      rows.append(
        (
          f"{what}: {versions[number].name}",
          *(times(results.timing(peer, what, number)) for peer in peers),
          f"{results.ratio(US, ORBAX, what, number):.2f}x",
        )
      )
  return Table(
    f"CPU ms / wall ms ({title})",
    ("step", *peers, "CPU of Orbax's"),
    rows,
  )


def _bytes(
  results: history_rounds.Results,
  versions: Sequence[workload.Version],
  peers: Sequence[str],
  limits: Sequence[float],
  kind: str,
) -> Table:
  rows = [
    (
      version.name,
      *(megabytes(results.bytes[peer, number]) for peer in peers),
      megabytes(limits[number]),
      f"{results.bytes[US, number] / limits[number]:.2f}x",
    )
    for number, version in enumerate(versions)
  ]
  totals = [
    sum(results.bytes[peer, n] for n in range(len(versions))) for peer in peers
  ]
  rows.append(
    (
      "all",
      *map(megabytes, totals),
      megabytes(sum(limits)),
      f"{totals[0] / sum(limits):.2f}x",
    )
  )
  return Table(
    f"MB stored ({kind}; limit: the entropy of what changed)",
    ("version", *peers, "limit", "of the limit"),
    rows,
  )


def _others(results: history_rounds.Results, title: str) -> Table:
  rows = []
  for (name, what, _), costs in results.costs.items():
    if what not in ("commit", "checkout"):
      rows.append((what, name, times(timing.joined(costs))))
  return Table(
    f"CPU ms / wall ms of other verbs ({title})",
    ("verb", "by", "CPU / wall ms"),
    rows,
  )


def _targets(
  results: history_rounds.Results,
  versions: Sequence[workload.Version],
  limits: Sequence[float],
  kind: str,
) -> list[Target]:
  found = [
    Target.at_most(
      f"{kind}, commit: {version.name}, CPU of an Orbax save",
      results.ratio(US, ORBAX, "commit", number),
      1.25,
      "x",
    )
    for number, version in enumerate(versions)
  ]
  found += [
    Target.at_most(
      f"{kind}, checkout: {versions[number].name}, CPU of an Orbax load",
      results.ratio(US, ORBAX, "checkout", number),
      1.5,
      "x",
    )
    for number in history_rounds.sampled(versions)
  ]
  for number in (1, 2):
    found.append(
      Target.at_most(
        f"{kind}, bytes: {versions[number].name}, of the entropy",
        results.bytes[US, number] / limits[number],
        1.1,
        "x",
      )
    )
  plain = history_limits.index_and_value(versions[3].value, versions[2].value)
  found.append(
    Target.at_most(
      f"{kind}, bytes: {versions[3].name}, of index and value",
      results.bytes[US, 3] / plain,
      1.05,
      "x",
    )
  )
  noop = results.median(US, ours.NOTHING)
  tiny = results.median(US, ours.TINY)
  found += [
    Target.at_most(f"{kind}, {ours.NOTHING}", 1e3 * noop.wall, 50, " ms"),
    Target.at_most(f"{kind}, {ours.TINY}", tiny.cpu, 1.5, " CPU-s"),
  ]
  return found
