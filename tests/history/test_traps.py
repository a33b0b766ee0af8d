"""Traps of the storage layers below, and bad input: each guarded."""

import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import patchjax as pj
from patchjax.history import Repo, index, payloads
from patchjax.trees import errors

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def flip(path, position, bit=0):
  with open(path, "r+b") as file:
    file.seek(position)
    octet = file.read(1)[0]
    file.seek(position)
    file.write(bytes([octet ^ (1 << bit)]))


def files_below(path):
  return sorted(
    os.path.join(folder, name)
    for folder, _, names in os.walk(path)
    for name in names
  )


# Names.


def test_dotted_and_nested_keys_do_not_collide(repo):
  value = {
    "a.b": LARGE + 1,
    "a": {"b": LARGE + 2},
    "a/b": LARGE + 3,
    "~": {"": LARGE + 4, "..": LARGE + 5, "\n\x00": LARGE + 6},
    "üñ %41": LARGE + 7,
  }
  repo.commit(value, message="names")
  assert repo.index.packs()[0].startswith("payloads/")
  found = repo.checkout(like=value)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, value))
  assert repo.fsck().ok


def test_integer_and_string_keys_that_collide_are_refused(repo):
  with pytest.raises(errors.StructureError, match="keys"):
    repo.commit({"x": {1: LARGE}, "y": [{"1": LARGE, 1: LARGE}]}, message="")
  assert repo.branches() == {}


def test_integer_keys_come_back_in_the_users_tree(repo):
  value = {0: LARGE, 1: [LARGE + 1, (LARGE + 2,)]}
  repo.commit(value, message="integers")
  found = repo.checkout(like=value)
  assert jax.tree.structure(found) == jax.tree.structure(value)
  assert np.array_equal(found[1][1][0], value[1][1][0])


def test_a_bare_array_is_a_value(repo):
  repo.commit(LARGE, message="bare")
  assert np.array_equal(repo.checkout(like=LARGE), LARGE)


def test_names_that_are_no_text_are_refused(repo):
  with pytest.raises(errors.DtypeError, match="Unicode"):
    repo.commit({"\udc80": LARGE}, message="surrogate")


# Leaves.


def test_empty_trees_are_refused(repo):
  for value in ({}, [], None, {"a": None}, {"f": np.sum}):
    with pytest.raises(errors.StructureError, match="no leaves"):
      repo.commit(value, message="empty")
  assert repo.branches() == {}


def test_leaves_without_bits_are_all_listed(repo):
  deleted = jax.numpy.ones(3)
  deleted.delete()
  value = {
    "good": np.ones(2),
    "abstract": jax.ShapeDtypeStruct((2,), np.float32),
    "deleted": deleted,
    "objects": np.array([None, 1], object),
    "text": np.array(["a"]),
  }
  with pytest.raises(errors.DtypeError) as info:
    repo.commit(value, message="bad")
  for name in ("abstract", "deleted", "objects", "text", "nothing was"):
    assert name in str(info.value)
  assert "good" not in str(info.value)
  assert files_below(repo.path) == [repo.files.path("patchjax.json")]


def test_traced_values_are_refused(repo):
  with pytest.raises(errors.DtypeError, match="outside of jit"):
    jax.jit(lambda x: repo.commit({"x": x}, message="traced"))(np.ones(2))


def test_what_is_no_array_is_left_out_aloud(repo):
  value = {"w": np.ones(2, np.float32), "step": 3, "activation": np.tanh}
  with pytest.warns(UserWarning, match="step = 3"):
    repo.commit(value, message="mixed")
  assert list(repo.tree()) == ["w"]
  assert repo.checkout(like=value)["step"] == 3


# Orbax below.


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


# Damage and its repair.


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


def test_unreferenced_things_are_listed_as_harmless(repo):
  first = repo.commit({"x": LARGE}, message="start")
  repo.commit({"x": LARGE + 1}, message="lost")
  repo.files.swap(
    "refs/heads/main",
    old=f"{repo.resolve('main')}\n".encode(),
    new=f"{first}\n".encode(),
  )
  open(repo.files.path("objects/.tmp-1-x"), "w").close()
  os.makedirs(repo.files.path("payloads/1.orbax-checkpoint-tmp"))
  report = repo.fsck()
  assert report.ok
  assert any(d.startswith("commit") for d in report.dangling)
  assert any(d.startswith("payloads") for d in report.dangling)
  assert len(report.leftovers) == 2


# Refs.


def test_a_lost_swap_is_noticed(repo):
  repo.commit({"x": LARGE}, message="start")
  old = repo.files.read("refs/heads/main")
  assert repo.files.swap("refs/heads/main", old=old, new=b"1\n")
  assert not repo.files.swap("refs/heads/main", old=old, new=b"2\n")
  assert not repo.files.swap("refs/heads/main", old=None, new=b"2\n")
  assert not repo.files.swap("refs/heads/other", old=old, new=b"2\n")
  assert repo.files.read("refs/heads/main") == b"1\n"


def test_a_lock_that_a_killed_writer_left_is_no_obstacle(repo):
  repo.commit({"x": LARGE}, message="start")
  for name in ("main", "other"):
    open(repo.files.path(f"refs/heads/{name}.__lock"), "w").close()
  assert list(repo.branches()) == ["main"]
  repo.commit({"x": LARGE}, message="next")
  repo.branch("other")
  assert repo.fsck().ok


# Disks.


def test_unwritable_paths(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError):
    Repo.init(tmp_path / "file" / "repo")


def test_a_folder_that_cannot_be_created_is_told_at_once(repo):
  first = repo.commit({"x": LARGE[0]}, message="a blob")
  open(repo.files.path("payloads"), "w").close()
  with pytest.raises(errors.RepositoryError, match="make the path writable"):
    repo.commit({"x": LARGE}, message="a checkpoint")
  assert repo.resolve("main") == first


@pytest.mark.parametrize("limit", [100, 3_000, 150_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, limit):
  """Files larger than `limit` cannot be written, as on a disk that fills up."""
  path = tmp_path / "repo"
  repo = Repo.init(path)
  first = repo.commit({"x": LARGE}, message="start")
  program = (
    "import resource, signal, sys, numpy as np;"
    "from patchjax.history import Repo;"
    "from patchjax.trees.errors import PatchjaxError;"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    f"repo = Repo({str(path)!r}); repo.checkout();"
    "import orbax.checkpoint.v1;"
    f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
    "x = np.random.default_rng(5).standard_normal((200, 300));"
    "\ntry: repo.commit({'x': x}, message='too large')"
    "\nexcept (PatchjaxError, OSError) as error: print(error); sys.exit(7)"
  )
  program = program.replace(
    "import orbax.checkpoint.v1", "from orbax.checkpoint import v1"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=False
  )
  assert done.returncode == 7, done.stderr
  assert Repo(path).resolve("main") == first
  report = Repo(path).fsck()
  assert report.ok, str(report)
  assert report.leftovers == ()
  Repo(path).commit({"x": LARGE + 1}, message="room again")
  assert Repo(path).fsck().ok
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


# Export.


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


def test_value_ids_are_those_of_the_trees_package(repo):
  value = {"a": {"x": LARGE}, "b": jax.random.key(3)}
  repo.commit(value, message="start")
  assert repo.show().tree == pj.trees.tree_id(value)
