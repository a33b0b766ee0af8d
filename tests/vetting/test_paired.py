"""The paired statistics against slow references, and their error rates."""

import functools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from patchjax.vetting import flips, paired
from tests.reference import stats_reference as slow


@st.composite
def counts(draw, largest=40):
  n = draw(st.integers(1, largest))
  b = draw(st.integers(0, n))
  return b, draw(st.integers(0, n - b)), n


@hypothesis.given(counts(), st.sampled_from([-0.3, -0.05, -0.01, 0.0, 0.1]))
def test_score_is_the_numerical_maximum_of_the_likelihood(found, null):
  b, c, n = found
  expected = slow.score(b, c, n, null)
  assert float(paired.score(b, c, n, null)) == pytest.approx(
    expected, abs=2e-4, rel=1e-3
  )


def test_score_at_zero_is_mcnemar_and_wald_for_many_examples():
  assert float(paired.score(10, 25, 200, 0.0)) == pytest.approx(
    15 / math.sqrt(35)
  )
  n, b, c, margin = 20_000, 500, 480, 0.01
  d, rho = (c - b) / n, (b + c) / n
  wald = (d + margin) / math.sqrt((rho - d * d) / n)
  assert float(paired.score(b, c, n, -margin)) == pytest.approx(wald, rel=0.03)


