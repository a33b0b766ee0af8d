"""Random work in several repositories that fetch from and push to each other.

After every step each repository is whole, and each ref names the value that
was committed under its id, whatever was cut, merged, collected or forced.
"""

import contextlib

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS
from patchjax.trees.errors import ConflictError, IntegrityError, RepositoryError

NAMES = ("a", "b", "c")
BRANCHES = ("main", "dev")
STEPS = 45


class World:
  """Three repositories, and what was ever committed in any of them."""

  def __init__(self, folder, seed):
    self.rng = np.random.default_rng(seed)
    self.repos = {name: Repo.init(folder / name) for name in NAMES}
    self.values = {}
    self.refused = 0
    for name, repo in self.repos.items():
      for other in NAMES:
        if other != name:
          repo.add_remote(other, self.repos[other].path)

  def pick(self, items):
    return items[int(self.rng.integers(len(items)))]

  def step(self):
    name = self.pick(NAMES)
    other = self.pick([each for each in NAMES if each != name])
    verb = self.pick(
      ("commit", "commit", "commit", "merge", "push", "push", "fetch", "pull")
      + ("depth", "complete", "gc", "tag", "force", "only")
    )
    try:
      getattr(self, verb)(self.repos[name], other, self.pick(BRANCHES))
    except (ConflictError, RepositoryError):
      self.refused += 1
    return verb

  def commit(self, repo, other, branch, parents=None):
    tip = repo.refs.get(HEADS, branch)
    if tip is None and repo.branches():
      repo.branch(branch, self.pick(sorted(repo.branches().values())))
      tip = repo.refs.get(HEADS, branch)
    x = dict(self.values.get(tip, {"a": np.zeros(3), "b": np.zeros(5)}))
    leaf = self.pick(sorted(x))
    x[leaf] = self.rng.integers(0, 9, x[leaf].shape).astype(float)
    if self.rng.random() < 0.2:
      # Large enough to be held as a difference, and in a payload of its own.
      x["large"] = self.rng.standard_normal(20_000)
    elif "large" in x and self.rng.random() < 0.3:
      x["large"] = x["large"] + 1e-3 * self.rng.standard_normal(20_000)
    made = repo.commit(
      x, message=f"{len(self.values)}", branch=branch, parents=parents
    )
    self.values[made] = x

  def merge(self, repo, other, branch):
    tips = [repo.refs.get(HEADS, branch), *repo.refs.all(REMOTES).values()]
    if tips[0] is not None and len(tips) > 1:
      second = self.pick(tips[1:])
      self.commit(repo, other, branch, parents=[tips[0], second])

  def push(self, repo, other, branch):
    repo.push(other, [branch], tags=self.rng.random() < 0.5)

  def force(self, repo, other, branch):
    repo.push(other, [branch], force=True)

  def fetch(self, repo, other, branch):
    repo.fetch(other, prune=self.rng.random() < 0.5)

  def pull(self, repo, other, branch):
    repo.pull(other, branch)

  def depth(self, repo, other, branch):
    repo.fetch(other, depth=int(self.rng.integers(1, 4)))

  def only(self, repo, other, branch):
    repo.fetch(other, only=self.pick(("a", "a|b")))

  def complete(self, repo, other, branch):
    repo.fetch(other, complete=True)

  def gc(self, repo, other, branch):
    repo.gc(grace=0)

  def tag(self, repo, other, branch):
    repo.tag(f"t{len(self.values)}-{self.rng.integers(99)}", branch)

  def check(self, verb):
    for name, repo in self.repos.items():
      repo = self.repos[name] = Repo(repo.path)
      report = repo.fsck()
      assert report.ok, f"{verb}, {name}: {report}"
      partial = any(remote.only for remote in repo.remotes().values())
      tips = {
        at for s in (HEADS, TAGS, REMOTES) for at in repo.refs.all(s).values()
      }
      for tip in tips:
        assert repo.log(tip)[0].id == tip
        if not partial:
          found = repo.checkout(tip)
          expected = self.values[tip]
          assert found.keys() == expected.keys()
          assert all(np.array_equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("seed", range(3))
def test_random_work_loses_nothing(tmp_path, seed):
  world = World(tmp_path, seed)
  for _ in range(STEPS):
    world.check(world.step())
  assert len(world.values) > 5 and world.refused < STEPS // 2
  # In the end everything can be had from anywhere that has it.
  for name in NAMES:
    for other in NAMES:
      if other != name:
        with contextlib.suppress(IntegrityError):  # it is partial itself
          world.repos[other].fetch(name, complete=True)
  world.check("all")
