"""The heat map of a conflict report: what is drawn, read off the figure."""

import numpy as np
import pytest

import patchjax as pj
from patchjax.views.figures import shortened
from patchjax.views.grouping import grouped

pytest.importorskip("matplotlib")


def trees(layers=1, k=3):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  def tree():
    return {
      "head": draw(5),
      "layers": {
        f"{i}": {"kernel": draw(2, 3), "norm": {"bias": draw(2)}}
        for i in range(layers)
      },
    }

  base = tree()
  others = [tree() for _ in range(k)]
  others[0]["head"] = base["head"]
  return base, others


def drawn(report, what, **options):
  """Names of rows and columns, and the numbers in the cells."""
  axes = pj.views.heat_map(report, what, **options).axes[0]
  rows = [label.get_text() for label in axes.get_yticklabels()]
  columns = [label.get_text() for label in axes.get_xticklabels()]
  numbers = np.ma.filled(axes.collections[0].get_array(), np.nan)
  return rows, columns, numbers.reshape(len(rows), len(columns))


@pytest.mark.parametrize("what", ["cosine", "sign", "overlap"])
def test_cells_are_the_numbers_of_the_report(what):
  base, others = trees()
  report = pj.merging.conflicts(base, others, labels=["a", "b", "c"])
  rows, columns, numbers = drawn(report, what)
  assert rows == ["total", "head", "layers/0/kernel", "layers/0/norm/bias"]
  assert columns == ["a × b", "a × c", "b × c"]
  leaf = next(x for x in report.leaves if x.name == "layers/0/kernel")
  wanted = {
    "cosine": leaf.cosines[1][2],
    "sign": 100 * leaf.opposite[1][2] / leaf.entries[1][2],
    "overlap": 100.0,
  }[what]
  assert numbers[2, 2] == pytest.approx(wanted)
  # The first contributor does not change the head.
  if what == "overlap":
    assert numbers[1].tolist() == [0, 0, 100]
  else:
    assert np.isnan(numbers[1]).tolist() == [True, True, False]


def test_cells_of_ggn_and_colours_by_the_largest_leaf():
  base, others = trees()

  def model(params, x):
    return (
      (x * params["head"][None])
      @ np.ones((5, 3), np.float32)
      * np.float32([[1, 2, 3]])
    )

  probes = np.eye(5, dtype=np.float32)
  report = pj.merging.conflicts(base, others, probes=probes, apply_fn=model)
  rows, columns, numbers = drawn(report, "ggn")
  assert columns == ["0 × 1", "0 × 2", "1 × 2"]
  assert numbers[1, 2] == pytest.approx(report.total.ggn[1][2], rel=1e-6)
  figure = pj.views.heat_map(report, "ggn")
  assert "nats" in figure.axes[1].get_ylabel()


def test_many_leaves_are_grouped_by_prefix_in_natural_order():
  base, others = trees(layers=60)
  report = pj.merging.conflicts(base, others[:2])
  assert len(report.leaves) == 121
  rows, _, numbers = drawn(report, "cosine", rows=70)
  assert len(rows) == 62
  assert rows[:4] == ["total", "head", "layers/0/* (2)", "layers/1/* (2)"]
  assert rows[-1] == "layers/59/* (2)"
  # Of a group: the cosine of all its entries together.
  parts = [
    np.concatenate([np.ravel(x["kernel"]), x["norm"]["bias"]])
    for x in (tree["layers"]["7"] for tree in (base, *others))
  ]
  a, b = parts[1] - parts[0], parts[2] - parts[0]
  wanted = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert numbers[rows.index("layers/7/* (2)"), 0] == pytest.approx(
    wanted, abs=1e-6
  )
  assert drawn(report, "sign", rows=3)[0] == ["total", "head", "layers/* (120)"]


def test_a_flat_tree_keeps_its_largest_leaves():
  base = {f"w{i}": np.zeros(1 + i // 27, np.float32) for i in range(30)}
  other = {name: x + np.float32(1) for name, x in base.items()}
  report = pj.merging.conflicts(base, [other, other])
  rows = grouped(report.leaves, 4)
  assert [row.name for row in rows] == ["w27", "w28", "w29", "others (27)"]
  assert sum(row.size for row in rows) == report.total.size
  total = sum(rows[1:], rows[0])
  assert total.entries.tolist() == [list(x) for x in report.total.entries]


def test_a_picture_is_written(tmp_path):
  base, others = trees()
  report = pj.merging.conflicts(base, others)
  pj.views.heat_map(report).savefig(tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_drawn_is_said():
  base, others = trees()
  report = pj.merging.conflicts(base, others)
  with pytest.raises(ValueError, match="expected one of cosine, sign"):
    pj.views.heat_map(report, "angle")
  with pytest.raises(ValueError, match="give conflicts.* probes"):
    pj.views.heat_map(report, "ggn")
  with pytest.raises(ValueError, match="two contributors"):
    pj.views.heat_map(pj.merging.conflicts(base, others[:1]))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
  import sys

  base, others = trees()
  report = pj.merging.conflicts(base, others)
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"patchjax\[viz\]"):
    pj.views.heat_map(report)


def test_long_names_are_cut_in_the_middle():
  assert shortened("abc", 3) == "abc"
  assert shortened("abcdefgh", 5) == "ab…gh"