def test_score_grows_with_the_gains_at_fixed_discordance():
  # The exact p-value relies on it.
  for n in (5, 30, 200):
    for null in (-0.2, -0.01, 0.0, 0.05):
      for s in range(0, n + 1, max(1, n // 15)):
        gained = np.arange(s + 1)
        values = paired.score(s - gained, gained, n, null)
        assert np.all(np.diff(values) > 0.0)


@pytest.mark.parametrize(
  "b, c, n, null",
  [
    (0, 0, 20, -0.1),
    (0, 0, 35, -0.1),
    (2, 3, 30, -0.15),
    (3, 1, 25, -0.3),
    (0, 4, 24, 0.0),
    (5, 12, 30, 0.0),
    (1, 9, 28, 0.1),
    (10, 0, 20, -0.2),
    (2, 5, 24, 0.4),
    (0, 3, 20, 0.3),
    (0, 0, 25, 0.1),
  ],
)
def test_exact_p_is_the_sum_over_all_outcomes(b, c, n, null):
  statistic = functools.lru_cache(maxsize=None)(
    lambda i, j: float(paired.score(i, j, n, null))
  )
  expected = slow.exact_p(b, c, n, null, statistic, points=100)
  assert paired.exact_p(b, c, n, null) == pytest.approx(expected, abs=3e-4)


@hypothesis.given(counts(300), st.floats(-0.5, 0.5))
def test_the_two_p_values_are_not_both_small(found, null):
  b, c, n = found
  above = paired.exact_p(b, c, n, null)
  below = paired.exact_p(c, b, n, -null)
  assert above + below >= 1.0
  # An estimate on the null's own side is no evidence against it.
  if (c - b) / n <= null:
    assert above > 0.3
  else:
    assert below > 0.3


@pytest.mark.parametrize("null", [-0.2, -0.05, 0.0, 0.1])
def test_error_of_passing_is_at_most_alpha_for_every_discordance(null):
  # All outcomes of n examples, so this is the size itself, not a simulation.
  n, alpha = 40, 0.05
  passing = [
    (b, c)
    for b in range(n + 1)
    for c in range(n + 1 - b)
    if paired.exact_p(b, c, n, null) <= alpha
  ]
  sizes = [
    sum(
      slow.trinomial(b, c, n, (rho - d) / 2, (rho + d) / 2) for b, c in passing
    )
    for rho in np.linspace(max(0.0, -null), 1.0, 40)
    for d in (min(null, rho), max(-rho, min(null, rho) - 0.05))
  ]
  assert max(sizes) <= alpha
  assert max(sizes) > 0.03  # and is not given away


def test_wald_would_break_its_level_where_the_exact_test_keeps_it():
  n, margin, rho, alpha = 100, 0.02, 0.02, 0.05  # all discordance is loss
  wald = exact = 0.0
  for b in range(n + 1):
    mass = slow.trinomial(b, 0, n, rho, 0.0)
    d = -b / n
    se = math.sqrt((b / n - d * d) / n)
    wald += mass * (d + margin > 1.645 * se)
    exact += mass * (paired.exact_p(b, 0, n, -margin) <= alpha)
  assert wald > 0.12 and exact <= alpha


def test_simulated_errors_and_power_at_the_planned_size():
  n, margin, rho = 773, 0.02, 0.05  # the plan for power .8
  rng = np.random.default_rng(0)
  p = functools.lru_cache(maxsize=None)(
    lambda b, c: paired.exact_p(b, c, n, -margin)
  )

  def passes(difference, runs):
    cells = [(rho - difference) / 2, (rho + difference) / 2, 1 - rho]
    draws = rng.multinomial(n, cells, size=runs)
    return np.mean([p(int(b), int(c)) <= 0.05 for b, c, _ in draws])

  assert 0.74 < passes(0.0, 600) < 0.86
  assert passes(-margin, 1500) < 0.065  # .05 and three standard errors


@hypothesis.given(counts(200))
def test_clopper_pearson_inverts_the_binomial(found):
  k, _, n = found
  low, high = flips.clopper_pearson(k, n, alpha=0.05)
  expected_low, expected_high = slow.clopper_pearson(k, n, 0.05)
  assert low == pytest.approx(expected_low, abs=1e-9)
  assert high == pytest.approx(expected_high, abs=1e-9)
  assert low <= k / n <= high


def test_clopper_pearson_without_failures_is_the_closed_form():
  for n in (1, 10, 299, 2995):
    bound = flips.clopper_pearson(0, n, alpha=0.05)[1]
    assert bound == pytest.approx(1.0 - 0.05 ** (1.0 / n))
  assert flips.clopper_pearson(0, 299, alpha=0.05)[1] <= 0.01
  assert flips.clopper_pearson(0, 298, alpha=0.05)[1] > 0.01
  assert flips.clopper_pearson(0, 2995, alpha=0.05)[1] <= 0.001


@hypothesis.given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_counts_the_splits(b, c):
  assert flips.mcnemar(b, c) == pytest.approx(slow.mcnemar(b, c))


def test_mcnemar_known_values():
  assert flips.mcnemar(0, 5) > 0.05 >= flips.mcnemar(0, 6)
  assert flips.mcnemar(10, 0) > 0.001 >= flips.mcnemar(11, 0)


@hypothesis.given(counts(500))
def test_interval_holds_the_estimate_and_mirrors(found):
  b, c, n = found
  low, high = paired.score_interval(b, c, n, alpha=0.05)
  assert -1.0 <= low <= (c - b) / n + 1e-9 and (c - b) / n <= high + 1e-9 <= 1.1
  mirrored = paired.score_interval(c, b, n, alpha=0.05)
  assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_interval_covers():
  rng = np.random.default_rng(1)
  n, lose, gain = 150, 0.06, 0.1
  draws = rng.multinomial(n, [lose, gain, 1 - lose - gain], size=800)
  inside = [
    low < gain - lose < high
    for low, high in (
      paired.score_interval(int(b), int(c), n, alpha=0.05) for b, c, _ in draws
    )
  ]
  assert 0.87 < np.mean(inside) < 0.93


def test_student_against_numerical_integration():
  rng = np.random.default_rng(2)
  old = rng.normal(size=12)
  new = old + rng.normal(0.1, 0.3, size=12)
  found = paired.compare(old, new, null=-0.05, alpha=0.05)
  d = new - old
  se = np.std(d, ddof=1) / math.sqrt(12)
  t = (d.mean() + 0.05) / se
  assert found.p_above == pytest.approx(slow.student_tail(t, 11), abs=1e-9)
  assert found.p_below == pytest.approx(1.0 - found.p_above)
  assert found.low == pytest.approx(d.mean() - 1.7958848 * se)
  assert found.variance == pytest.approx(se**2 * 12)


def test_clusters_against_the_double_loop():
  rng = np.random.default_rng(3)
  clusters = rng.integers(0, 30, size=300)
  shift = rng.normal(size=30)[clusters]
  old = rng.normal(size=300)
  new = old + 0.3 * shift + rng.normal(0.0, 0.1, size=300)
  plain = paired.compare(old, new, null=0.0, alpha=0.05)
  found = paired.compare(old, new, null=0.0, alpha=0.05, clusters=clusters)
  se = slow.clustered_se(list(new - old), list(clusters))
  assert math.sqrt(found.variance / 300) == pytest.approx(se)
  assert found.units == np.unique(clusters).size
  assert found.high - found.low > 2.0 * (plain.high - plain.low)


def test_one_cluster_an_example_is_no_clustering():
  rng = np.random.default_rng(4)
  old, new = rng.normal(size=(2, 50))
  plain = paired.compare(old, new, null=0.0, alpha=0.05)
  found = paired.compare(old, new, null=0.0, alpha=0.05, clusters=np.arange(50))
  assert found == plain


def test_clustered_flips_count_for_less():
  lost = np.repeat([1.0] * 3 + [0.0] * 57, 10)
  clusters = np.repeat(np.arange(60), 10)
  bound = flips.flip_bounds(lost, alpha=0.05, clusters=clusters)[1]
  # Ten copies of each answer are one answer.
  single = flips.clopper_pearson(3, 60, alpha=0.05)[1]
  assert bound == pytest.approx(single, rel=0.03)
  none = flips.flip_bounds(np.zeros(600), alpha=0.05, clusters=clusters)
  assert none == flips.clopper_pearson(0, 60, alpha=0.05)
  one = flips.flip_bounds(lost, alpha=0.05, clusters=np.zeros(600))
  assert one[1] > 0.9


def test_equal_real_outcomes_prove_no_more_than_their_number():
  old = np.linspace(0.0, 1.0, 50)
  found = paired.compare(old, old, null=-0.01, alpha=0.05)
  assert found.difference == 0.0
  assert found.low == pytest.approx(-(1.0 - 0.05 ** (1.0 / 50)))
  assert found.p_above == pytest.approx(0.99**50)
  many = np.linspace(0.0, 1.0, 299)
  assert paired.compare(many, many, null=-0.01, alpha=0.05).p_above <= 0.05


def test_constant_outcomes_and_single_ones_show_nothing():
  for old in (np.full(1000, 0.5), np.array([0.25])):
    found = paired.compare(old, old, null=-0.01, alpha=0.05)
    assert found.p_above == found.p_below == 1.0
    assert found.low == -math.inf and found.high == math.inf


def test_type_one_error_of_the_real_valued_test():
  rng = np.random.default_rng(5)
  n, margin, wrong = 60, 0.2, 0
  for _ in range(1000):
    old = rng.normal(size=n)
    new = old + rng.normal(-margin, 0.5, size=n)
    wrong += paired.compare(old, new, null=-margin, alpha=0.05).p_above <= 0.05
  assert 0.03 < wrong / 1000 < 0.07
