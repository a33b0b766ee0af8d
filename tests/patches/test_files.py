"""The patch file: everything comes back, nothing broken is believed."""

import json
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors
from hypothesis.extra import numpy as hnp

import patchjax as pj
from patchjax.patches import Delta, Insert, Patch, Quantized
from patchjax.patches.files import pack, unpack
from patchjax.trees.dtypes import KINDS, from_words, to_words
from patchjax.trees.errors import (
  BaseMismatchError,
  FormatError,
  MismatchError,
)
from tests.patches import cases


@pytest.fixture
def saved(tmp_path):
  case = cases.make("add", "sparse")
  path = tmp_path / "fix.safetensors"
  case.patch.save(path, base=case.base)
  return case, path


@pytest.mark.parametrize("law, code", cases.LAW_CODES)
def test_comes_back(law, code, tmp_path):
  case = cases.make(law, code)
  path = tmp_path / "p.safetensors"
  case.patch.save(path, base=case.base)
  found = pj.Patch.load(path)
  assert jax.tree.structure(found) == jax.tree.structure(case.patch)
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(case.patch), strict=True
  ):
    assert type(x) is np.ndarray and x.dtype == y.dtype
    np.testing.assert_array_equal(x, np.asarray(y))
  pj.check_base(case.base, found)
  cases.check(pj.apply(case.base, found), case)
  size = path.stat().st_size
  assert found.nbytes == case.patch.nbytes <= size <= found.nbytes + 4096


def test_every_dtype_and_keys_come_back(tmp_path):
  rng = np.random.default_rng(0)
  leaves = {"key": jax.random.key(3, impl="rbg")}
  for name, kind in KINDS.items():
    words = rng.integers(0, 1 << kind.bits, (3, kind.words), dtype=np.uint64)
    words = words.astype(kind.word)
    leaves[f"a.b/{name} ->"] = from_words(
      words if kind.words == 2 else words[:, 0], name
    )
  patch = Patch({name: Insert(leaf) for name, leaf in leaves.items()})
  patch.save(tmp_path / "p")
  found = pj.Patch.load(tmp_path / "p").deltas
  assert found["key"].value == leaves.pop("key")
  for name, leaf in leaves.items():
    assert found[name].value.dtype == leaf.dtype
    np.testing.assert_array_equal(to_words(found[name].value), to_words(leaf))


def test_structural_patches_come_back(tmp_path):
  base = {"a": np.zeros(2, "f4"), "b": np.zeros((0, 3), "f4")}
  patch = pj.patches.restructure(base, rename={"a": "c"}, delete=["b"])
  patch.save(tmp_path / "p")
  found = pj.Patch.load(tmp_path / "p")
  assert found.deltas == patch.deltas and found.structure == patch.structure


def test_is_plain_safetensors_aligned_and_mapped(saved):
  _, path = saved
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata()["format"] == "patchjax.patch"
    assert "w#values" in file.keys()
  for leaf in jax.tree.leaves(pj.Patch.load(path)):
    assert leaf.ctypes.data % 64 == 0
    assert not leaf.flags.owndata and not leaf.flags.writeable


