"""A small history of which every bit is known, and what is checked of it.

A value has a folder for everyone who changes it: `base`, `left`, `right` and
the writers. What a folder holds follows from its owner and a step; a commit's
message says whose folder went to which step. So each version of whatever
history the writers and the accidents make can be checked against its parents
and its message, and read back to the bit. The branches `left` and `right`
also add to one common leaf: their merge is a value of its own. All numbers are
small integers: merging by arithmetic is exact.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import patchjax
from patchjax.history import Repo
from patchjax.trees.digest import Entry, entry
from patchjax.trees.errors import ConflictError

WRITERS = ("w0", "w1")
_SHAPES = {"base": (520, 512)}  # more than a tile of a MiB
_OLD = 60 * 86400.0

Entries = Mapping[str, Entry]


@functools.lru_cache(maxsize=64)
def folder_of(owner: str, step: int) -> dict[str, Any]:
  """Returns what somebody's folder holds at a step.

  Every third step all is new, every third changes some of it by one, every
  third a counter alone: a checkpoint, a difference, a blob.

  Args:
    owner: whose folder.
    step: 0 or more.
  """
  seed = sum(owner.encode())
  rng = np.random.default_rng([seed, step // 3])
  shape = _SHAPES.get(owner, (200, 300))
  data = rng.integers(-9999, 9999, shape).astype(np.float32)
  if step % 3:
    data += rng.random(shape) < 0.3
  return {"data": data, "step": np.float32(step)}


def common(*sides: str) -> dict[str, Any]:
  """Returns the folder that the branches `left` and `right` both add to.

  Args:
    *sides: which of them have been added.
  """
  data = folder_of("common", 0)["data"].copy()
  for side in sides:
    data += folder_of(side, 3)["data"]
  return {"data": data}


@functools.cache
def alone() -> dict[str, Any]:
  """Returns a value without parents that is close to that of `main`.

  It is committed whole; a repack finds what it is a difference to.
  """
  near = folder_of("base", 0)["data"]
  rng = np.random.default_rng(1)
  noise = rng.integers(-99, 99, near.shape).astype(np.float32)
  return {"base": {"data": near + noise}}


def value(steps: Mapping[str, int], *sides: str) -> dict[str, Any]:
  """Returns the value in which each owner has come to some step.

  Args:
    steps: `{owner: step}`.
    *sides: see `common`.
  """
  found = {owner: folder_of(owner, step) for owner, step in steps.items()}
  return {**found, "common": common(*sides)}


def _entries(folder: str, leaves: Mapping[str, Any]) -> Entries:
  return {f"{folder}/{name}": entry(leaf) for name, leaf in leaves.items()}


@functools.cache
def _of_owner(owner: str, step: int) -> Entries:
  return _entries(owner, folder_of(owner, step))


@functools.cache
def _of_sides(*sides: str) -> Entries:
  return _entries("common", common(*sides))


def build(path: str) -> None:
  """Makes the history that accidents happen to.

  `main` has a chain of differences and a blob; `left` and `right` wait to be
  merged; `copy` is ahead of `main`; `alone` holds a leaf that a repack holds
  better; garbage waits to be collected, old enough for it; `path-remote` is a
  repository to push to.

  Args:
    path: folder to create.
  """
  repo = Repo.init(path)
  first = dict.fromkeys(("base", "left", "right", *WRITERS), 0)
  repo.commit(value(first), message="first")
  for step in (1, 2):
    repo.commit(
      value({**first, "base": step}), message=f"base {step}", author="base"
    )
  base = {**first, "base": 2}
  for name in ("left", "right"):
    repo.branch(name)
    repo.commit(
      value({**base, name: 1}, name), message=f"{name} 1", branch=name
    )
  repo.branch("copy")
  for step in (6, 7):
    repo.commit(
      value({**base, "base": step}), message=f"base {step}", branch="copy"
    )
  repo.commit(alone(), message="alone", branch="alone", parents=[])
  repo.tag("v1", "main~1")
  lost = repo.commit(
    value({**base, "base": 30}),
    message="base 30",
    branch="lost",
    parents=["main"],
  )
  repo.push(remote_of(path))
  repo.annotate(lost, "verdict", {"good": False})
  repo.annotate("main", "verdict", {"good": True})
  repo.branch("lost", delete=True, force=True)
  shutil.rmtree(repo.files.path("logs/heads/lost"))
  then = time.time() - _OLD
  for root in (path, remote_of(path)):
    for place, _, names in os.walk(root):
      for name in names:
        os.utime(os.path.join(place, name), (then, then))


@functools.cache
def values() -> dict[str, dict[str, Any]]:
  """Returns the value of every branch and tag that `build` makes."""
  first = dict.fromkeys(("base", "left", "right", *WRITERS), 0)
  return {
    "main": value({**first, "base": 2}),
    "v1": value({**first, "base": 1}),
    "left": value({**first, "base": 2, "left": 1}, "left"),
    "right": value({**first, "base": 2, "right": 1}, "right"),
    "copy": value({**first, "base": 7}),
    "alone": alone(),
  }


def remote_of(path: str) -> str:
  """Returns the repository that one is pushed to.

  Args:
    path: the one.
  """
  return f"{path}-remote"


def copy(source: str, path: str) -> str:
  """Copies a history, and the one that it is pushed to.

  Args:
    source: the history.
    path: where the copy goes, in place of what is there.

  Returns:
    The path.
  """
  for old, new in ((source, path), (remote_of(source), remote_of(path))):
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(old, new)
  return path


def commit_step(repo: Repo, owner: str, step: int, branch: str = "main") -> str:
  """Takes one folder of a branch to a step, whatever others do to the rest.

  Args:
    repo: the repository.
    owner: whose folder.
    step: the step.
    branch: the branch.
  """
  while True:
    tip = repo.resolve(branch)
    params = repo.checkout(tip, like=like(repo, tip))
    params[owner] = folder_of(owner, step)
    try:
      return repo.commit(
        params,
        message=f"{owner} {step}",
        author=owner,
        branch=branch,
        parents=[tip],
        retry=True,
      )
    except ConflictError:
      continue  # the step before was not ours: there is nothing to add to


def like(repo: Repo, ref: str) -> dict[str, dict[str, Any]]:
  """Returns the structure of a version, for a checkout on the host.

  Args:
    repo: the repository.
    ref: the version.
  """
  found: dict[str, dict[str, Any]] = {}
  for name, leaf in repo.tree(ref).items():
    owner, part = name.split("/")
    found.setdefault(owner, {})[part] = np.zeros(leaf.shape, leaf.dtype)
  return found


def merge(repo: Repo) -> None:
  """Merges `left` and `right` into `main`, however often `main` moves."""
  while True:
    try:
      repo.merge(
        "main",
        ["left", "right"],
        method=patchjax.merging.task_arithmetic(scale=1.0),
        message="merge",
      )
      return
    except ConflictError:
      continue


def push(repo: Repo) -> None:
  """Pushes two branches, and all tags.

  Args:
    repo: the repository.
  """
  repo.push(remote_of(repo.path), ["main", "left"], tags=True)


VERBS: dict[str, Callable[[Repo], Any]] = {
  "commit": lambda repo: commit_step(repo, "base", 3),
  "commit (blob)": lambda repo: commit_step(repo, "right", 2, "right"),
  "merge": merge,
  "repack": lambda repo: repo.repack(),
  "gc": lambda repo: repo.gc(grace=600.0),
  "push": push,
}
"""What may be killed: verbs, each on the history that `build` makes."""


def problems(repo: Repo) -> list[str]:
  """Returns what is not as it must be, of every version of a repository.

  Args:
    repo: the repository, freshly opened.
  """
  found = []
  refs = {**repo.branches(), **repo.tags()}
  commits = {c.id: c for ref in refs.values() for c in repo.log(ref)}
  trees = {c.id: repo.objects.tree(c.tree) for c in commits.values()}
  for commit in commits.values():
    before = [trees[parent] for parent in commit.parents]
    if trees[commit.id] != _expected(commit.message, before):
      found.append(f"commit {commit.id[:12]} is not {commit.message!r}")
  for ref, id_ in refs.items():
    found += [f"{ref}: {what}" for what in _wrong_bits(repo, id_)]
  report = repo.fsck()
  if not report.ok:
    found.append(str(report))
  return found


def _wrong_bits(repo: Repo, id_: str) -> list[str]:
  """Returns the folders of a version that are not what their steps say."""
  found = repo.checkout(id_, like=like(repo, id_))
  if "common" not in found:
    same = np.array_equal(found["base"]["data"], alone()["base"]["data"])
    return [] if same else ["base"]
  theirs = found.pop("common")["data"]
  sides = [side for side in ("left", "right") if found[side]["step"]]
  # Only their merge has both.
  bad = [] if np.array_equal(theirs, common(*sides)["data"]) else ["common"]
  for owner, folder in found.items():
    wanted = folder_of(owner, int(folder["step"]))
    if any(not np.array_equal(wanted[k], folder[k]) for k in wanted):
      bad.append(owner)
  return bad


def _expected(message: str, parents: list[Entries]) -> Entries:
  """Returns the leaves that a version must have."""
  if message == "first":
    first = dict(_of_sides())
    for owner in ("base", "left", "right", *WRITERS):
      first |= _of_owner(owner, 0)
    return first
  if message == "alone":
    return _entries("base", alone()["base"])
  first = dict(parents[0])
  if message == "merge":
    for name, parent in zip(("left", "right"), parents[1:], strict=True):
      first |= {k: e for k, e in parent.items() if k.startswith(f"{name}/")}
    return {**first, **_of_sides("left", "right")}
  owner, step = message.split()
  if (owner, step) in (("left", "1"), ("right", "1")):
    first |= _of_sides(owner)
  return {**first, **_of_owner(owner, int(step))}


def aftermath(path: str, verb: str) -> list[str]:
  """Returns what is wrong after an accident: nothing, one hopes.

  The repository opens, every version is what it must be, fsck is content; then
  the next commit works, and gc does, and leaves nothing over. After a push the
  other repository is looked at, too, and the next push makes it complete.

  Args:
    path: the repository; the one that it is pushed to lies beside it.
    verb: what met with the accident.
  """
  found = problems(Repo(path))
  repo = Repo(path)
  next_ = commit_step(repo, "base", 13)
  if not np.array_equal(
    repo.checkout(next_, only="base/data")["base"]["data"],
    folder_of("base", 13)["data"],
  ):
    found.append("the next commit has other bits")
  places = [path]
  if verb == "push":
    places.append(remote_of(path))
    found += problems(Repo(remote_of(path)))
    push(repo)
    there, here = Repo(remote_of(path)).branches(), repo.branches()
    if there != {name: here[name] for name in ("left", "main")}:
      found.append("the next push left something out")
  for place in places:
    repo = Repo(place)
    repo.gc(grace=0)
    report = repo.fsck()
    found += [] if report.ok else [f"after gc: {report}"]
    found += [f"after gc: {x}" for x in report.leftovers + report.dangling]
  return found


def warm_up() -> None:
  """Imports and computes beforehand what forked children would repeat."""
  from orbax.checkpoint import v1

  del v1  # the children find it imported
  for module in pkgutil.walk_packages(patchjax.__path__, "patchjax."):
    if not module.name.endswith("__main__"):
      importlib.import_module(module.name)
  values()
  for step in (0, 1, 2, 3, 6, 7, 13):
    _of_owner("base", step)
  for owner in ("left", "right", *WRITERS):
    for step in range(3):
      _of_owner(owner, step)
  for sides in ((), ("left",), ("right",), ("left", "right")):
    _of_sides(*sides)
