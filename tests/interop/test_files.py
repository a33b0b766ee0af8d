"""Files of others: what is written comes back; what is broken is refused."""

import json
import os
import pickle
import warnings
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import patchjax as pj
from patchjax import trees
from patchjax.interop import files
from patchjax.patches import storage
from patchjax.trees import dtypes
from patchjax.trees.errors import DtypeError, FormatError, StructureError
from tests import containers

KINDS = ["a.safetensors", "a.npz", "a"]


def some(name):
  kind = dtypes.KINDS[name]
  shape = (3, 2) if kind.words == 2 else (3,)
  words = np.random.default_rng(0).integers(
    0, 2**kind.bits - 1, shape, np.uint64
  )
  return dtypes.from_words(words.astype(kind.word), name)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
  "container", ["pure_dict", "nnx_module", "linen_boxed"]
)
def test_params_come_back_as_nested_dicts(tmp_path, name, container):
  params = containers.SHARED[container]()
  files.write(tmp_path / name, params)
  back = files.read(tmp_path / name)
  assert trees.tree_id(back) == trees.tree_id(params)
  assert isinstance(back["blocks"]["0"]["kernel"], np.ndarray)


@pytest.mark.parametrize("dtype", storage.CODES.values())
def test_safetensors_keeps_every_bit_of_every_dtype_it_has(tmp_path, dtype):
  params = {"w": some(dtype), "odd": np.zeros(3, np.int8)}
  files.write(tmp_path / "a.safetensors", params)
  back = files.read(tmp_path / "a.safetensors")
  assert trees.tree_id(back) == trees.tree_id(params)
  assert all(x.flags.aligned for x in back.values())


def test_the_reference_library_reads_what_we_write_and_the_other_way(tmp_path):
  params = {"a": np.arange(3, dtype=np.int16), "b": np.float32([[1.5]])}
  files.write(tmp_path / "a.safetensors", params)
  theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
  assert trees.tree_id(theirs) == trees.tree_id(params)
  safetensors.numpy.save_file(params, tmp_path / "b.safetensors")
  ours = files.read(tmp_path / "b.safetensors")
  assert trees.tree_id(ours) == trees.tree_id(params)


def test_haiku_names_survive_and_foreign_slashes_are_cut(tmp_path):
  params = {"mlp/~/linear_0": {"w": np.ones(2, np.float32)}}
  files.write(tmp_path / "a.npz", params)
  assert set(files.read(tmp_path / "a.npz")) == {"mlp/~/linear_0"}
  np.savez(tmp_path / "b.npz", **{"mlp/~/linear_0/w": np.ones(2)})
  named = trees.named_leaves(files.read(tmp_path / "b.npz"))
  assert [trees.split(n) for n in named] == [("mlp", "~", "linear_0", "w")]


def test_a_leaf_called_file_is_a_leaf_in_npz(tmp_path):
  params = {"file": np.ones(2), "args": {"allow_pickle": np.zeros(())}}
  files.write(tmp_path / "a.npz", params)
  back = files.read(tmp_path / "a.npz")
  assert trees.tree_id(back) == trees.tree_id(params)


def test_orbax_checkpoints_of_others_are_read_with_64_bits(tmp_path):
  from orbax.checkpoint import v1 as ocp

  tree = {
    "layers": [{"w": jnp.ones(2, jnp.bfloat16)}, {"w": np.arange(2) + 2**40}]
  }
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ocp.save(tmp_path / "ckpt", tree)
  back = files.read(tmp_path / "ckpt")
  assert trees.tree_id(back) == trees.tree_id(tree)


