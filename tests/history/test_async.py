"""Commits in the background: captured at once, never lost without a word."""

import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import patchjax as pj
from patchjax.history import Repo
from patchjax.trees.errors import (
  ConflictError,
  DtypeError,
)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_it_commits_what_commit_would(repo, mesh_explicit):
  host = {"a": {"b": np.arange(60_000.0)}, "c": np.float32([1, -0.0])}
  sharded = jax.device_put(
    np.ones((8, 6), np.float32), NamedSharding(mesh_explicit, P("x", "y"))
  )
  value = {**host, "s": sharded, "key": jax.random.key(3), "step": 7}
  commit = repo.commit_async(value, message="one").result()
  assert repo.resolve("main") == commit
  with Repo.temporary() as other:
    want = other.commit(value, message="one")
    assert other.show(want).tree == repo.show(commit).tree
  found = repo.checkout(commit, like=value)
  assert found["s"].sharding == sharded.sharding
  assert found["step"] == 7


def test_what_happens_to_the_value_later_does_not_matter(repo):
  x = jnp.arange(100_000.0)
  y = np.arange(100_000, dtype=np.int32)
  want = np.asarray(x).copy(), y.copy()
  pending = repo.commit_async({"x": x, "y": y}, message="captured")
  y[:] = 0
  jax.jit(lambda x: x + 1, donate_argnums=0)(x)
  x.delete()
  found = repo.checkout(
    pending.result(), like={"x": jnp.zeros(100_000), "y": y}
  )
  assert np.array_equal(found["x"], want[0])
  assert np.array_equal(found["y"], want[1])


def test_commits_follow_each_other(repo):
  pending = [
    repo.commit_async({"x": np.full(3, i)}, message=str(i)) for i in range(4)
  ]
  ids = [commit.result() for commit in pending]
  assert [c.id for c in repo.log()] == ids[::-1]
  assert all(commit.done() for commit in pending)


def test_unchanged_arrays_are_known_and_not_copied(repo, monkeypatch):
  value = {"x": jnp.arange(9.0), "y": jnp.ones(3)}
  repo.commit_async(value, message="first").result()
  from patchjax.history.arrays import pending

  copied = []
  real = pending._copy
  monkeypatch.setattr(
    pending, "_copy", lambda x: copied.append(x.shape) or real(x)
  )
  repo.commit_async({**value, "y": jnp.zeros(3)}, message="second").result()
  assert copied == [(3,)]
  assert np.array_equal(repo.checkout()["x"], value["x"])


def test_a_patch_is_committed_too(repo):
  base = {"w": np.float32([1, 2])}
  repo.commit(base, message="base")
  patch = pj.diff(base, {"w": np.float32([1, 4])})
  repo.commit_async(patch, message="patch").result()
  assert repo.checkout()["w"].tolist() == [1, 4]


def test_errors_surface_in_result(repo):
  first = repo.commit({"x": np.zeros(3)}, message="first")
  repo.commit({"x": np.ones(3)}, message="second")
  late = repo.commit_async({"x": np.ones(4)}, message="late", parents=[first])
  for _ in range(2):  # asked again, it says so again
    with pytest.raises(ConflictError, match="is at"):
      late.result()
  with pytest.raises(ConflictError):
    with repo.commit_async({"x": np.ones(4)}, message="x", parents=[first]):
      pass
  with pytest.raises(ZeroDivisionError) as raised:
    with repo.commit_async({"x": np.ones(4)}, message="x", parents=[first]):
      raise ZeroDivisionError
  assert "failed too" in raised.value.__notes__[0]
  # What cannot be captured is refused at once.
  gone = jnp.ones(3)
  gone.delete()
  with pytest.raises(DtypeError, match="deleted"):
    repo.commit_async({"x": gone}, message="gone")
  assert repo.show().title == "second"


def test_a_timeout_leaves_it_running(repo, monkeypatch):
  go = threading.Event()
  real = Repo.commit
  monkeypatch.setattr(
    Repo, "commit", lambda *a, **k: go.wait(60) and real(*a, **k)
  )
  pending = repo.commit_async({"x": np.ones(3)}, message="slow")
  with pytest.raises(TimeoutError, match="'slow'"):
    pending.result(timeout=0.01)
  assert not pending.done()
  go.set()
  assert pending.result() == repo.resolve("main")


FORGETFUL = """
import sys, numpy as np
from patchjax.history import Repo
repo = Repo(sys.argv[1])
for step in range(int(sys.argv[2])):
  value = {"x": np.random.default_rng(step).standard_normal((512, 512))}
  pending = repo.commit_async(value, message=f"step {step}")
if sys.argv[3] == "wait":
  pending.result()
"""


@pytest.mark.parametrize("count, wait", [(1, "no"), (3, "no"), (2, "wait")])
def test_a_process_that_does_not_wait_is_told(repo, count, wait):
  done = subprocess.run(
    [sys.executable, "-c", FORGETFUL, repo.path, str(count), wait],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  recorded = (
    {commit.title: commit.id for commit in repo.log()}
    if repo.branches()
    else {}
  )
  told = 0
  for step in range(count):
    title = f"step {step}"
    asked = wait == "wait" and step == count - 1
    if title in recorded:
      text = f"the commit {title!r}: it was recorded as {recorded[title]}"
    else:
      text = f"the commit {title!r}: it FAILED"
    assert (text in done.stderr) == (not asked), done.stderr
    told += not asked
  assert done.stderr.count("nobody waited") == told
  assert repo.fsck().ok
