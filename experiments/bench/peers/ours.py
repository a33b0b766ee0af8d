"""patchjax itself, as one of the peers."""

from __future__ import annotations

import functools
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

import patchjax as pj
from experiments.bench import timing, workload
from experiments.bench.peers.base import folder_bytes


class Patchjax:
  """A repository: a commit a version, patches by their factors.

  Attributes:
    name: `patchjax`.
    repo: the repository.
    commits: ids in the order of versions.
    like: what the versions look like.
    holds: whether the arrays of the version before are alive at a commit.
  """

  name = "patchjax"
  holds = False

  def __init__(self, folder: pathlib.Path):
    self.repo = pj.Repo.init(folder)
    self.commits: list[str] = []
    self.like: Any = None
    self._folder = folder
    self._held: Any = None

  def commit(self, version: workload.Version) -> timing.Cost:
    """Commits arrays on the device, or the patch."""
    value: Any = version.patch
    if value is None:
      value = jax.tree.map(jnp.array, version.value)
    self.like = workload.abstract(version.value)
    jax.block_until_ready(value)
    taken = timing.cost(
      lambda: self.commits.append(self.repo.commit(value, message=version.name))
    )
    if self.holds:
      # A patch has no arrays of its result: they are those of a checkout.
      made = version.patch is None
      self._held = value if made else self.repo.checkout(like=self.like)
    return taken

  def checkout(self, number: int) -> timing.Cost:
    """Reads a version onto the device, every digest verified."""
    return timing.cost(
      lambda: self.repo.checkout(self.commits[number], like=self.like)
    )

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name."""
    return workload.flat(self.repo.checkout(self.commits[number]))

  def size(self) -> int:
    """Bytes of the folder, without the index cache (it can be rebuilt)."""
    cache = folder_bytes(self._folder / "cache")
    return folder_bytes(self._folder) - cache

  def close(self) -> None:
    """There is nothing to end."""


class Holding(Patchjax):
  """A repository that is given a value while the one before is in memory.

  Attributes:
    name: `parent held`.
    holds: True.
  """

  name = "parent held"
  holds = True


NOTHING = "commit of what has not changed"
FRESH = "the same of arrays that nobody knows"
TINY = "50 commits of one small leaf"
PARTIAL = "checkout of one layer of twelve"
FSCK = "fsck, everything verified"
REPACK = "repack of all versions"
CLONE = "clone into another folder"
GC = "gc of a branch of one version"


def verbs(peer: Patchjax) -> dict[str, timing.Cost]:
  """Measures what other stores do not have, or have of another kind.

  Args:
    peer: has stored all versions.
  """
  repo = peer.repo
  value = repo.checkout(like=peer.like)
  commit = functools.partial(repo.commit, message="again")
  found = {NOTHING: timing.cost(lambda: commit(value))}
  fresh = jax.block_until_ready(jax.tree.map(jnp.copy, value))
  found[FRESH] = timing.cost(lambda: commit(fresh))
  norm = value["norm"]
  steps = [
    value | {"norm": norm + jnp.asarray(step, norm.dtype)} for step in range(50)
  ]

  def tiny() -> None:
    for step in jax.block_until_ready(steps):
      commit(step)

  found[TINY] = timing.cost(tiny)
  found[PARTIAL] = timing.cost(
    lambda: repo.checkout(peer.commits[-1], only="layers/3/.*")
  )
  found[FSCK] = timing.cost(lambda: _sound(repo))
  copy = f"{repo.path}-copy"
  found[CLONE] = timing.cost(lambda: pj.Repo.clone(repo.path, copy))
  shutil.rmtree(copy)
  found[GC] = _collected(peer, value)
  found[REPACK] = timing.cost(repo.repack)
  return found


def _sound(repo: pj.Repo) -> None:
  report = repo.fsck()
  if not report.ok:
    raise AssertionError(str(report))


def _collected(peer: Patchjax, value: workload.Tree) -> timing.Cost:
  repo = peer.repo
  repo.branch("side", peer.commits[0])
  large = jax.tree.map(lambda x: x[::-1], value["embed"])
  repo.commit(value | {"embed": large}, message="side", branch="side")
  repo.branch("side", delete=True, force=True)
  before = peer.size()
  taken = timing.cost(lambda: repo.gc(grace=0, expire=0))
  if peer.size() > before - large["tokens"].nbytes // 2:
    raise AssertionError("gc has not removed the version of a deleted branch")
  return taken