def test_loading_starts_no_device(saved):
  _, path = saved
  code = (
    "import sys, jax, patchjax as pj\n"
    "pj.Patch.load(sys.argv[1])\n"
    "from jax.extend import backend\n"
    "jax.config.update('jax_num_cpu_devices', 3)\n"
    "assert len(jax.devices()) == 3, 'the backend was already up'\n"
  )
  subprocess.run(
    [sys.executable, "-c", code, str(path)],
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


def test_quantized_words_are_packed(tmp_path):
  shape = (1000, 33)
  words = np.random.default_rng(0).integers(-4, 4, shape).astype(np.int8)
  code = Quantized(words, np.ones((1000, 1), "f4"), 3, (1, 33))
  Patch({"w": Delta(code, "set")}).save(tmp_path / "p")
  assert (tmp_path / "p").stat().st_size < 1000 * 33 * 3 / 8 + 4000 + 2048


@hypothesis.given(st.integers(1, 8), st.data())
def test_packing_round_trips(bits, data):
  values = (
    st.sampled_from([-1, 1])
    if bits == 1
    else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  )
  words = data.draw(
    hnp.arrays(np.int8, hnp.array_shapes(min_side=0), elements=values)
  )
  packed = pack(words, bits)
  assert len(packed) == -(-words.size * bits // 8)
  np.testing.assert_array_equal(unpack(packed, bits, words.shape), words)


def test_packing_crosses_chunks():
  words = np.random.default_rng(0).integers(-4, 4, (1 << 20) + 77)
  words = words.astype(np.int8)
  np.testing.assert_array_equal(unpack(pack(words, 3), 3, words.shape), words)


class TestBroken:
  def test_every_truncation(self, saved):
    _, path = saved
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
      path.write_bytes(data[:size])
      with pytest.raises(FormatError, match=str(path)):
        pj.Patch.load(path)

  def test_every_flipped_bit(self, saved):
    """A bit flipped anywhere but in padding is noticed."""
    case, path = saved
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    pads = [
      range(start + t["data_offsets"][0], start + t["data_offsets"][1])
      for name, t in header.items()
      if name.startswith("__pad_")
    ]
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 200, replace=False).tolist():
      if any(at in pad for pad in pads) or data[at] == ord(" "):
        continue
      broken = bytearray(data)
      broken[at] ^= 1 << int(rng.integers(8))
      path.write_bytes(broken)
      try:
        found = pj.Patch.load(path)
      except FormatError:
        continue
      # What names no content, such as the JSON spelling of an unread key.
      same = jax.tree.map(np.array_equal, found, case.patch)
      assert all(jax.tree.leaves(same)) and found.base is not None

  def edit(self, path, change):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])

  def test_unknown_version(self, saved):
    _, path = saved
    self.edit(path, lambda h: h["__metadata__"].update(version="2"))
    with pytest.raises(FormatError, match="version 2, expected 1.*newer"):
      pj.Patch.load(path)

  def test_edited_header(self, saved):
    _, path = saved

    def change(header):
      text = header["__metadata__"]["patch"]
      header["__metadata__"]["patch"] = text.replace('"add"', '"mul"')

    self.edit(path, change)
    with pytest.raises(FormatError, match="header was edited"):
      pj.Patch.load(path)

  def test_other_safetensors_files(self, tmp_path):
    import safetensors.numpy

    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(2, "f4")}, path)
    with pytest.raises(FormatError, match="not a patch"):
      pj.Patch.load(path)
    path.write_text("hello, this is no tensor file at all")
    with pytest.raises(FormatError, match="not a safetensors file"):
      pj.Patch.load(path)

  def test_missing_file(self, tmp_path):
    with pytest.raises(FileNotFoundError):
      pj.Patch.load(tmp_path / "nope")


def test_wrong_base(saved):
  case, path = saved
  patch = pj.Patch.load(path)
  other = {"w": case.base["w"] + 1, "other": case.base["other"]}
  with pytest.raises(BaseMismatchError, match="wrong base"):
    pj.check_base(other, patch)
  with pytest.raises(MismatchError):
    pj.check_base({"w": case.base["w"]}, patch)
  with pytest.raises(BaseMismatchError, match="does not say"):
    pj.check_base(case.base, patch.replace(base=None))
  with pytest.raises(MismatchError):
    patch.save(path, base={"x": case.base["w"]})
  pj.check_base(case.base, pj.Patch.load(path))  # the old file is whole


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
  case, path = saved
  before = path.read_bytes()

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="No space"):
    cases.make("add", "dense").patch.save(path)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  with pytest.raises(OSError):
    case.patch.save(path.parent / "no" / "such" / "folder")


def test_nested_names_are_checked_as_they_are(tmp_path):
  base = {"dense": {"w": np.ones(2, np.float32)}}
  patch = pj.diff(base, base)
  patch.save(tmp_path / "a.safetensors", base=base)
  pj.check_base(base, pj.Patch.load(tmp_path / "a.safetensors"))
