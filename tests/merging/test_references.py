"""The numpy references: as mergekit, by its answers; as papers, by hand.

The recorded answers are those of mergekit 0.1.5, see tests/golden. The other
references have no program to be held against here, so their formulas are
worked out on a few numbers.
"""

import numpy as np
import pytest

from tests.golden import recorded
from tests.reference import (
  merging_averages,
  merging_coefficients,
  merging_robust,
  merging_selective,
  merging_sparse,
  merging_spherical,
  ties_reference,
)

TOPICS = (
  merging_averages,
  merging_coefficients,
  merging_robust,
  merging_selective,
  merging_sparse,
  merging_spherical,
)
CASES = recorded.cases()
MERGEKIT = """
  linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear
  dare_ties della della_linear breadcrumbs breadcrumbs_ties sce ram ramplus
  model_stock nearswap arcee_fusion passthrough
""".split()


def answer(case):
  (topic,) = [t for t in TOPICS if hasattr(t, case.method)]
  return getattr(topic, case.method)(
    case.base,
    case.models,
    masks=case.masks,
    flavour="mergekit",
    **case.settings,
  )


def one(*values):
  return {"w": np.float32(values)}


def close(merged, *values):
  np.testing.assert_allclose(merged["w"], values, rtol=1e-6, atol=1e-7)


def test_all_of_mergekit_is_recorded():
  assert sorted({c.method for c in CASES}) == sorted(MERGEKIT)
  assert recorded.PATH.stat().st_size < 300_000


@pytest.mark.parametrize(
  "case", [c for c in CASES if c.dtype == "float32"], ids=lambda c: c.name
)
def test_equals_mergekit(case):
  merged = answer(case)
  assert merged.keys() == case.merged.keys()
  for name, expected in case.merged.items():
    bound = 1e-6 * np.max(np.abs(expected))
    np.testing.assert_allclose(
      merged[name], expected, rtol=0, atol=bound, err_msg=name
    )


@pytest.mark.parametrize(
  "case", [c for c in CASES if c.dtype == "bfloat16"], ids=lambda c: c.name
)
def test_equals_mergekit_in_bfloat16(case):
  merged = answer(case)
  for name, expected in case.merged.items():
    rounded = recorded.bfloat16(merged[name])
    if case.method in ("linear", "slerp"):  # float32 inside, one rounding
      assert np.mean(rounded == expected) >= 0.999, name
    # Others round every step to bfloat16: a few units of the largest.
    bound = 2.0**-7 * np.max(np.abs(expected))
    np.testing.assert_allclose(rounded, expected, rtol=0, atol=bound)


