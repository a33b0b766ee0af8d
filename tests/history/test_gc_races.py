"""gc in a process of its own, at the worst moments of others."""

import hashlib
import os
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import basing, chains, index
from patchjax.history.upkeep import bins
from tests.history.accidents import files_below

WEEKS = 7 * 86400.0


def near(x, seed):
  noise = np.random.default_rng(seed).standard_normal(x.shape)
  return (x * (1 + 1e-3 * noise)).astype(x.dtype)


def age(repo, seconds=3 * WEEKS):
  """Makes everything as old as if written long ago."""
  then = time.time() - seconds
  for path in files_below(repo.path):
    os.utime(path, (then, then))


def collect(repo, *options):
  """Runs gc in a process of its own; returns what it printed."""
  command = [sys.executable, "-m", "patchjax.cli", "-C", repo.path, "gc"]
  done = subprocess.run(
    [*command, *options], capture_output=True, text=True, check=True
  )
  return done.stdout


@pytest.fixture
def raced(tmp_path, monkeypatch):
  """A leaf that two writers wrote, one as a difference to what was lost.

  Yields the repository, the value of main, and the digest of the lost base,
  which stays in memory.
  """
  # One difference in every word is enough to start from below it.
  monkeypatch.setattr(chains, "HEAVY", 1)
  x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
  value, lost = {"x": x}, {"x": jnp.asarray(near(x, 1))}
  start = {"x": near(x, 2)}
  few = {"x": start["x"].copy()}
  few["x"][0, :5] += 1
  repo = Repo.init(tmp_path / "repo")
  for step in (start, few, value):
    repo.commit(step, message="step")
  other = Repo.init(tmp_path / "other")
  for step in (lost, value):
    other.commit(step, message="step")
  repo.index.refresh()
  digest = repo.tree()["x"].digest
  [place] = repo.index.find([digest])[digest]
  # As a repack leaves it: the place that a gc prefers.
  index.write(repo.files, place.pack, index.spell([place]), generation=1)
  # The other writer's branch was removed since, and all memory of it.
  for pack in other.index.packs():
    shutil.copytree(other.files.path(pack), repo.files.path(pack))
  repo.index.refresh()
  places = repo.index.find([digest])[digest]
  base = other.tree("main~1")["x"].digest
  assert [(p.base == base, p.depth) for p in places] == [(True, 1), (False, 2)]
  age(repo)
  yield repo, value, base
  del lost


def test_a_base_that_was_chosen_stays(raced, monkeypatch):
  """gc comes when the base was read, before the difference is there."""
  repo, value, base = raced
  writer, said = repo.writer, []
  save = writer._save

  def racing(*arguments):
    said.append(collect(repo))
    return save(*arguments)

  monkeypatch.setattr(writer, "_save", racing)
  new = {"x": near(value["x"], 3)}
  repo.commit(new, message="more")
  assert said
  opened = Repo(repo.path)
  np.testing.assert_array_equal(opened.checkout()["x"], new["x"])
  digest = opened.tree()["x"].digest
  assert opened.index.find([digest])[digest][0].base == base
  assert opened.fsck().ok, str(opened.fsck())
  collect(repo)
  np.testing.assert_array_equal(Repo(repo.path).checkout()["x"], new["x"])


def test_a_base_that_is_gone_already_is_none(raced, monkeypatch):
  """gc comes after the look at the index, and the base is in memory."""
  repo, value, base = raced
  choose, said = basing.bases, []

  def racing(*arguments):
    found = choose(*arguments)
    assert [place.digest for place in found.values()] == [base]
    said.append(collect(repo))
    return found

  monkeypatch.setattr(basing, "bases", racing)
  new = {"x": near(value["x"], 3)}
  repo.commit(new, message="more")
  assert "1 payload" in said[0], said
  opened = Repo(repo.path)
  np.testing.assert_array_equal(opened.checkout()["x"], new["x"])
  assert opened.fsck().ok, str(opened.fsck())


_PUSH = """
import sys
from patchjax.history import Repo
Repo(sys.argv[1]).push(sys.argv[2])
"""


