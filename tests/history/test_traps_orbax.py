"""Traps of Orbax below: what it casts, cuts, leaves unfinished."""

import concurrent.futures
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from patchjax.history import Repo
from patchjax.history.arrays import index, payloads
from patchjax.trees import errors

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_snapshots_open_with_plain_orbax(repo):
  value = {
    "encoder": {"layer": [{"kernel": LARGE, "bias": LARGE[0]}]},
    "twin": {"bias": LARGE[0].copy()},
    "int4": np.ones((3, 3), "int4"),
    "empty": np.zeros((0, 2), np.float32),
  }
  repo.commit(value, message="snapshot")
  [pack] = repo.index.packs()
  found = ocp.load(repo.files.path(pack))
  assert set(found) == {
    "encoder/layer/0/kernel",
    "encoder/layer/0/bias",
    "twin/bias",
    "int4",
  }
  kernel = found["encoder/layer/0/kernel"]
  assert kernel.dtype == np.float32
  assert np.array_equal(kernel, LARGE)
  assert np.array_equal(found["twin/bias"], LARGE[0])


def test_a_value_that_orbax_would_cast_or_cut_is_refused(repo):
  repo.commit({"x": LARGE}, message="start")
  [pack] = repo.index.packs()
  data = repo.files.read(f"{pack}/{index.INDEX}")
  for wrong in (LARGE.astype(np.float16), LARGE[:100], {"y": LARGE}):
    shutil.rmtree(repo.files.path(pack))
    arrays = wrong if isinstance(wrong, dict) else {"x": wrong}
    payloads.save(repo.files.path(pack), arrays)
    repo.files.write(f"{pack}/{index.INDEX}", data)
    with pytest.raises(errors.IntegrityError, match="x: float32"):
      repo.checkout()
    assert not repo.fsck().ok


def test_export_is_a_plain_checkpoint(repo, tmp_path):
  value = {
    "a": {"kernel": LARGE, "key": jax.random.key(0)},
    "empty": np.zeros((0, 2), np.float32),
  }
  commit = repo.commit(value, message="start")
  repo.export("main", tmp_path / "plain")
  found = ocp.load(tmp_path / "plain")
  assert np.array_equal(found["a"]["kernel"], LARGE)
  assert found["a"]["key"].tolist() == [0, 0]
  remarks = ocp.metadata(tmp_path / "plain").custom_metadata
  assert remarks["commit"] == commit
  assert remarks["words"] == {"a/key": "key<fry>"}
  assert list(remarks["zero_size"]) == ["empty"]
  with pytest.raises(errors.RepositoryError, match="exists already"):
    repo.export("main", tmp_path / "plain")


def test_export_keeps_colliding_names_apart(repo, tmp_path):
  value = {"a.b": LARGE, "a": {"b": LARGE + 1}}
  repo.commit(value, message="start")
  repo.export("main", tmp_path / "plain")
  found = ocp.load(tmp_path / "plain")
  assert np.array_equal(found["a.b"], LARGE)
  assert np.array_equal(found["a/b"], LARGE + 1)


def test_what_a_killed_save_left_is_in_nobodys_way(repo):
  """Orbax's temporary names follow from the path: so paths never recur."""
  repo.commit({"x": LARGE}, message="start")
  [first] = repo.index.packs()
  os.makedirs(repo.files.path(f"{first}.orbax-checkpoint-tmp"))
  shutil.rmtree(repo.files.path(first))
  repo.commit({"x": LARGE}, message="again")
  [second] = repo.index.packs()
  assert second != first
  assert np.array_equal(repo.checkout()["x"], LARGE)


def test_two_saves_at_once_do_not_meet(repo):
  values = [{"x": LARGE + i} for i in range(4)]
  for i in range(4):
    repo.commit({"b": LARGE[0] + i}, message="b", branch=f"b{i}", parents=[])

  def commit(i):
    mine = Repo(repo.path)
    return mine.commit(values[i], message=f"{i}", branch=f"b{i}")

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    commits = list(threads.map(commit, range(4)))
  for value, made in zip(values, commits, strict=True):
    assert np.array_equal(repo.checkout(made)["x"], value["x"])


def test_one_module_alone_saves_with_orbax():
  """Elsewhere nobody can forget to wait for a save, or reuse its path."""
  history = pathlib.Path(payloads.__file__).parent
  saving = {
    path.name
    for path in history.rglob("*.py")
    if re.search(r"\bocp\.save|\bsave_async\b", path.read_text())
  }
  assert saving == {"payloads.py"}
