"""The benchmark of histories runs, in small, and measures what it says."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from experiments.bench import (
  history_growth,
  history_limits,
  history_theta,
  history_versions,
  workload,
)
from experiments.bench.history_tables import Target, targets_table


@pytest.fixture
def settings(tmp_path):
  return history_versions.Settings(
    params=1e5, repeats=1, install=False, folder=tmp_path
  )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_versions_are_stored_read_and_compared(settings, dtype):
  section = history_versions.run(settings, dtype)
  times, sizes, others = section.tables
  peers = ("patchjax", "parent held", "Orbax", "safetensors")
  assert times.columns[1:5] == peers
  assert len(times.rows) == 5 + 3
  assert [row[0] for row in sizes.rows][-1] == "all"
  assert {row[0] for row in others.rows} >= {
    "commit of what has not changed",
    "fsck, everything verified",
    "gc of a branch of one version",
    "clone into another folder",
  }
  # Each way of being left out is said.
  assert any("Git LFS" in remark for remark in section.remarks)
  assert len(section.targets) == 5 + 3 + 3 + 2
  for table in (*section.tables, targets_table(section.targets)):
    assert table.rows[0][0] in table.text(markdown=False)
    assert table.text(markdown=True).count("\n|") == len(table.rows) + 2


def test_the_workload_of_git_theta_is_of_its_size(settings):
  value = workload.encoder()
  assert len(workload.flat(value)) == 51
  assert round(workload.nbytes(value) / 1e6, 1) == 98.6
  section = history_theta.run(settings)
  assert "patchjax, command" in section.tables[0].columns
  assert len(section.tables[1].rows) == 4


def test_growth_is_measured_at_three_lengths(settings):
  (table,) = history_growth.run(settings).tables
  assert table.columns[1:4] == ["1 commits", "10 commits", "100 commits"]
  assert [row[0] for row in table.rows][0] == "commit"


def test_limits_are_those_of_information_theory():
  rng = np.random.default_rng(0)
  uniform = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
  assert history_limits.plane_entropy(uniform) == pytest.approx(
    uniform.nbytes, rel=2e-3
  )
  assert history_limits.plane_entropy(np.zeros(99, np.uint16)) == 0
  old = rng.standard_normal(1 << 16, dtype=np.float32)
  assert history_limits.leaf_limit(old, old) == 0
  # One bit of one word: its place, of 2^16, and nothing else to say.
  new = old.copy()
  new[77] = np.nextafter(new[77], np.float32(9))
  assert history_limits.leaf_limit(new, old) == pytest.approx(2, abs=1e-4)
  # A share p of equal changes costs the entropy of p an entry.
  p = 1 / 16
  new = old.copy()
  new[: int(p * len(new))] = np.nextafter(
    new[: int(p * len(new))], np.float32(np.inf)
  )
  expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * len(new) / 8
  assert history_limits.leaf_limit(new, old) < 1.2 * expected


def test_versions_change_what_they_say():
  first, tuned, one, sparse, low_rank = workload.versions(1e5, np.float32)
  names = list(workload.flat(first.value))
  assert len(names) == 63

  def differing(a, b):
    a, b = workload.flat(a.value), workload.flat(b.value)
    return {name: np.count_nonzero(a[name] != b[name]) for name in a}

  assert min(differing(first, tuned).values()) > 0
  moved = differing(tuned, one)
  assert [name for name in names if moved[name]] == ["layers/6/mlp/up"]
  scattered = sum(differing(one, sparse).values())
  size = sum(x.size for x in workload.flat(one.value).values())
  assert scattered == pytest.approx(0.005 * size, rel=0.05)
  ranks = differing(sparse, low_rank)
  assert set(low_rank.patch.names) == {name for name in names if ranks[name]}


def test_targets_say_whether_they_were_reached():
  reached = Target.at_most("a", 1.0, 1.25, "x")
  missed = Target.at_most("b", 1.26, 1.25, "x")
  table = targets_table([reached, missed])
  assert "1 of 2" in table.title
  assert [row[-1] for row in table.rows] == ["yes", "NO"]


def test_unknown_sections_are_refused():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench.history", "--only=all"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert "there are machine, float32" in done.stderr
