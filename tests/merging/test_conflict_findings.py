"""What keeps contributors from being merged is told, each with its fix."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches.deltas import Delete, Insert, Rename
from patchjax.trees.errors import PatchjaxError


def base():
  return {
    "kernel": np.ones((4, 2), np.float32),
    "bias": np.zeros(2, np.float32),
    "out": np.ones(3, np.float32),
    "step": np.int32(7),
  }


def changed(**leaves):
  """The base with other leaves; None takes one away."""
  new = base() | leaves
  return {name: leaf for name, leaf in new.items() if leaf is not None}


def patch(**deltas):
  return pj.Patch(deltas, pj.diff(base(), base()).structure)


BIG = np.zeros((6, 2), np.float32)
OTHER = changed(kernel=np.full((4, 2), 3, np.float32))

CASES = {
  "inserted": (changed(extra=BIG), "extra", "inserted", ()),
  "deleted": (changed(kernel=None), "kernel", "deleted", (1,)),
  "renamed": (
    changed(kernel=None, weight=np.ones((4, 2), np.float32)),
    "kernel",
    "renamed",
    (1,),
  ),
  "reshaped": (changed(kernel=BIG), "kernel", "reshaped", (1,)),
  "cast": (changed(kernel=np.ones((4, 2), np.float16)), "kernel", "cast", (1,)),
  "no mean": (changed(step=np.int32(8)), "step", "no mean", ()),
  "not finite": (
    changed(kernel=np.full((4, 2), np.nan, np.float32)),
    "kernel",
    "not finite",
    (1,),
  ),
  "patch inserts": (patch(extra=Insert(BIG)), "extra", "inserted", ()),
  "patch deletes": (patch(kernel=Delete()), "kernel", "deleted", (1,)),
  "patch renames": (patch(kernel=Rename("weight")), "kernel", "renamed", (1,)),
  "patch grows": (
    patch(kernel=Insert(np.zeros((2, 2), np.float32), 0)),
    "kernel",
    "reshaped",
    (1,),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_finding_where_merge_raises(case):
  contributor, leaf, kind, others = CASES[case]
  report = pj.merging.conflicts(base(), [contributor, OTHER])
  (found,) = report.findings
  assert (found.leaf, found.kind) == (leaf, kind)
  assert found.contributors == (0,)
  assert found.others == others
  assert found.fix and found.blocks and not report.disjoint
  with pytest.raises(PatchjaxError) as caught:
    pj.merge(base(), [contributor, OTHER], pj.merging.linear())
  assert found.merge == f"raises {type(caught.value).__name__}"
  # What fits is compared nevertheless.
  assert report.total.entries[1][1] == 8
  assert leaf in str(report)
  assert max(map(len, str(report).splitlines())) <= 100
  json.dumps(report.to_json(), allow_nan=False)


def test_findings_of_several_are_one_line_and_know_each_other():
  a, b = changed(extra=BIG), changed(extra=BIG)
  c = changed(kernel=BIG)
  d = changed(kernel=None)
  found = pj.merging.conflicts(base(), [a, b, c, d]).findings
  by = {(f.leaf, f.kind): (f.contributors, f.others) for f in found}
  assert by == {
    ("extra", "inserted"): ((0, 1), ()),
    ("kernel", "reshaped"): ((2,), (3,)),
    ("kernel", "deleted"): ((3,), (2,)),
  }


def test_leaves_without_a_mean_on_which_all_agree_are_no_finding():
  both = [changed(step=np.int32(9)), changed(step=np.int32(9))]
  report = pj.merging.conflicts(base(), both)
  assert report.findings == ()
  assert pj.merge(base(), both, pj.merging.linear())["step"] == 9
  apart = [changed(step=np.int32(9)), changed(step=np.int32(8))]
  (found,) = pj.merging.conflicts(base(), apart).findings
  assert found.contributors == (0, 1)
  assert pj.merging.conflicts(base(), apart, only="kernel").findings == ()


def test_keys_booleans_and_what_is_no_array():
  start = {
    "w": np.ones(2, np.float32),
    "key": jax.random.key(0),
    "mask": np.array([True, False]),
    "name": "a",
  }
  other = start | {
    "key": jax.random.key(1),
    "mask": np.array([True, True]),
    "name": "b",
  }
  found = pj.merging.conflicts(start, [start, other]).findings
  assert {f.leaf: f.kind for f in found} == {
    "key": "no mean",
    "mask": "no mean",
    "name": "no array",
  }


def test_64_bit_leaves_are_a_finding_while_jax_narrows():
  start = {"w": np.ones(2), "b": np.ones(2, np.float32)}
  other = {"w": np.zeros(2), "b": np.zeros(2, np.float32)}
  report = pj.merging.conflicts(start, [other])
  (found,) = report.findings
  assert (found.leaf, found.merge) == ("w", "raises DtypeError")
  assert [leaf.name for leaf in report.leaves] == ["b"]


def test_a_patch_for_another_base():
  start = base() | {"more": np.ones(2, np.float32)}
  delta = pj.diff(start, start | {"more": np.zeros(2, np.float32)})
  found = pj.merging.conflicts(base(), [delta, OTHER]).findings
  assert [(f.leaf, f.kind) for f in found] == [("more", "inserted")]
  free = delta.replace(structure=None)
  found = pj.merging.conflicts(base(), [free, OTHER]).findings
  assert [(f.leaf, f.kind) for f in found] == [("more", "inserted")]
  wrong = pj.Patch({"out": delta.deltas["more"]})
  found = pj.merging.conflicts(base(), [wrong, OTHER]).findings
  assert [(f.leaf, f.kind) for f in found] == [("out", "reshaped")]


def test_a_cast_leaf_is_compared_as_if_it_were_cast_back():
  half = changed(kernel=np.full((4, 2), 3, jnp.bfloat16))
  total = pj.merging.conflicts(base(), [half, OTHER]).total
  assert total.entries == ((8, 8), (8, 8))
  assert total.cosine == pytest.approx(1)


def test_nothing_to_compare():
  with pytest.raises(PatchjaxError, match="contributors is empty"):
    pj.merging.conflicts(base(), [])
  with pytest.raises(PatchjaxError, match="no arrays"):
    pj.merging.conflicts({"name": "a"}, [{"name": "a"}])
  with pytest.raises(TypeError, match="list of pytrees"):
    pj.merging.conflicts(base(), OTHER)
  with pytest.raises(ValueError, match="1 labels for 2"):
    pj.merging.conflicts(base(), [OTHER, OTHER], labels=["a"])
