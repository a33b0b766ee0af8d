"""What a merge costs once the parameters are in memory.

Four ways, in turn: patchjax into fresh memory, patchjax into a buffer that is
given to it, mergekit's own methods, and the formulas in plain PyTorch. In the
same rounds bytes are copied: no merge is faster than reading each input once
and writing the result once.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.history_tables import Section, Table, Target, times
from experiments.bench.merging_methods import BY_NAME, Contest
from experiments.bench.peers import files
from experiments.bench.peers.installing import MissingError
from experiments.bench.peers.mergekit_peer import Mergekit

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_SPREAD = 0.1  # of the contributors around the base, relative
_LONG = 60.0  # seconds after which a peer has shown how fast it is


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the section is run.

  Attributes:
    params: numbers of the model.
    repeats: rounds that are counted.
    install: whether mergekit may be installed.
    folder: where files may lie.
    methods: which merges.
    file_params: numbers of the models in files.
  """

  params: float
  repeats: int
  install: bool
  folder: pathlib.Path
  methods: Sequence[str]
  file_params: float = 0


@dataclasses.dataclass(frozen=True)
class Result:
  """One merge, measured.

  Attributes:
    contest: which.
    ways: what each way took.
    moved: bytes that have to be moved.
  """

  contest: Contest
  ways: dict[str, timing.Timing]
  moved: int

  def times(self, way: str) -> str:
    """Returns CPU and wall milliseconds of a way, for a cell."""
    return times(self.ways[way]) if way in self.ways else "-"

  def faster(self, way: str, than: str) -> float | None:
    """Returns how many times the CPU seconds of another way are a way's."""
    if way not in self.ways or than not in self.ways:
      return None
    return self._median(than) / self._median(way)

  def of_limit(self, way: str) -> float | None:
    """Returns the CPU seconds of a way as a multiple of the copy's."""
    return (
      self._median(way) / self._median("copy") if way in self.ways else None
    )

  def _median(self, way: str) -> float:
    # Slow peers run in some of the rounds only.
    return statistics.median(self.ways[way].cpu)


def run(settings: Settings, dtype: str) -> Section:
  """Times all merges in one dtype.

  Args:
    settings: how.
    dtype: float32 or bfloat16.
  """
  contests = [BY_NAME[name] for name in settings.methods]
  count = max(contest.count for contest in contests)
  trees = _models(settings.params, count, _DTYPES[dtype])
  paths = [settings.folder / f"{i}.safetensors" for i in range(len(trees))]
  for path, tree in zip(paths, trees, strict=True):
    files.write(path, workload.flat(tree))
  remarks = []
  theirs = None
  if settings.install:
    try:
      theirs = Mergekit(paths)
    except MissingError as error:
      remarks.append(f"mergekit is left out: {error}")
  else:
    remarks.append("mergekit is left out: --install was not given")
  held = [jax.tree.map(jax.device_put, tree) for tree in trees]
  jax.block_until_ready(held)
  results = []
  try:
    for contest in contests:
      results.append(_measure(contest, held, theirs, settings))
      if theirs and contest.equal and dtype == "float32":
        remarks += _compare(contest, held, theirs, settings.folder)
  finally:
    if theirs:
      theirs.close()
  return _section(results, held, dtype, theirs, remarks)


def _models(params: float, count: int, dtype: Any) -> list[workload.Tree]:
  """Returns the base and the contributors, on the host."""
  base = workload.decoder(params)
  rng = np.random.default_rng(1)
  tuned = (workload.tuned(base, _SPREAD, rng) for _ in range(count))
  return [workload.cast(tree, dtype) for tree in (base, *tuned)]


def _measure(
  contest: Contest, held: list[Any], theirs: Mergekit | None, settings: Settings
) -> Result:
  """Times all ways of one merge, in turn."""
  base, models = held[0], held[1 : contest.count + 1]
  method = contest.method(models)
  given: list[Any] = [jax.tree.map(lambda x: x.copy(), base)]

  def donated():
    # The result of one round is the buffer of the next: no fresh memory, and
    # numbers that stay near the models'.
    out = pj.merge(given.pop(), models, method, donate=True)
    given.append(out)
    return out

  reads = contest.count + contest.reads_base
  moved = workload.nbytes(base) * (reads + 1)
  copy = _copier(moved)
  ours: dict[str, Callable[[], Any]] = {
    "patchjax": lambda: pj.merge(base, models, method),
    "copy": copy,
  }
  if contest.mergekit:
    ours["donated"] = donated  # what decomposes does not wait for memory
  if contest.paper is not None:
    paper = contest.paper()
    ours["paper"] = lambda: pj.merge(base, models, paper)
  ways: dict[str, Callable[[], timing.Cost]] = {
    name: lambda f=f: timing.cost(f) for name, f in ours.items()
  }
  for way in ways.values():
    way()
  peers = () if theirs is None else ("mergekit", "torch")
  for peer in peers:
    if peer == "torch" and contest.name not in _TRANSCRIBED:
      continue
    if peer == "mergekit" and not contest.mergekit:
      continue

    def merge(peer=peer, warm=False):
      assert theirs is not None
      return theirs.merge(
        peer,
        contest.name,
        contest.settings,
        base=contest.base,
        count=contest.count,
        warm=warm,
      )

    merge(warm=True)
    ways[peer] = merge
  costs = collections.defaultdict(list)
  spent = 0.0
  for _ in range(settings.repeats):
    for name, way in ways.items():
      if name not in peers or spent < _LONG:
        costs[name].append(way())
    spent += sum(costs[name][-1].wall for name in peers if name in costs)
  found = {name: timing.joined(taken) for name, taken in costs.items()}
  result = Result(contest, found, moved)
  print(
    f"{contest.name}:",
    *(f"{name} {result.times(name)} ms;" for name in found),
    file=sys.stderr,
    flush=True,
  )
  return result