def test_nothing_is_unpickled(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (os.mkdir, (str(tmp_path / "boom"),))

  np.savez(tmp_path / "a.npz", w=np.array([Bomb()], dtype=object))
  with pytest.raises(FormatError, match="plain arrays"):
    files.read(tmp_path / "a.npz")
  (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(FormatError, match="found a pickle, which can run any"):
    files.read(tmp_path / "b.npz")
  assert not (tmp_path / "boom").exists()


def broken_safetensors(kind, good):
  length = int.from_bytes(good[:8], "little")
  header = json.loads(good[8 : 8 + length])
  match kind:
    case "empty":
      return b""
    case "truncated":
      return good[:-3]
    case "longer":
      return good + b"x"
    case "header":
      return good[:8] + b"{" + good[9:20]
    case "length":
      return (2**60).to_bytes(8, "little") + good[8:]
    case "shape":
      header["w"]["shape"] = [1000]
    case "offsets":
      header["w"]["data_offsets"] = [0, 10**9]
    case "dtype":
      header["w"]["dtype"] = "F6_E2M3"
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + good[8 + length :]


@pytest.mark.parametrize(
  "kind",
  "empty truncated longer header length shape offsets dtype".split(),
)
def test_broken_safetensors_are_refused(tmp_path, kind):
  path = tmp_path / "a.safetensors"
  files.write(path, {"w": np.ones(4, np.float32)})
  path.write_bytes(broken_safetensors(kind, path.read_bytes()))
  with pytest.raises(FormatError, match="a.safetensors"):
    files.read(path)


@pytest.mark.parametrize("size", [0, 10, 100])
def test_broken_npz_are_refused(tmp_path, size):
  path = tmp_path / "a.npz"
  files.write(path, {"w": np.ones(40, np.float32)})
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(FormatError, match="not a readable npz"):
    files.read(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
  (tmp_path / "dir").mkdir()
  with pytest.raises(FormatError, match="not a readable Orbax checkpoint"):
    files.read(tmp_path / "dir")
  (tmp_path / "a.bin").write_bytes(b"x")
  with pytest.raises(
    FormatError, match="expected safetensors .*found the bytes b'x'"
  ):
    files.read(tmp_path / "a.bin")
  with pytest.raises(FileNotFoundError, match="a.npz: no such file"):
    files.read(tmp_path / "a.npz")


def test_npz_without_dtypes_is_refused_both_ways(tmp_path):
  params = {"w": jnp.ones(2, jnp.bfloat16)}
  with pytest.raises(DtypeError, match="npz has no bfloat16"):
    files.write(tmp_path / "a.npz", params)
  np.savez(tmp_path / "b.npz", w=np.asarray(params["w"]))
  with pytest.raises(FormatError, match="does not keep bfloat16"):
    files.read(tmp_path / "b.npz")


def test_prng_keys_and_4_bits_have_no_place_in_these_files(tmp_path):
  for name in KINDS:
    with pytest.raises(DtypeError, match="repository"):
      files.write(tmp_path / name, {"key": jax.random.key(0)})
  with pytest.raises(DtypeError, match="safetensors has no int4"):
    files.write(tmp_path / KINDS[0], {"w": jnp.ones(2, jnp.int4)})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", KINDS)
def test_empty_trees_and_existing_paths_are_refused(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(StructureError, match="no arrays"):
    files.write(path, {})
  files.write(path, {"w": np.ones(2)})
  with pytest.raises(FileExistsError, match="exists; choose another name"):
    files.write(path, {"w": np.zeros(2)})
  assert files.read(path)["w"].sum() == 2
  if path.suffix:
    files.write(path, {"w": np.zeros(2)}, overwrite=True)
    assert files.read(path)["w"].sum() == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_failed_write_leaves_nothing(tmp_path, name, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  monkeypatch.setattr("orbax.checkpoint.v1.save", fail, raising=False)
  if "." in name:
    with pytest.raises(OSError, match="No space"):
      files.write(tmp_path / name, {"w": np.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_as_readable_as_any_other(tmp_path):
  files.write(tmp_path / "a.npz", {"w": np.ones(2)})
  (tmp_path / "plain").touch()
  modes = {p.stat().st_mode for p in tmp_path.iterdir()}
  assert len(modes) == 1


def test_a_patch_is_no_parameters(tmp_path):
  base = {"w": np.zeros(2, np.float32)}
  pj.diff(base, base).save(tmp_path / "fix.patch", base=base)
  with pytest.raises(FormatError, match=r"fix\.patch is a patch"):
    files.read(tmp_path / "fix.patch")


def test_npz_names_that_end_in_npy(tmp_path):
  params = {"x": np.float32([1]), "x.npy": np.float32([2])}
  files.write(tmp_path / "a.npz", params)
  assert files.read(tmp_path / "a.npz")["x.npy"].tolist() == [2]


def test_npz_that_are_broken_in_other_ways(tmp_path):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("README.txt", "not an array")
  with pytest.raises(FormatError, match="not a readable npz"):
    files.read(path)
  np.savez_compressed(path, w=np.random.default_rng(0).random(1000))
  broken = bytearray(path.read_bytes())
  broken[200:260] = b"\xff" * 60
  path.write_bytes(broken)
  with pytest.raises(FormatError, match="not a readable npz"):
    files.read(path)
  head = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
  for size in (10**15, 10**30):
    text = (head % size).ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("w.npy", b"\x93NUMPY\x01\x00\x76\x00" + text + b"1234")
    with pytest.raises(FormatError, match="not a readable npz"):
      files.read(path)


@pytest.mark.parametrize(
  "name, params, error",
  [
    ("a.safetensors", {"__metadata__": np.ones(1)}, "no name for a leaf"),
    ("a", {"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, "one name to Orbax"),
    ("a", {"z": np.ones((0, 2)), "w": np.ones(1)}, "have no entries"),
    ("a.npz", {"w": np.ones(1, ml_dtypes.float8_e5m2)}, "npz has no float8"),
  ],
)
def test_what_a_format_cannot_hold_is_not_written(
  tmp_path, name, params, error
):
  with pytest.raises((StructureError, DtypeError), match=error):
    files.write(tmp_path / name, params)
  assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path):
  path = tmp_path / "no" / "a.safetensors"
  with pytest.raises(FileNotFoundError) as error:
    files.write(path, {"w": np.ones(1)})
  assert error.value.filename == str(path)
