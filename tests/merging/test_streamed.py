"""Merges out of core: the bits of a merge in memory, from files of any kind."""

import errno
import fcntl
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import ml_dtypes
import numpy as np
import pytest

import patchjax as pj
from patchjax.interop import source, tensors
from patchjax.interop.files import read
from patchjax.merging import files as merging_files
from patchjax.merging.files import merge_files
from patchjax.merging.streaming import journal, layout
from patchjax.merging.streaming.models import abstract_of, open_model
from patchjax.patches import engine
from patchjax.trees.errors import (
  ConflictError,
  DtypeError,
  FormatError,
  MismatchError,
  NonFiniteError,
  StructureError,
)
from tests.merging.models import same_bits

HERE = pathlib.Path(__file__).parent
TIES = pj.merging.ties(density=0.3)
MEAN = pj.merging.linear()


def model(seed, dtype=np.float32, spread=1.0):
  """Few values, so that many magnitudes tie; seed 0 is the base."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    x = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    return (spread * x.astype(np.float32)).astype(dtype)

  return {
    "embed": draw(64, 8),
    "layers": [{"w": draw(16, 8)} for _ in range(3)],
    "norm": draw(8),
    "step": np.int32([7]),
  }


def write(path, tree, *, shard_bytes=1 << 40):
  tensors.write(path, source.of_tree(tree), shard_bytes=shard_bytes)
  return path


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "in").mkdir()
  return tmp_path


def stored(folder, base, others, *, shard_bytes=1 << 40):
  """Models as files or as folders of shards; returns their paths."""
  paths = []
  for i, tree in enumerate([base, *others]):
    place = folder / "in" / str(i)
    place.mkdir()
    write(place / "model.safetensors", tree, shard_bytes=shard_bytes)
    paths.append(place)
  return paths[0], paths[1:]


def normal(tree):
  """As files hold it: dicts all the way."""
  if isinstance(tree, list):
    tree = {str(i): x for i, x in enumerate(tree)}
  if isinstance(tree, dict):
    return {key: normal(x) for key, x in tree.items()}
  return tree


def cast(tree, dtype):
  return jax.tree.map(
    lambda x: x if x.dtype == np.int32 else x.astype(dtype), tree
  )


# ---------------------------------------------------------------------------
# The same bits.


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_shards_in_and_out(folder, dtype):
  base, *others = trees = [normal(model(i, dtype)) for i in range(4)]
  start, given = stored(folder, trees[0], others, shard_bytes=700)
  assert len(list(start.iterdir())) > 3
  done = merge_files(start, given, TIES, folder / "out", shard_bytes=600)
  assert same_bits(read(folder / "out"), pj.merge(base, others, TIES))
  *shards, index = done.paths
  assert index.name == "model.safetensors.index.json" and len(shards) > 3
  assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
  places = json.loads(index.read_text())["weight_map"]
  assert set(places.values()) == {path.name for path in shards}
  # The order of keys is that of the base: its shards', then within each.
  assert list(places) == list(open_model(start).leaves)
  assert sorted(folder.iterdir()) == [folder / "in", folder / "out"]
  assert sorted((folder / "out").iterdir()) == sorted(done.paths)
  assert done.resumed == 0 and done.written < done.read


@pytest.mark.parametrize(
  "method",
  [
    pj.merging.ties(density=[0.3, 1.0]),
    pj.chain(
      pj.trim(density=0.2, exact_k=True, scope="tree"), pj.merging.mean()
    ),
    pj.chain(pj.trim(density=1e-9), pj.merging.mean()),
    pj.merging.median(),
    {"layers/.*": TIES, "embed": pj.merging.linear(weights=[1, 3])},
  ],
  ids=["densities", "ties_broken", "none_kept", "median", "by_selector"],
)
def test_methods(folder, method):
  base, *others = [normal(model(i, ml_dtypes.bfloat16)) for i in range(3)]
  start, given = stored(folder, base, others)
  merge_files(start, given, method, folder / "out.safetensors")
  wanted = pj.merge(base, others, method)
  assert same_bits(read(folder / "out.safetensors"), wanted)


@pytest.mark.parametrize(
  "method",
  [pj.chain(pj.trim(density=0.3), pj.merging.mean()), TIES],
  ids=["trim", "ties"],
)
def test_two_reads_find_the_cuts_of_a_tree(folder, monkeypatch, method):
  base, *others = [normal(model(i)) for i in range(3)]
  start, given = stored(folder, base, others)

  def passes(*args):
    raise AssertionError("another pass")

  monkeypatch.setattr(engine._Eager, "passes", passes)
  done = merge_files(start, given, method, folder / "out.safetensors")
  floats = sum(x.nbytes for x in jax.tree.leaves(base)) - 4
  # Of what has no mean, the base's and twice the contributors'.
  assert done.read == 3 * 3 * floats + done.read % floats
  assert done.read % floats < 40


def test_numbers_by_leaf(folder):
  base, *others = [normal(model(i)) for i in range(3)]
  start, given = stored(folder, base, others)
  rules = {"layers/.*": [0.0, 1.0]}
  scale = pj.merging.per_leaf(abstract_of(start), rules, default=0.5)
  method = pj.merging.task_arithmetic(scale=scale)
  merge_files(start, given, method, folder / "out.safetensors")
  found = read(folder / "out.safetensors")
  assert same_bits(found, pj.merge(base, others, method))
  assert same_bits(found["layers"]["0"], base["layers"]["0"])


@pytest.mark.parametrize(
  ("own", "to", "out"),
  [
    (np.float32, "bfloat16", None),
    (np.float32, None, "float16"),
    (np.float32, "float16", "float32"),
    (ml_dtypes.bfloat16, "float32", None),
    (ml_dtypes.bfloat16, "float32", "bfloat16"),
    (ml_dtypes.bfloat16, "float16", "bfloat16"),
  ],
)
def test_dtypes(folder, own, to, out):
  base, *others = [normal(model(i, own, 1.01)) for i in range(3)]
  start, given = stored(folder, base, others)
  merge_files(
    start, given, TIES, folder / "out.safetensors", dtype=to, out_dtype=out
  )
  found = read(folder / "out.safetensors")
  used = np.dtype(to or own)
  trees = [cast(x, used) for x in (base, *others)]
  if out is None or used == out:
    wanted = pj.merge(trees[0], trees[1:], TIES)
  else:
    # One rounding: what float32 bases give, for values that are the same.
    wide = [cast(x, np.float32) for x in trees]
    wanted = cast(pj.merge(wide[0], wide[1:], TIES), np.dtype(out))
  assert same_bits(found, wanted)


def test_models_of_several_dtypes_are_cast_to_one(folder):
  base, one, two = [normal(model(i, np.float32, 1.01)) for i in range(3)]
  eight = cast(one, ml_dtypes.float8_e4m3fn)
  start, given = stored(folder, base, [eight, cast(two, np.float16)])
  out = folder / "out.safetensors"
  with pytest.raises(MismatchError, match="float8_e4m3fn"):
    merge_files(start, given, MEAN, out)
  merge_files(start, given, MEAN, out, dtype="float32", out_dtype="float16")
  others = [cast(eight, np.float32), cast(cast(two, np.float16), np.float32)]
  wanted = cast(pj.merge(base, others, MEAN), np.float16)
  assert same_bits(read(out), wanted)


def test_eight_bit_floats(folder):
  base, *others = [normal(model(i, ml_dtypes.float8_e4m3fn)) for i in range(3)]
  start, given = stored(folder, base, others)
  merge_files(start, given, TIES, folder / "out.safetensors")
  wanted = pj.merge(base, others, TIES)
  assert same_bits(read(folder / "out.safetensors"), wanted)


def test_without_a_base(folder):
  one, two = [normal(model(i)) for i in range(2)]
  _, given = stored(folder, one, [one, two])
  merge_files(None, given, MEAN, folder / "out.safetensors")
  wanted = pj.merge(None, [one, two], MEAN)
  assert same_bits(read(folder / "out.safetensors"), wanted)
  with pytest.raises(StructureError, match="needs the base"):
    merge_files(None, given, TIES, folder / "none")


def test_patches_refs_and_arrays(folder):
  base, *others = [normal(model(i)) for i in range(4)]
  with pj.Repo.temporary() as repo:
    repo.commit(base, message="base")
    repo.branch("tuned")
    repo.commit(others[0], message="tuned", branch="tuned")
    exact, sums = folder / "exact.safetensors", folder / "sums.safetensors"
    pj.diff(base, others[1], exact=True).save(exact, base=base)
    pj.diff(base, others[2]).save(sums)
    given = [repo.open("tuned"), exact, sums, others[0]]
    out = folder / "out.safetensors"
    merge_files(repo.open("main"), given, TIES, out)
    every = [others[i] for i in (0, 1, 2, 0)]
    assert same_bits(read(out), pj.merge(base, every, TIES))
    # Changed by their law first, cast then; sums stay sums.
    merge_files(repo.open("main"), given[:2], TIES, out, dtype="bfloat16")
    low = [cast(x, ml_dtypes.bfloat16) for x in (base, *others)]
    assert same_bits(read(out), pj.merge(low[0], low[1:3], TIES))


def test_what_is_not_merged_is_the_bases(folder):
  base, *others = [normal(model(i)) for i in range(3)]
  start, given = stored(folder, base, others)
  out = folder / "out.safetensors"
  merge_files(start, given, MEAN, out, only="embed", out_dtype="bfloat16")
  wanted = pj.merge(base, others, MEAN, only="embed")
  assert same_bits(read(out), cast(wanted, ml_dtypes.bfloat16))
  others[1]["step"] = np.int32([8])
  write(given[1] / "model.safetensors", others[1])
  with pytest.raises(MismatchError, match="step: int32"):
    merge_files(start, given, MEAN, folder / "none")
  assert not (folder / "none").exists()


# ---------------------------------------------------------------------------
# Interrupted.


class _Stopped(BaseException):
  """As Ctrl-C: not an error of the merge."""


def stopped_after(monkeypatch, count):
  """Makes a merge stop when it has kept so many portions."""
  keep = journal.Journal.keep
  left = [count]

  def stop(self, *args):
    keep(self, *args)
    left[0] -= 1
    if not left[0]:
      raise _Stopped

  monkeypatch.setattr(journal.Journal, "keep", stop)
  return keep


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(layout, "PORTION", 1)


def interrupted(folder, monkeypatch, **options):
  base, *others = [normal(model(i)) for i in range(3)]
  start, given = stored(folder, base, others)
  out = folder / "out"
  with monkeypatch.context() as patch:
    stopped_after(patch, 3)
    with pytest.raises(_Stopped):
      merge_files(start, given, TIES, out, **options)
  assert not list(out.glob("*.safetensors")) and not list(out.glob("*.json"))
  return base, others, start, given, out


@pytest.mark.parametrize("shard_bytes", [None, 600])
def test_goes_on(folder, monkeypatch, small, shard_bytes):
  base, others, start, given, out = interrupted(
    folder, monkeypatch, shard_bytes=shard_bytes
  )
  # The cuts are known: no leaf is counted again, and none is made again.
  monkeypatch.setattr(merging_files.cutting, "cut", None)
  done = merge_files(start, given, TIES, out, shard_bytes=shard_bytes)
  assert 0 < done.resumed < done.written + 2000
  floats = sum(x.nbytes for x in jax.tree.leaves(base)) - 4
  assert done.read < 3 * floats
  assert same_bits(read(out), pj.merge(base, others, TIES))
  assert not list(out.glob(".*"))


@pytest.mark.parametrize("change", ["input", "numbers", "options", "files"])
def test_anything_else_starts_over(folder, monkeypatch, small, change):
  base, others, start, given, out = interrupted(folder, monkeypatch)
  method, options, what = TIES, {}, "other models"
  match change:
    case "input":
      others[1]["norm"] += np.float32(1)
      write(given[1] / "model.safetensors", others[1])
    case "numbers":
      method, what = pj.merging.ties(density=0.5), "other method"
    case "options":
      options, what = {"out_dtype": "float16"}, "other options, files"
    case "files":
      for part in out.glob(".*/*.part"):
        part.write_bytes(b"")
      what = "files are missing"
  with pytest.warns(UserWarning, match=f"starts over: {what}"):
    done = merge_files(start, given, method, out, **options)
  assert done.resumed == 0
  wanted = pj.merge(base, others, method)
  if options:
    wanted = cast(wanted, np.float16)
  assert same_bits(read(out), wanted)


def test_arrays_without_identity_start_over(folder, monkeypatch, small):
  base, one = [normal(model(i)) for i in range(2)]
  out = folder / "out"
  with monkeypatch.context() as patch:
    stopped_after(patch, 2)
    with pytest.raises(_Stopped):
      merge_files(base, [one], MEAN, out)
  with pytest.warns(UserWarning, match="other models"):
    merge_files(base, [one], MEAN, out)
  assert same_bits(read(out), pj.merge(base, [one], MEAN))


def test_killed_at_any_moment(folder):
  """Real processes, killed by themselves between any two steps on disk."""
  base, *others = [normal(model(i, ml_dtypes.bfloat16)) for i in range(3)]
  start, given = stored(folder, base, others, shard_bytes=500)
  out = folder / "out"
  # What is replaced is whole until the new model takes its place.
  merge_files(start, given, MEAN, out, shard_bytes=300)
  old = read(out)
  arguments = [str(x) for x in (start, *given, out)]
  done = subprocess.run(
    [sys.executable, str(HERE / "killed.py"), *arguments],
    capture_output=True,
    text=True,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert told["kills"] >= 6 and told["resumed"] >= 1
  wanted = pj.merge(base, others, TIES)
  assert same_bits(read(out), wanted)
  assert not same_bits(old, wanted)
  assert set(told["seen"]) <= {"old", "none", "new"}
  assert not list(out.glob(".*"))
  shards = json.loads((out / "model.safetensors.index.json").read_text())
  assert len(list(out.glob("*.safetensors"))) == len(
    set(shards["weight_map"].values())
  )


# ---------------------------------------------------------------------------
# What goes wrong.


def test_a_full_disk_leaves_nothing(folder, monkeypatch):
  base, *others = [normal(model(i)) for i in range(3)]
  start, given = stored(folder, base, others)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
  try:
    with pytest.raises(OSError, match="too large"):
      merge_files(start, given, MEAN, folder / "out")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not (folder / "out").exists()
  usage = namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 100))
  with pytest.raises(OSError, match="are needed") as error:
    merge_files(start, given, MEAN, folder / "out.safetensors")
  assert error.value.errno == errno.ENOSPC
  assert list(folder.iterdir()) == [folder / "in"]


def test_nan_leaves_nothing(folder, small):
  base, *others = [normal(model(i)) for i in range(3)]
  others[1]["norm"][3] = np.nan
  start, given = stored(folder, base, others)
  with pytest.raises(NonFiniteError, match="norm: 1"):
    merge_files(start, given, MEAN, folder / "out")
  assert not (folder / "out").exists()


def test_one_process_at_a_time(folder):
  base, one = [normal(model(i)) for i in range(2)]
  start, given = stored(folder, base, [one])
  work = folder / "out" / ".model.merging"
  work.mkdir(parents=True)
  with open(work / "lock", "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ConflictError, match="another process"):
      merge_files(start, given, MEAN, folder / "out")
  merge_files(start, given, MEAN, folder / "out")
  assert [p.name for p in (folder / "out").iterdir()] == ["model.safetensors"]


def test_a_model_in_fewer_files_replaces_all(folder):
  base, one = [normal(model(i)) for i in range(2)]
  start, given = stored(folder, base, [one])
  out = folder / "out"
  merge_files(start, given, MEAN, out, shard_bytes=600)
  assert len(list(out.iterdir())) > 3
  merge_files(start, given, MEAN, out)
  assert [p.name for p in out.iterdir()] == ["model.safetensors"]
  merge_files(start, given, MEAN, out, shard_bytes=600)
  assert not (out / "model.safetensors").exists()
  assert same_bits(read(out), pj.merge(base, [one], MEAN))


def test_wrong_arguments(folder):
  base, one = [normal(model(i)) for i in range(2)]
  start, given = stored(folder, base, [one])
  out = folder / "out"
  with pytest.raises(ValueError, match="is read by this merge"):
    merge_files(start, given, MEAN, start)
  with pytest.raises(ValueError, match="expected one of"):
    merge_files(start, given, MEAN, out, dtype="int8")
  write(start / "other.safetensors", one)
  with pytest.raises(FormatError, match="several"):
    merge_files(start, given, MEAN, out)
  with pytest.raises(FormatError, match="found none"):
    merge_files(folder / "in", given, MEAN, out)
  wide = {"w": np.zeros(2, np.float32), "z": np.zeros(2, np.complex128)}
  with pytest.raises(DtypeError, match="no complex128"):
    merge_files(wide, [wide], MEAN, out)
  for text in ("", "5XB", "-1", "GB"):
    with pytest.raises(ValueError, match="expected a size"):
      layout.parse_size(text)
  assert not out.exists()


# ---------------------------------------------------------------------------
# Memory.


def test_memory_stays_bounded(folder):
  """600 MB of models, in the memory of a few leaves of 16 MB."""
  done = subprocess.run(
    [sys.executable, str(HERE / "sparse.py"), str(folder / "big"), "8", "16"],
    capture_output=True,
    text=True,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert told["input"] > 600e6
  # Beside the leaves there is what the process and its programs need.
  assert told["peak"] - told["before"] <= (4 + 3) * told["leaf"] + 240e6