def test_the_recorded_draws_matter():
  case = next(c for c in CASES if c.method == "dare_linear")
  drawn = case.masks[0]
  other = [{n: None if m is None else ~m for n, m in drawn.items()}]
  case.masks[:] = other + case.masks[1:]
  name = "layers.0.kernel"
  distance = np.abs(answer(case)[name] - case.merged[name])
  case.masks[0] = drawn
  assert np.max(distance) > 1e-3


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_paper_ties_is_the_older_reference(density):
  case = next(c for c in CASES if c.method == "ties")
  weights = [1.0, 2.0, 0.5]
  merged = merging_sparse.ties(
    case.base, case.models, density=density, weights=weights, scale=0.7
  )
  expected = ties_reference.ties(
    list(case.base.values()),
    [list(m.values()) for m in case.models],
    density,
    weights=weights,
    scale=0.7,
  )
  for x, y in zip(merged.values(), expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_paper_dare_and_della_divide_by_the_probability():
  base, model = one(0, 0, 0, 0), one(4, -1, 2, 3)
  mask = [{"w": np.array([True, True, False, True])}]
  dare = merging_sparse.dare_linear(base, [model], density=0.5, masks=mask)
  close(dare, 8, -2, 0, 6)
  # Ranks 3 0 1 2 of 0..3: probabilities 0.6 0.4 0.4667 0.5333.
  della = merging_sparse.della(
    base, [model], density=0.5, epsilon=0.1, masks=mask
  )
  close(della, 4 / 0.6, -1 / 0.4, 0, 3 / (0.4 + 0.2 * 2 / 3))


def test_paper_dare_ties_trims_what_was_not_dropped():
  base, model = one(0, 0, 0, 0, 0), one(5, -1, 2, 3, 4)
  mask = [{"w": np.array([False, True, True, True, True])}]
  merged = merging_sparse.dare_ties(
    base, [model], density=0.5, trim=0.2, masks=mask
  )
  close(merged, 0, 0, 0, 6, 8)  # one more than int(0.2 * 5), as in TIES


def test_paper_breadcrumbs_counts_in_rows():
  base = {"w": np.zeros((2, 4), np.float32)}
  model = {"w": np.float32([[1, 2, 3, 4], [80, -70, 60, 50]])}
  options = {"density": 0.5, "gamma": 0.25}
  rows = merging_sparse.breadcrumbs(base, [model], **options)
  close(rows, [0, 2, 3, 0], [0, -70, 60, 0])
  leaf = merging_sparse.breadcrumbs(base, [model], scope="leaf", **options)
  close(leaf, [0, 0, 3, 4], [0, 0, 60, 50])


def test_paper_sce_selects_for_the_weights_only():
  base, models = one(0, 0), [one(3, 1), one(1, 1)]
  # Only the first entry varies: weights 9 and 1 over 10.
  merged = merging_selective.sce(base, models, density=1.0)
  close(merged, (10 * 3 + 2 * 1) / 12, 1)
  # int(0.99) selects no entry at all: equal weights, or nothing to merge.
  options = {"density": 0.99}
  close(merging_selective.sce(base, models, **options), 2, 1)
  merged = merging_selective.sce(base, models, flavour="mergekit", **options)
  close(merged, 0, 0)


def test_paper_ram_plus_counts_in_the_model():
  base = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
  models = [
    {"a": np.float32([1, 1]), "b": np.float32([1, 0])},
    {"a": np.float32([3, 0]), "b": np.float32([0, 0])},
  ]
  merged = merging_selective.ramplus(base, models, r=0.2)
  np.testing.assert_allclose(merged["a"], [2, 1 + 0.2 * 0.5])
  np.testing.assert_allclose(merged["b"], [1 + 0.2 * 0.5, 0])


def test_spherical_means():
  x, y = one(2, 0), one(0, 4)
  half = np.sqrt(0.5)
  close(merging_spherical.slerp(x, [y], t=0.5), 2 * half, 4 * half)
  close(merging_spherical.nuslerp(None, [x, y]), 2 * half, 4 * half)
  close(merging_spherical.multislerp(None, [x, y]), 3 * half, 3 * half)
  close(merging_spherical.karcher(None, [x, y]), 3 * half, 3 * half)
  rows = {"w": np.float32([[2, 0], [3, 1]])}
  others = {"w": np.float32([[0, 4], [3, 1]])}
  merged = merging_spherical.nuslerp(
    None, [rows, others], flatten=False, row_wise=True
  )
  close(merged, [2 * half, 4 * half], [3, 1])


def test_averages():
  x, y, z = one(0, 4), one(4, 0), one(8, 8)
  close(merging_averages.uniform_soup(None, [x, y, z]), 4, 4)
  close(merging_averages.wise_ft(x, [y], alpha=0.25), 1, 3)
  close(merging_averages.ema(None, [x, y, z], decay=0.5), 5, 5)
  close(merging_averages.lawa(None, [x, y, z], window=2), 6, 4)


def test_greedy_soup_leaves_out_what_does_not_help():
  models = [one(0.0), one(3.0), one(-1.0), one(1.0)]

  def score(model):
    return -abs(float(model["w"][0]) - 0.5)

  # 1 comes before its equal 0; with 0 the mean is exact; 3 and -1 do harm.
  assert merging_averages.greedy_ingredients(models, score) == [3, 0]
  close(merging_averages.greedy_soup(None, models, score=score), 0.5)


def test_magmax_emr_and_tall_masks():
  base, models = one(0, 0, 0), [one(1, -3, 2), one(-1, 1, 1)]
  close(merging_selective.magmax(base, models, scale=1.0), -1, -3, 2)
  # A sum of 0 is negative; the mean over a leaf is that of three entries.
  close(merging_selective.emr(base, models), -1, -3, 2)
  rescalers = merging_selective.emr_rescalers(base, models)
  np.testing.assert_allclose(rescalers, [6 / 5, 3 / 3])
  masks = merging_selective.tall_masks(base, models, threshold=1.0)
  assert masks[0]["w"].tolist() == [False, True, True]
  assert masks[1]["w"].tolist() == [False, False, False]
  # Needed by both: the first entry, where they cancel, and the last.
  merged = merging_selective.consensus_ta(base, models, threshold=0.4)
  close(merged, 0, 0, 3)


def test_pcb_clamps_and_cuts():
  base, model = one(0, 0, 0, 0), one(1, -3, 2, 0.5)
  merged = merging_selective.pcb(base, [model, model], density=0.5)
  # Clamped to the third of four sorted magnitudes; the second largest score
  # of four is the cut, and what is at the cut has no weight.
  close(merged, 0, -2, 0, 0)


def test_coefficients():
  base, models = one(0, 0), [one(1, 0), one(1, 1)]
  cosine = np.sqrt(0.5)
  t = 2 * cosine / (1 + cosine)
  close(merging_coefficients.model_stock(base, models), t, t / 2)
  close(merging_coefficients.metagpt(base, models), 1, 2 / 3)
  names = ("embed", "layers.0.w", "layers.1.w", "layers.2.w")
  base = {n: np.zeros(1, np.float32) for n in names}
  model = {n: np.ones(1, np.float32) for n in names}
  merged = merging_coefficients.lines(base, [model, model], beta=0.4)
  expected = [1.0, 1.0, 1.4, 1.8]
  np.testing.assert_allclose(np.concatenate(list(merged.values())), expected)


def test_robust_aggregation():
  base = one(0, 0)
  models = [one(1, 0), one(1, 1), one(2, 1), one(1, 2), one(100, -100)]
  close(merging_robust.median(None, models), 1, 1)
  close(merging_robust.trimmed_mean(None, models, drop=1), 4 / 3, 2 / 3)
  close(merging_robust.krum(None, models, attackers=1), 1, 1)
  merged = merging_robust.krum(None, models, attackers=1, chosen=4)
  close(merged, 5 / 4, 1)
  merged = merging_robust.geometric_median(None, models, iterations=100)
  gaps = np.stack([merged["w"] - m["w"] for m in models])
  pull = sum(gap / np.linalg.norm(gap) for gap in gaps)
  np.testing.assert_allclose(pull, 0, atol=1e-5)  # unit vectors in balance
  merged = merging_robust.centered_clipping(
    base, [one(3, 4), one(0, 1)], radius=1.0
  )
  close(merged, 0.3, 0.9)
