"""The conflict report against numbers worked out by hand."""

import json

import numpy as np
import pytest

import patchjax as pj


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


def test_on_meshes(mesh_auto, mesh_explicit):
  from tests.merging.models import models, put

  base, others = models(2)
  wanted = pj.merging.conflicts(base, others).total
  for mesh in (mesh_auto, mesh_explicit):
    found = pj.merging.conflicts(
      put(base, mesh), [put(x, mesh) for x in others]
    ).total
    assert found.cosine == pytest.approx(wanted.cosine, rel=1e-4)
    assert found.sign == pytest.approx(wanted.sign, rel=1e-4)
