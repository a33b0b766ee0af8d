"""Formats are told by content; what is written is read; the rest is named."""

import json
import pathlib
import pickle
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from patchjax import interop, trees
from patchjax.history import Record, Repo
from patchjax.interop import files
from patchjax.patches import storage
from patchjax.trees import dtypes
from patchjax.trees.errors import (
  DtypeError,
  FormatError,
  RepositoryError,
  StructureError,
)


def some(name, seed=0):
  kind = dtypes.KINDS[name]
  shape = (5, 2) if kind.words == 2 else (5,)
  words = np.random.default_rng(seed).integers(
    0, 2**kind.bits - 1, shape, np.uint64
  )
  return dtypes.from_words(words.astype(kind.word), name)


NUMPY = [name for name, k in dtypes.KINDS.items() if k.dtype.isbuiltin == 1]
HELD = {".safetensors": list(storage.CODES.values()), ".npz": NUMPY}


def everything(suffix):
  value = {name: some(name) for name in HELD[suffix]}
  value["nested"] = {"a/b": {"": np.float32(3)}, "~": np.zeros((0, 2), "int8")}
  value["file"] = np.float32([[1, np.nan], [-0.0, np.inf]])
  return value


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


@pytest.mark.parametrize("suffix", HELD)
def test_an_export_comes_back_with_every_dtype_the_format_has(
  tmp_path, repo, suffix
):
  repo.commit(everything(suffix), message="all")
  path = tmp_path / f"a{suffix}"
  assert interop.export(repo, "main", path) == [path]
  assert trees.tree_id(interop.read(path)) == repo.show().tree
  other = Repo.init(tmp_path / "other")
  interop.import_(other, path)
  assert other.show().tree == repo.show().tree
  # The name does not matter.
  moved = path.rename(tmp_path / "moved.bin")
  assert trees.tree_id(interop.read(moved)) == repo.show().tree


@pytest.mark.parametrize("suffix", HELD)
def test_what_a_format_has_no_dtype_for_is_refused_with_names(
  tmp_path, repo, suffix
):
  odd = sorted(set(dtypes.KINDS) - set(HELD[suffix]))
  repo.commit({name: some(name) for name in dtypes.KINDS}, message="all")
  with pytest.raises(DtypeError, match="or leave these leaves out") as info:
    interop.export(repo, "main", tmp_path / f"a{suffix}")
  assert ", ".join(odd) in str(info.value) and repr(odd[0]) in str(info.value)
  assert not list(tmp_path.iterdir())
  path = tmp_path / f"b{suffix}"
  interop.export(repo, "main", path, only=HELD[suffix])
  assert set(interop.read(path)) == set(HELD[suffix])


def test_large_models_are_written_in_shards(tmp_path, repo):
  value = {f"layer{i}": some("float32", i) for i in range(6)}
  value |= {"big": np.arange(100.0), "half": some("bfloat16")}
  repo.commit(value, message="m")
  path = tmp_path / "model.safetensors"
  written = interop.export(repo, "main", path, shard_bytes=60)
  assert [p.name for p in written] == [
    *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
    "model.safetensors.index.json",
  ]
  index = json.loads(written[-1].read_bytes())
  assert index["metadata"] == {"total_size": 800 + 6 * 20 + 10}
  for source in (written[-1], tmp_path, path):
    assert trees.tree_id(interop.read(source)) == repo.show().tree
  import safetensors.numpy

  for name, shard in index["weight_map"].items():
    if name != "half":
      found = safetensors.numpy.load_file(tmp_path / shard)[name]
      assert found.tobytes() == value[name].tobytes()


def sharded(folder):
  value = {f"layer{i}": some("float32", i) for i in range(4)}
  with Repo.temporary() as repo:
    repo.commit(value, message="m")
    path = folder / "model.safetensors"
    return interop.export(repo, "main", path, shard_bytes=40)


@pytest.mark.parametrize(
  "kind, error",
  [
    ("lost", "1 of 2 shards are missing: 'model-00002"),
    ("moved", "2 keys are not where it says: 'layer0', 'layer2'"),
    ("outside", "names files outside of its folder"),
    ("list", "expected the index of a sharded safetensors model"),
    ("json", "expected the index of a sharded safetensors model"),
  ],
)
def test_broken_shards_are_refused(tmp_path, kind, error):
  *shards, index = sharded(tmp_path)
  spelled = json.loads(index.read_bytes())
  places = spelled["weight_map"]
  match kind:
    case "lost":
      shards[1].unlink()
    case "moved":
      places["layer0"], places["layer2"] = places["layer2"], places["layer0"]
    case "outside":
      places["layer0"] = f"../{tmp_path.name}/{places['layer0']}"
    case "list":
      spelled = {"weight_map": [1]}
  index.write_text("{" if kind == "json" else json.dumps(spelled))
  with pytest.raises(FormatError, match=error):
    interop.read(index)