_TRANSCRIBED = (
  "linear",
  "task_arithmetic",
  "slerp",
  "ties",
  "dare_linear",
  "dare_ties",
  "della",
  "breadcrumbs",
  "sce",
  "tsv_m",
  "iso_c",
  "star",
  "wudi",
  "svc",
  "fisher",
  "regmean",
  "mats",
)


def _copier(moved: int, most: int = 1 << 28) -> Callable[[], None]:
  """Returns a function that reads and writes some bytes, on all cores."""
  # What is copied is both read and written.
  turns = -(-moved // (2 * most))
  size = moved // (2 * turns)
  source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
  cores = os.cpu_count() or 1
  cuts = [size * i // cores for i in range(cores + 1)]
  pool = concurrent.futures.ThreadPoolExecutor(cores)

  def part(i: int) -> None:
    here = slice(cuts[i], cuts[i + 1])
    for _ in range(turns):
      np.copyto(target[here], source[here])

  def copy() -> None:
    list(pool.map(part, range(cores)))

  return copy


def _compare(
  contest: Contest, held: list[Any], theirs: Mergekit, folder: pathlib.Path
) -> list[str]:
  """Says how many numbers differ from mergekit's (or PyTorch's), if any.

  Raises:
    AssertionError: if they are more than ties in magnitude explain.
  """
  path = folder / "merged.safetensors"
  peer = "mergekit" if contest.mergekit else "torch"
  theirs.merge(
    peer,
    contest.name,
    contest.settings,
    base=contest.base,
    count=contest.count,
    save=path,
  )
  models = held[1 : contest.count + 1]
  ours = pj.merge(held[0], models, contest.method(models))
  differing = size = 0
  merged = safetensors.numpy.load_file(path)
  for name, x in workload.flat(ours).items():
    y = merged[name]
    far = np.abs(np.asarray(x) - y) > contest.close * np.abs(y).max()
    differing += int(np.count_nonzero(far))
    size += far.size
  path.unlink()
  if differing > 1e-4 * size:
    raise AssertionError(
      f"{contest.name}: {differing} of {size} numbers are not {peer}'s"
    )
  if not differing:
    return []
  return [
    f"{contest.name}: {differing:,} of {size:,} numbers are not {peer}'s: "
    "magnitudes that tie at the cut"
  ]


def _section(
  results: list[Result],
  held: list[Any],
  dtype: str,
  theirs: Mergekit | None,
  remarks: list[str],
) -> Section:
  """Returns the table and the targets."""
  rows, targets = [], []
  rates = []
  for result in results:
    contest = result.contest
    copy = result.ways["copy"]
    rates.append(result.moved / statistics.median(copy.cpu))
    of_limit = result.of_limit("donated")
    rows.append(
      (
        contest.name,
        *map(
          result.times, ("patchjax", "donated", "paper", "torch", "mergekit")
        ),
        _times(result.faster("patchjax", "torch")),
        _times(result.faster("patchjax", "mergekit")),
        _times(result.faster("donated", "mergekit")),
        "-" if of_limit is None else f"{of_limit:.2f}",
      )
    )
    goal = contest.goal(dtype)
    faster = result.faster("patchjax", "mergekit")
    if goal and faster:
      targets.append(
        Target(
          f"{contest.name}, {dtype}: faster than mergekit",
          f">= {goal:g}x",
          f"{faster:.1f}x",
          faster >= goal,
        )
      )
    if contest.limit and of_limit is not None:
      targets.append(
        Target.at_most(
          f"{contest.name}, {dtype}: donated, of the bytes-moved limit",
          of_limit,
          contest.limit,
          "x",
        )
      )
  size = sum(x.size for x in jax.tree.leaves(held[0]))
  about = "" if theirs is None else f", PyTorch {theirs.about['torch']}"
  title = (
    f"merging {size / 1e6:.0f} M parameters in {dtype}: CPU / wall ms "
    f"(copying: {statistics.median(rates) / 1e9:.1f} GB per CPU-second{about})"
  )
  columns = (
    "method",
    "patchjax",
    "donated",
    "paper's default (by Gram matrices)",
    "torch",
    "mergekit",
    "vs torch",
    "vs mergekit",
    "donated vs mergekit",
    "donated / limit",
  )
  return Section([Table(title, columns, rows)], targets, remarks)


def _times(ratio: float | None) -> str:
  return "-" if ratio is None else f"{ratio:.1f}x"