@pytest.fixture
def interrupted(tmp_path):
  """A repository, and the leftover of a push from it, three weeks old."""
  x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
  repo = Repo.init(tmp_path / "repo")
  repo.commit({"x": x}, message="start")
  there = Repo.init(tmp_path / "there")
  [pack] = repo.index.packs()
  shutil.copytree(repo.files.path(pack), there.files.path(pack))
  os.unlink(there.files.path(f"{pack}/{index.INDEX}"))
  age(there)
  for folder, _, _ in os.walk(there.path):
    os.utime(folder, (0, 0))
  return repo, there, there.files.path(pack)


def push(repo, there):
  command = [sys.executable, "-c", _PUSH, repo.path, there.path]
  subprocess.run(command, check=True)


def test_a_leftover_that_somebody_goes_on_with_stays(interrupted, monkeypatch):
  """A push is resumed when gc has looked, and goes on to delete."""
  repo, there, _ = interrupted
  real, times = bins.LocalBin.stale, []

  def racing(bin_, key):
    found = real(bin_, key)
    if key.startswith("payloads/"):
      push(repo, there)
      times.append(found)
    return found

  monkeypatch.setattr(bins.LocalBin, "stale", racing)
  assert there.gc().removed == ()
  assert times == [True]
  opened = Repo(there.path)
  assert np.array_equal(opened.checkout()["x"], repo.checkout()["x"])
  assert opened.fsck().ok and not opened.fsck().leftovers


def test_a_push_may_come_while_a_leftover_is_away(interrupted, monkeypatch):
  """The payload is made anew beside what gc has renamed."""
  repo, there, path = interrupted
  real, calls = bins.newest, []

  def racing(at, **options):
    if bins._REMOVED in at and not calls:
      push(repo, there)
      calls.append(at)
      # As if the push had freshened it just before it was renamed.
      os.utime(at)
    return real(at, **options)

  monkeypatch.setattr(bins, "newest", racing)
  there.gc()
  assert calls
  opened = Repo(there.path)
  assert np.array_equal(opened.checkout()["x"], repo.checkout()["x"])
  assert opened.fsck().ok and not opened.fsck().leftovers


def test_what_a_killed_gc_had_in_hand_is_given_back(interrupted):
  repo, there, path = interrupted
  folder, name = os.path.split(path)
  away = os.path.join(folder, f"{bins._REMOVED}{'0' * 32}-{name}")
  os.rename(path, away)
  for file in files_below(away):
    os.utime(file)
  there.gc()
  assert files_below(path) and not os.path.exists(away)
  push(repo, there)
  opened = Repo(there.path)
  assert np.array_equal(opened.checkout()["x"], repo.checkout()["x"])
  assert opened.fsck().ok


def test_a_leftover_nobody_goes_on_with_goes(interrupted):
  _, there, path = interrupted
  assert [item.kind for item in there.gc().removed] == ["leftover"]
  assert not os.path.exists(path)


_READER = """
import hashlib, sys
import numpy as np
from patchjax.history import Repo
from patchjax.history.arrays import index

repo = Repo(sys.argv[1])
opened = repo.open("other")
real = index.Index.refresh

def refresh(self):
  real(self)
  index.Index.refresh = real
  print("knows", flush=True)
  sys.stdin.readline()

index.Index.refresh = refresh
if sys.argv[2] == "whole":
  found = repo.checkout("other")["x"]
else:
  found = opened["x"][:]
print(hashlib.sha256(np.asarray(found).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("how", ["whole", "region"])
def test_who_knows_an_old_place_reads_the_new_one(tmp_path, how):
  """What a repack replaced goes at once, though it was written just now."""
  x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
  repo = Repo.init(tmp_path / "repo")
  repo.commit({"x": x}, message="one")
  other = {"x": near(x, 1)}
  repo.commit(other, message="two", branch="other", parents=[])
  old = set(repo.index.packs())
  report = repo.repack()
  assert "the old ones go with the next `gc`" in str(report)
  reader = subprocess.Popen(
    [sys.executable, "-c", _READER, repo.path, how],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert reader.stdout is not None
  assert reader.stdout.readline() == "knows\n"
  assert "1 superseded" in collect(repo)
  assert not old <= set(Repo(repo.path).index.packs())
  found, _ = reader.communicate("go on\n", timeout=60)
  assert found.strip() == hashlib.sha256(other["x"].tobytes()).hexdigest()
