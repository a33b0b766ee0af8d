"""The majority sign of TIES over files: exact, of the reads that find cuts."""

import numpy as np
import pytest

import patchjax as pj
from patchjax.interop.files import read
from patchjax.merging.files import merge_files
from patchjax.merging.streaming import majority
from patchjax.patches import engine, leafwise
from tests.merging.models import same_bits

SHAPE = (40, 50)
DENSITIES = [0.35, 0.35, 0.6]
SPARSE = [0.35, 0.99, 0.35]
METHODS = {
  "ties": pj.merging.ties(density=DENSITIES),
  "sparse": pj.merging.ties(density=SPARSE),  # more than is not zero
  "frequency": pj.merging.ties(density=DENSITIES, method="frequency"),
  "weights": pj.merging.ties(
    density=DENSITIES, weights=[0.5, 2.0, 1.0], weights_in_election=True
  ),
  "dropped": pj.merging.dare_ties(density=0.6, trim=0.3, key=4),
  "none": pj.merging.ties(density=[0.2, 1e-9, 0.4], one_more=False),
}


def models(seed, alike):
  """A base of zeros and three contributors whose entries share few buckets.

  Magnitudes differ in the last bits only, from 16 values; so many lie where
  the cuts are, and sums are often zero.

  Args:
    seed: of the numbers.
    alike: which share of the entries all contributors have in common.
  """
  rng = np.random.default_rng(seed)

  def draw():
    coarse = rng.integers(0, 16, SHAPE) / 8
    fine = 1 + rng.integers(0, 6, SHAPE) * 2.0**-20
    signs = rng.choice([-1, 1], SHAPE, p=[0.48, 0.52])
    return (coarse * fine * signs).astype(np.float32)

  common = {name: draw() for name in "abc"}
  others = [
    {
      name: np.where(rng.random(SHAPE) < alike, x, draw())
      for name, x in common.items()
    }
    for _ in range(3)
  ]
  return {name: np.zeros(SHAPE, np.float32) for name in "abc"}, others


def balance(others, method):
  """How many more votes are positive, by sorting."""
  weights = [0.5, 2.0, 1.0] if method == "weights" else [1.0] * 3
  total = 0
  densities = SPARSE if method == "sparse" else DENSITIES
  for x, density, weight in zip(others, densities, weights):
    flat = np.concatenate([x[name].reshape(-1) for name in sorted(x)])
    k = int(density * flat.size) + 1
    cut = np.sort(np.abs(flat))[-k]
    kept = np.where(np.abs(flat) >= cut, flat, np.float32(0))
    vote = np.sign(kept) if method == "frequency" else kept
    total = total + np.float32(weight) * vote
  return int(np.sum(total > 0)) - int(np.sum(total < 0))


@pytest.fixture
def seen(monkeypatch):
  """What was counted, and how many entries were kept for the end."""
  found = []
  difference = majority.Votes.difference

  def watched(self, searches):
    out = difference(self, searches)
    kept = sum(parts[0].size for *_, parts in self._kept)
    found.append((out, kept))
    return out

  monkeypatch.setattr(majority.Votes, "difference", watched)
  return found


@pytest.fixture
def passes(monkeypatch):
  """The stages that are counted in passes."""
  found = []
  run = engine._Eager.passes

  def watched(self, plan, index, *args):
    found.append(plan.stages[index][0].name)
    return run(self, plan, index, *args)

  monkeypatch.setattr(engine._Eager, "passes", watched)
  return found


@pytest.mark.parametrize("alike", [0.0, 0.8])
@pytest.mark.parametrize("name", METHODS)
def test_counted_exactly(name, alike, seen, passes, tmp_path):
  base, others = models(len(name), alike)
  out = tmp_path / "out.safetensors"
  merge_files(base, others, METHODS[name], out)
  assert not passes
  ((difference, kept),) = seen
  if name not in ("dropped", "none"):
    assert difference == balance(others, name)
  assert kept > 10 or name == "none"
  if alike:
    assert same_bits(read(out), pj.merge(base, others, METHODS[name]))


def test_of_too_many_entries_the_model_is_read_again(
  seen, passes, tmp_path, monkeypatch
):
  monkeypatch.setattr(majority, "_ROOM", 600)
  base, others = models(0, 0.7)
  out = tmp_path / "out.safetensors"
  merge_files(base, others, METHODS["ties"], out)
  assert seen == [(None, 0)] and passes == ["elect_sign"]
  assert same_bits(read(out), pj.merge(base, others, METHODS["ties"]))


def test_entries_are_looked_at_in_parts(seen, tmp_path, monkeypatch):
  monkeypatch.setattr(majority, "_TOGETHER", 64)
  base, others = models(1, 0.3)
  merge_files(base, others, METHODS["ties"], tmp_path / "out.safetensors")
  assert seen[0][0] == balance(others, "ties")


@pytest.mark.parametrize(
  "options",
  [{"exact_k": True}, {"scope": "leaf"}, {"flavour": "mergekit"}],
  ids=str,
)
def test_where_it_does_not_apply(options):
  stages = pj.merging.ties(density=0.3, **options).stages
  assert not majority.applies(leafwise.Plan(stages), 0)
  assert majority.applies(leafwise.Plan(METHODS["dropped"].stages), 1)
