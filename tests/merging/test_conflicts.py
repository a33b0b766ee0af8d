"""The conflict report against numbers worked out by hand."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging.conflict import measures, sums
from patchjax.patches import placement
from tests.merging import models


def cases():
  base = {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}
  one = {"a": np.float32([1, 2, 0, 0]), "b": np.float32([0, 0])}
  two = {"a": np.float32([-1, 2, 3, 0]), "b": np.float32([0, 1])}
  return base, [one, two]


def test_shares():
  base, others = cases()
  report = pj.merging.conflicts(base, others)
  a, b = report.leaves
  assert (a.name, a.size, a.changed) == ("a", 4, 0.75)
  assert a.overlap == pytest.approx(2 / 3)
  # Entry 0 cancels: 1 of 2 stands against; entry 1 agrees: 0 of 4.
  assert a.sign == pytest.approx(1 / 6)
  cosine = 3 / np.sqrt(5 * 14)
  assert a.cosine == pytest.approx(cosine)
  assert (b.overlap, b.sign, b.cosine) == (0, 0, 0)
  assert report.total.size == 6
  assert report.total.changed == pytest.approx(4 / 6)
  assert report.total.cosine == pytest.approx(3 / np.sqrt(5 * 15))


def test_patches_tables_and_json():
  base, others = cases()
  patches = [pj.compress(pj.diff(base, x)) for x in others]
  report = pj.merging.conflicts(base, patches)
  assert report == pj.merging.conflicts(base, others)
  text = str(report)
  assert "total" in text and "16.67%" in text
  assert max(map(len, text.splitlines())) <= 100
  assert json.loads(json.dumps(report.to_json()))["total"]["size"] == 6


def test_probes_measure_predictions():
  base, others = cases()
  probes = np.eye(4, dtype=np.float32)

  def model(params, x):
    return x * params["a"][None]

  report = pj.merging.conflicts(base, others, probes=probes, apply_fn=model)
  assert sorted(report.divergence) == ["contributor 0", "contributor 1"]
  assert all(value > 0 for value in report.divergence.values())
  same = pj.merging.conflicts(
    base, others[:1], probes=probes, apply_fn=model, merged=others[0]
  )
  assert same.divergence["contributor 0"] == pytest.approx(0, abs=1e-6)
  assert "KL" in str(report)
  with pytest.raises(ValueError, match="go together"):
    pj.merging.conflicts(base, others, probes=probes)


COUNTS = ("size", "some", "several", "disputed", "entries", "opposite")


def thinned(base, others):
  """Others that keep two thirds of their changes, each its own."""
  rng = np.random.default_rng(5)

  def keep(x, y):
    if x.dtype == np.int32:
      return x
    return np.where(rng.random(x.shape) < 2 / 3, y, x)

  return [jax.tree.map(keep, base, other) for other in others]


def reference(base, others):
  """Counts and sums of a tree, by numpy in float64."""
  flat = np.stack(
    [
      np.concatenate(
        [
          (y - x).ravel()
          for x, y in zip(models.floats(base), models.floats(other))
        ]
      )
      for other in others
    ]
  )
  up, down = flat > 0, flat < 0
  changed = (up | down).astype(int)
  entries = changed @ changed.T
  opposite = up.astype(int) @ down.astype(int).T
  wide = np.float64(flat)
  norms = np.linalg.norm(wide, axis=1)
  several = changed.sum(0) >= 2
  size = np.abs(wide).sum(0)
  return {
    "size": flat.shape[1],
    "some": int(changed.any(0).sum()),
    "several": int(several.sum()),
    "disputed": int((up.any(0) & down.any(0)).sum()),
    "entries": tuple(map(tuple, entries.tolist())),
    "opposite": tuple(map(tuple, (opposite + opposite.T).tolist())),
    "norms": norms,
    "cosines": wide @ wide.T / np.outer(norms, norms),
    "sign": ((size - np.abs(wide.sum(0))) / 2)[several].sum()
    / size[several].sum(),
  }


def test_every_number_on_one_device_and_on_meshes(mesh_auto, mesh_explicit):
  base, others = models.models(3)
  others = thinned(base, others)
  wanted = reference(base, others)
  pair = reference(base, others[:2])
  for mesh in (None, mesh_auto, mesh_explicit):
    trees = [base, *others]
    if mesh is not None:
      trees = [models.put(tree, mesh) for tree in trees]
    found = pj.merging.conflicts(trees[0], trees[1:]).total
    for name in COUNTS:
      assert getattr(found, name) == wanted[name], name
    np.testing.assert_allclose(found.norms, wanted["norms"], rtol=1e-6)
    np.testing.assert_allclose(found.cosines, wanted["cosines"], atol=1e-6)
    assert found.sign == pytest.approx(wanted["sign"], rel=1e-5)
    # Of two, what cancels is the same number.
    assert found.against[0][1] == pytest.approx(pair["sign"], rel=1e-5)


def test_no_leaf_is_gathered(mesh_explicit, mesh_auto):
  base, others = models.models(2)
  for mesh in (mesh_auto, mesh_explicit):
    leaf, *given = (
      models.put(tree, mesh)["block"]["kernel"] for tree in (base, *others)
    )
    where = placement.leaf_of(leaf)
    text = measures.measure.lower(where, leaf, tuple(given)).compile().as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


def test_sums_are_accurate_and_counts_exact_for_any_size():
  rng = np.random.default_rng(0)
  for size in (0, 1, 9, 100_003):
    x = np.float32(1 + rng.random(size))
    masks = (x > 1.5, x > 1.25)
    found = sums.totals((x, x * x), local=True)
    again = sums.totals((x, x * x), local=False)
    exact = [np.float64(x).sum(), np.float64(x * x).sum()]
    np.testing.assert_allclose(found, exact, rtol=2e-7)
    np.testing.assert_allclose(again, exact, rtol=1e-5)
    counted = sums.counts(tuple(map(jnp.asarray, masks)) * 7, local=True)
    exact = [int(mask.sum()) for mask in masks] * 7
    assert measures.unlimbed(np.asarray(counted)).tolist() == exact


def test_many_leaves_are_cut_short_in_the_table_not_in_json():
  base = {f"layer_{i}": np.zeros(2, np.float32) for i in range(60)}
  other = {name: x + np.float32(1) for name, x in base.items()}
  report = pj.merging.conflicts(base, [other, other])
  assert "and 20 leaves with less" in str(report)
  assert len(report.to_json()["leaves"]) == 60


def test_a_leaf_nobody_changes_is_not_in_the_total():
  base = {"a": np.zeros(3, np.float32), "b": np.zeros((0, 2), np.float32)}
  report = pj.merging.conflicts(base, [base, base])
  assert report.leaves == () and report.total.size == 3
  assert report.total.cosines == ((0, 0), (0, 0)) and report.disjoint
  json.dumps(report.to_json(), allow_nan=False)
