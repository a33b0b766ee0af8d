"""The benchmark of merges runs, in small, and measures what it says."""

import numpy as np
import pytest

import patchjax as pj
from experiments.bench import (
  merging_core,
  merging_gpu,
  merging_scale,
  merging_scale_check,
  workload,
)
from experiments.bench.history_tables import targets_table
from experiments.bench.merging_files import METHODS, recipe, shapes
from experiments.bench.merging_methods import BY_NAME, MAIN
from patchjax.merging.files import merge_files
from patchjax.merging.methods import BY_NAME as OURS


@pytest.fixture(autouse=True)
def decoder(monkeypatch):
  """Two shapes only: what takes long is to compile for each."""

  def small(params, *, seed=0):
    rng = np.random.default_rng(seed)
    width = int(params**0.5)
    return {
      "embed": rng.standard_normal((width, width), np.float32),
      "norm": rng.standard_normal(width, np.float32),
    }

  monkeypatch.setattr(workload, "decoder", small)


@pytest.fixture
def settings(tmp_path):
  return merging_core.Settings(
    params=1e4,
    repeats=2,
    install=False,
    folder=tmp_path,
    methods=("linear",),
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merges_are_timed_beside_the_copy(settings, dtype):
  section = merging_core.run(settings, dtype)
  (table,) = section.tables
  assert [row[0] for row in table.rows] == ["linear"]
  assert all(len(row) == len(table.columns) for row in table.rows)
  # mergekit was not to be installed: that is said, and no number made up.
  assert any("--install" in remark for remark in section.remarks)
  assert all(row[table.columns.index("mergekit")] == "-" for row in table.rows)
  (target,) = section.targets
  assert "bytes-moved limit" in target.what
  assert "of 1 reached" in targets_table(section.targets).title


def test_every_merge_can_be_made():
  assert len(MAIN) == 9
  models = [workload.decoder(1e4, seed=i) for i in range(2)]
  for contest in BY_NAME.values():
    assert contest.name in OURS
    assert isinstance(contest.method(models), pj.Transform)
    assert contest.paper is None or isinstance(contest.paper(), pj.Transform)


def test_what_is_copied_is_what_is_moved(settings):
  tree = workload.decoder(1e4)
  contest = BY_NAME["slerp"]
  held = merging_core._models(1e4, contest.count, np.float32)
  result = merging_core._measure(contest, held, None, settings)
  # The base and one contributor are read, one result is written.
  assert result.moved == 3 * workload.nbytes(tree)


def test_models_in_files_are_of_the_size_asked_for(tmp_path):
  size = sum(int(np.prod(shape)) for shape in shapes(151e6).values())
  assert size == pytest.approx(151e6, rel=0.01)
  models = [tmp_path / f"model{i}" for i in range(5)]
  for method in METHODS:
    text = recipe(models, method).read_text()
    # Linear takes no base in mergekit.
    assert ("base_model" in text) == (method != "linear")


def test_an_accelerator_is_measured_beside_its_copy(monkeypatch):
  some = {"linear": merging_gpu.methods()["linear"]}
  monkeypatch.setattr(merging_gpu, "methods", lambda: some)
  table = merging_gpu.measure(2e7, 1)
  assert [row[0] for row in table.rows] == ["copy", "linear"]
  # Four models are read and one is written; a copy reads one and writes one.
  copied, merged = (float(row[2]) for row in table.rows)
  assert merged / copied == pytest.approx(5 / 2, rel=0.1)
  assert all(float(row[-1]) > 0 for row in table.rows)


def test_a_large_result_is_checked_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(merging_scale_check, "COLUMNS", 256)
  monkeypatch.setattr(merging_scale, "COLUMNS", 256)
  monkeypatch.setattr(merging_scale_check, "_ROWS", 8)
  leaves = {"a": (256, 256), "b": (256, 256)}
  paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
  for i, path in enumerate(paths):
    merging_scale.write_sparse(path, leaves, i)
  out, density = tmp_path / "out", merging_scale.DENSITY
  ties = pj.merging.ties(density=density)
  merge_files(paths[0], paths[1:], ties, out, shard_bytes=100_000)
  checked = merging_scale_check.check(leaves, density, out)
  assert checked.right and checked.entries == 256 * 512
  assert 0 < checked.tied < checked.merged < checked.entries / 16
  # It sees one entry in a hole, and a cut that is off by one entry.
  with open(next(out.glob("*2.safetensors")), "r+b") as file:
    file.seek(-2, 2)
    file.write(b"\0\1")
  assert merging_scale_check.check(leaves, density, out).wrong == 1
  less = pj.merging.ties(density=density - 1 / checked.entries)
  merge_files(paths[0], paths[1:], less, out, shard_bytes=100_000)
  assert 0 < merging_scale_check.check(leaves, density, out).wrong < 20