def test_a_write_that_fails_leaves_no_shards(tmp_path, monkeypatch):
  def fail(path):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("patchjax.interop.tensors.index_of", fail)
  with pytest.raises(OSError, match="No space"):
    sharded(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_folder_of_a_model_is_read(tmp_path):
  interop.write(tmp_path / "model.safetensors", {"w": np.ones(2)})
  (tmp_path / "config.json").write_text("{}")
  assert interop.read(tmp_path)["w"].tolist() == [1, 1]
  interop.write(tmp_path / "adapter.safetensors", {"w": np.ones(2)})
  with pytest.raises(FormatError, match="several models: 'adapter"):
    interop.read(tmp_path)


def test_flax_msgpack(tmp_path):
  from flax import serialization

  value = {
    "params": {"w": jnp.ones((2, 3), jnp.bfloat16), "b": [np.arange(3)] * 2},
    "step": 3,
    "scalar": np.float32(2),
    "on": True,
    "z": 1 - 2j,
    "name": "x",
    "raw": b"\x00\x01",
  }
  path = tmp_path / "a.msgpack"
  path.write_bytes(serialization.to_bytes(value))
  found = interop.read(path)
  assert found["name"] == Record("x") and found["raw"] == Record(b"\x00\x01")
  assert (found["step"], found["on"], found["z"]) == (3, True, 1 - 2j)
  del found["name"], found["raw"], value["name"], value["raw"]
  assert trees.tree_id(found) == trees.tree_id(value)
  whole = path.read_bytes()
  for broken in (whole[:-3], whole + b"\x00", whole[:40], b"\x81\xa1w\xc7"):
    path.write_bytes(broken)
    with pytest.raises(FormatError, match="not a readable msgpack"):
      interop.read(path)


@pytest.mark.parametrize(
  "name, data, error",
  [
    ("a.npy", b"\x93NUMPY\x01\x00", "a single numpy array"),
    ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
    ("a.gguf", b"GGUF\x03\x00", "GGUF"),
    ("a.pkl", pickle.dumps({"w": 1}, protocol=4), "a pickle, which can run"),
    ("a.json", b'{"a": 1}', "expected the index of a sharded"),
    ("a.txt", b"hello", "found the bytes b'hello'"),
    ("a", b"", "found the bytes b''"),
    ("a.safetensors", b"", "truncated, or not a safetensors"),
    ("a.npz", b"", "not a readable npz"),
    ("a.msgpack", b"", "not a readable msgpack"),
  ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, name, data, error):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(FormatError, match=error) as info:
    interop.read(tmp_path / name)
  assert name in str(info.value)


def test_a_checkpoint_of_torch_is_told(tmp_path):
  with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))
  with pytest.raises(FormatError, match="PyTorch, which is a pickle"):
    interop.read(tmp_path / "model.bin")


def test_folders_that_hold_nothing_of_the_kind(tmp_path):
  (tmp_path / "a.txt").touch()
  with pytest.raises(FormatError, match="found a folder with 'a.txt'"):
    interop.read(tmp_path)
  Repo.init(tmp_path / "repo")
  with pytest.raises(FormatError, match="is a repository; name a version"):
    interop.read(tmp_path / "repo")
  with pytest.raises(FileNotFoundError):
    interop.import_(Repo(tmp_path / "repo"), tmp_path / "nothing")


def test_export_refuses_what_it_does_not_know(tmp_path, repo):
  repo.commit({"w": np.ones(2)}, message="m")
  with pytest.raises(FormatError, match="expected a name ending in"):
    interop.export(repo, "main", tmp_path / "a.bin")
  (path,) = interop.export(repo, "main", tmp_path / "a.bin", format="npz")
  assert interop.read(path)["w"].tolist() == [1, 1]
  with pytest.raises(FileExistsError, match="or overwrite it"):
    interop.export(repo, "main", path, format="npz")
  interop.export(repo, "main", path, format="safetensors", overwrite=True)
  repo.commit({"__metadata__": np.ones(2)}, message="m")
  with pytest.raises(StructureError, match="no name for a leaf"):
    interop.export(repo, "main", tmp_path / "b.safetensors")


def test_an_export_holds_few_leaves_at_a_time(tmp_path, repo, monkeypatch):
  value = {f"layer{i}": some("float32", i) for i in range(6)}
  repo.commit(value, message="m")
  monkeypatch.setattr("patchjax.interop.source._GROUP", 40)
  asked = []
  read = repo.reader.read
  monkeypatch.setattr(
    repo.reader,
    "read",
    lambda entries: asked.append(len(entries)) or read(entries),
  )
  for suffix in HELD:
    asked.clear()
    interop.export(repo, "main", tmp_path / f"a{suffix}")
    assert asked == [2, 2, 2]


def test_python_numbers_are_written_and_a_new_branch_stands_alone(
  tmp_path, repo
):
  value = {"w": np.ones(2, ml_dtypes.float8_e4m3fn), "step": 3, "f": max}
  interop.write(tmp_path / "a.safetensors", value)
  repo.commit({"x": np.ones(1)}, message="something else")
  (made,) = interop.import_(repo, tmp_path / "a.safetensors", branch="theirs")
  assert repo.show(made).parents == ()
  assert repo.show(made).tree == trees.tree_id(value)
  assert repo.checkout(made)["step"] == 3


def test_suffixes_are_paths_too():
  assert files.check_path("a.npz", overwrite=False) == (
    pathlib.Path("a.npz"),
    "npz",
  )


def test_the_history_alone_writes_orbax_only(tmp_path, repo):
  repo.commit({"w": np.ones(2)}, message="m")
  with pytest.raises(RepositoryError, match=r"patchjax\.interop\.export"):
    repo.export("main", tmp_path / "a.safetensors")
