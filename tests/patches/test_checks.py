"""Deltas that do not fit, written into files and made by hand."""

import hashlib
import json

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import (
  Delete,
  Delta,
  Dense,
  Insert,
  LowRank,
  Patch,
  Quantized,
  Rename,
  Sparse,
  pinned,
  structure_of,
)
from patchjax.trees.digest import words_digest
from patchjax.trees.dtypes import host
from patchjax.trees.errors import FormatError, MismatchError

BASE = {"w": np.zeros((4, 3), np.float32), "n": np.zeros(2, np.int32)}
ONE = np.ones((1, 3), np.float32)


class Writer:
  """Writes patch files that say anything, with digests that are right."""

  def __init__(self):
    self.arrays = {}

  def put(self, x, **claims):
    words, dtype = host(x)
    where = f"array{len(self.arrays)}"
    self.arrays[where] = words
    spelled = {"array": where, "dtype": dtype, "shape": list(x.shape)} | claims
    digest = words_digest(words, spelled["dtype"], tuple(spelled["shape"]))
    return spelled | {"sha256": digest}

  def save(self, path, spelled):
    header, body = {}, b""
    for name, words in self.arrays.items():
      start, body = len(body), body + words.tobytes()
      header[name] = {
        "dtype": f"U{8 * words.itemsize}",
        "shape": list(words.shape),
        "data_offsets": [start, len(body)],
      }
    header["__metadata__"] = {
      "format": "patchjax.patch",
      "version": "1",
      "patch": spelled,
      "sha256": hashlib.sha256(spelled.encode()).hexdigest(),
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def numeric(law, kind, **fields):
  return lambda put: {
    "law": law,
    "code": {
      "kind": kind,
      **{k: v(put) if callable(v) else v for k, v in fields.items()},
    },
  }


def array(values, kind=np.float32, **claims):
  return lambda put: put(np.asarray(values, kind), **claims)


def sparse(values=(1,), indices=(2,), kind=np.int32, shape=(4, 3)):
  values = values if callable(values) else array(values)
  indices = array(indices, kind)
  return numeric("add", "Sparse", values=values, indices=indices, shape=shape)


def quantized(shape, bits, scales=((1,),), block=(4, 3), count=1):
  words = array(np.zeros(count), np.uint8, shape=shape, dtype="int8", bits=bits)
  return numeric(
    "add",
    "Quantized",
    words=words,
    scales=array(scales),
    bits=bits,
    block=block,
  )


def low_rank(a, b, scale=1, batch=0):
  a, b = array(np.ones(a)), array(np.ones(b))
  return numeric("add", "LowRank", a=a, b=b, scale=array(scale), batch=batch)


def insert(value, axis):
  return lambda put: {"delta": "insert", "value": put(value), "axis": axis}


BROKEN = {
  "sparse of a smaller leaf": sparse(shape=(1, 3)),
  "sparse of a huge leaf": sparse(shape=(1 << 62, 3)),
  "float indices": sparse(kind=np.float32),
  "wide indices": sparse(kind=np.int64),
  "pairs of indices": sparse(indices=[[0, 2]]),
  "negative indices": sparse(indices=[-1]),
  "indices out of order": sparse((1, 1), (1, 0)),
  "an index twice": sparse((1, 1), (1, 1)),
  "rows of values": sparse(values=[[1, 2]]),
  "values in a code": sparse(numeric("add", "Dense", values=array([1]))),
  "words of exabytes": quantized((1 << 40, 1 << 20), 1),
  "words of negative size": quantized((-4, 3), 1),
  "too few words": quantized((4, 3), 4),
  "no bits": quantized((4, 3), 0),
  "many bits": quantized((4, 3), 99, count=200),
  "other scales": quantized((4, 3), 8, ((1, 2), (1, 2)), (2, 3), 12),
  "blocks of no size": quantized((4, 3), 8, ((1,),), (0, -3), 12),
  "blocks of one axis": quantized((4, 3), 8, ((1,),), (4,), 12),
  "ranks that differ": low_rank((4, 2), (3, 3)),
  "many batch axes": low_rank((4, 2), (2, 3), batch=7),
  "negative batch axes": low_rank((4, 2), (2, 3), batch=-1),
  "several scales": low_rank((4, 2), (2, 3), [1, 2, 3]),
  "complex numbers": numeric(
    "add", "Dense", values=array(np.ones((4, 3)), np.complex64)
  ),
  "narrow words": numeric(
    "bits", "Dense", values=array(np.ones((4, 3)), np.uint8)
  ),
  "words of floats": numeric("bits", "Dense", values=array(np.ones((4, 3)))),
  "an axis of words": numeric(
    "bits", "Dense", values=array(np.ones((4, 3, 2)), np.uint32)
  ),
  "rows on axis 9": insert(ONE, 9),
  "rows on axis '0'": insert(ONE, "0"),
  "wide rows": insert(np.ones((1, 5), np.float32), 0),
  "rows of integers": insert(ONE.astype(np.int8), 0),
  "a leaf that exists": insert(ONE, None),
  "renamed to a number": lambda put: {"delta": "rename", "to": 5},
  "renamed to no name": lambda put: {"delta": "rename", "to": "a~b"},
  "renamed onto a leaf": lambda put: {"delta": "rename", "to": "n"},
  "renamed below a leaf": lambda put: {"delta": "rename", "to": "n/w"},
}


@pytest.mark.parametrize("delta", BROKEN.values(), ids=BROKEN)
def test_crafted_files_are_refused(delta, tmp_path):
  writer, path = Writer(), tmp_path / "p.safetensors"
  spelled = {
    "base": None,
    "structure": {"w": ["float32", [4, 3]], "n": ["int32", [2]]},
    "deltas": {"w": delta(writer.put)},
  }
  writer.save(path, json.dumps(spelled))
  with pytest.raises(FormatError, match=r"p\.safetensors"):
    pj.Patch.load(path)


@pytest.mark.parametrize(
  "spelled",
  [
    '{"base": 5, "structure": null, "deltas": {}}',
    '{"base": null, "structure": null, "deltas": ' + "[" * 10**5 + "}",
    '{"base": null, "structure": null, "deltas": ' + "[" * 9999 + "]" * 9999,
    r'{"base": null, "structure": null, "deltas": {"\ud800": {}}}',
    '{"base": null, "structure": {"w": ["float32", [4, 3]]}, "deltas": '
    '{"gone": {"delta": "delete"}}}',
  ],
  ids=["base", "open", "deep", "surrogate", "unknown"],
)
def test_crafted_headers_are_refused(spelled, tmp_path):
  Writer().save(tmp_path / "p.safetensors", spelled)
  with pytest.raises(FormatError):
    pj.Patch.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("structure", [None, structure_of(BASE)])
@pytest.mark.parametrize("act", [pj.apply, pinned.apply_named])
@pytest.mark.parametrize(
  "deltas",
  [
    {"nope": Delta(Dense(ONE), "add")},
    {"nope": Delete()},
    {"nope": Rename("x")},
    {"w": Rename("n")},
    {"n": Insert(ONE)},
    {"w": Delta(Dense(np.ones((3, 4), np.float32)), "add")},
    {"w": Delta(Sparse(ONE[0, :1], np.int32([3]), (3, 4)), "add")},
    {"n": Delta(Dense(np.float32([1.7, 1.7])), "set")},
  ],
)
def test_deltas_by_hand_must_fit(deltas, act, structure):
  with pytest.raises(MismatchError, match="1 of 1 deltas do not fit"):
    act(BASE, Patch(deltas, structure))


def test_all_misfits_are_listed():
  deltas = {"nope": Delete(), "w": Rename("n")}
  with pytest.raises(MismatchError, match=r"(?s)nope: .*w: there is a leaf"):
    pj.apply(BASE, Patch(deltas))


def test_stacked_patches_are_not_saved(tmp_path):
  delta = Delta(Sparse(ONE[0, :1], np.int32([3]), (4, 3)), "add")
  many = pj.stack([Patch({"w": delta}, structure_of(BASE))] * 2)
  with pytest.raises(MismatchError, match="one by one"):
    many.save(tmp_path / "p.safetensors")
  assert not list(tmp_path.iterdir())
  one = jax.tree.map(lambda x: x[1], many)
  one.save(tmp_path / "p.safetensors")


def test_names_that_look_like_fields_of_other_leaves(tmp_path):
  base = {"w": np.zeros(4, np.float32), "w#values": np.zeros(2, np.float32)}
  values = Quantized(np.int8([1, 2]), ONE[0, :1], 8, (2,))
  deltas = {
    "w": Delta(Sparse(values, np.int32([0, 1]), (4,)), "add"),
    "w#values": Delta(Quantized(np.int8([3, 4]), ONE[0, :1], 8, (2,)), "add"),
  }
  path = tmp_path / "p.safetensors"
  Patch(deltas, structure_of(base)).save(path)
  found = pj.apply(base, pj.Patch.load(path))
  assert found["w"].tolist() == [1, 2, 0, 0]
  assert found["w#values"].tolist() == [3, 4]


@pytest.mark.parametrize(
  "bad, why",
  [
    (LowRank(ONE.T, np.ones((2, 3)), np.float32(1)), "factors of shapes"),
    (Sparse(ONE[0, :2], np.int32([1, 0]), (4, 3)), "must be sorted"),
  ],
)
def test_a_broken_patch_is_not_saved(bad, why, tmp_path):
  with pytest.raises(MismatchError, match=why):
    Patch({"w": Delta(bad, "add")}).save(tmp_path / "p.safetensors")
  assert not list(tmp_path.iterdir())
