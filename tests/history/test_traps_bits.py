"""Traps of bits: what is damaged never comes back as right."""

import errno
import os
import shutil
import sqlite3

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.trees import errors
from tests.history.accidents import files_below, flip

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_bit_flips_never_return_wrong_data(repo):
  tuned = LARGE * np.float32(1.0001)
  small = {"bias": np.arange(5, dtype=np.float32), "x": tuned}
  repo.commit({"bias": np.zeros(5, np.float32), "x": LARGE}, message="dense")
  repo.commit({**small, "bias": np.zeros(5, np.float32)}, message="planes")
  repo.commit(small, message="blob")
  repo.tag("v1")
  rng = np.random.default_rng(0)
  detected = harmless = 0
  names = [
    name
    for name in files_below(repo.path)
    if "/cache/" not in name and os.path.getsize(name)
  ]
  for name in names:
    size = os.path.getsize(name)
    for _ in range(3):
      position, bit = int(rng.integers(size)), int(rng.integers(8))
      flip(name, position, bit)
      try:
        fresh = Repo(repo.path)
        found = fresh.checkout("main", like=small)
        assert np.array_equal(found["x"], tuned)
        assert np.array_equal(found["bias"], small["bias"])
        if fresh.fsck().ok:
          harmless += 1  # metadata that nobody reads
        else:
          detected += 1
      except errors.PatchjaxError:
        detected += 1
      flip(name, position, bit)
  assert detected > len(names)
  assert Repo(repo.path).fsck().ok
  print(f"{detected} detected, {harmless} harmless")


def test_a_damaged_cache_is_rebuilt(repo):
  repo.commit({"x": LARGE}, message="start")
  repo.checkout()
  path = repo.files.path("cache/index.sqlite")
  for data in (b"", b"not a database" * 100, os.urandom(8192)):
    with open(path, "wb") as file:
      file.write(data)
    assert np.array_equal(Repo(repo.path).checkout()["x"], LARGE)
  shutil.rmtree(repo.files.path("cache"))
  assert np.array_equal(Repo(repo.path).checkout()["x"], LARGE)


def test_an_old_cache_that_cannot_be_written_is_no_obstacle(repo, monkeypatch):
  # As on a disk mounted read-only; permissions do not bind the root of a CI.
  repo.commit({"x": LARGE}, message="start")
  connect = sqlite3.connect

  def read_only(path, **options):
    if path != ":memory:":
      path, options["uri"] = f"file:{path}?mode=ro", True
    return connect(path, **options)

  def refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", path)

  monkeypatch.setattr(sqlite3, "connect", read_only)
  monkeypatch.setattr(os, "unlink", refuse)
  again = Repo(repo.path)
  assert np.array_equal(again.checkout()["x"], LARGE)
  assert again.fsck().ok


def test_a_missing_payload_is_named_and_can_be_repaired(repo):
  commit = repo.commit({"x": LARGE, "b": LARGE[0]}, message="start")
  [pack] = repo.index.packs()
  shutil.rmtree(repo.files.path(pack))
  with pytest.raises(errors.IntegrityError) as info:
    repo.checkout()
  for part in ("x: float32[200, 300]", "b: float32[300]", "to repair"):
    assert part in str(info.value)
  report = repo.fsck()
  assert not report.ok
  assert {p.kind for p in report.problems} == {"leaf"}
  assert commit[:12] in str(report)
  repo.commit({"x": LARGE, "b": LARGE[0]}, message="again")
  assert repo.fsck().ok
  assert np.array_equal(repo.checkout(commit)["x"], LARGE)


def test_a_second_place_stands_in_for_a_damaged_one(repo):
  repo.commit({"x": LARGE}, message="start")
  [pack] = repo.index.packs()
  copy = "payloads/" + "0" * 32
  shutil.copytree(repo.files.path(pack), repo.files.path(copy))
  shutil.rmtree(repo.files.path(f"{copy}/state"))
  assert np.array_equal(repo.checkout()["x"], LARGE)
  report = repo.fsck()
  assert not report.ok
  assert "another place holds the leaf" in report.problems[0].repair
  shutil.rmtree(repo.files.path(copy))
  assert repo.fsck().ok


def test_missing_and_damaged_objects_are_named(repo):
  commit = repo.commit({"a": {"x": LARGE}}, message="start")
  tree = repo.show().tree
  path = repo.files.path(f"objects/{tree[:2]}/{tree[2:]}")
  flip(path, 5)
  with pytest.raises(errors.IntegrityError, match=f"object {tree} is damaged"):
    Repo(repo.path).checkout()
  report = Repo(repo.path).fsck()
  assert [p.kind for p in report.problems] == ["object"]
  os.unlink(path)
  with pytest.raises(errors.IntegrityError, match=f"object {tree} is missing"):
    Repo(repo.path).checkout()
  assert commit[:12] in str(Repo(repo.path).fsck())
  repo = Repo(repo.path)
  with pytest.raises(errors.IntegrityError):
    repo.commit({"a": {"x": LARGE}}, message="on a damaged parent")
  repo.commit({"a": {"x": LARGE}}, message="x", branch="mend", parents=[])
  assert repo.fsck().ok


def test_a_damaged_ref_is_named(repo):
  repo.commit({"x": LARGE}, message="start")
  path = repo.files.path("refs/heads/main")
  for data in (b"", b"abc\n", b"\xff" * 65):
    with open(path, "wb") as file:
      file.write(data)
    with pytest.raises(errors.IntegrityError, match="'main' is damaged"):
      repo.show()
    assert [p.kind for p in repo.fsck().problems] == ["ref"]
  with open(path, "wb") as file:
    file.write(b"0" * 64 + b"\n")
  with pytest.raises(errors.IntegrityError, match="missing"):
    repo.show()
  assert not repo.fsck().ok


def test_a_damaged_parent_does_not_stop_a_good_commit(repo):
  repo.commit({"x": LARGE}, message="start")
  [pack] = repo.index.packs()
  shutil.rmtree(repo.files.path(f"{pack}/state"))
  repo.commit({"x": LARGE * np.float32(1.0001)}, message="tuned")
  assert np.array_equal(repo.checkout()["x"], LARGE * np.float32(1.0001))
