"""The gate: counts, three values, advice, claims, slices, bad input."""

import functools
import math

import numpy as np
import pytest

from patchjax.trees.errors import VetError
from patchjax.vetting import Policy, Suite, Test, flips, gate, paired, plan
from patchjax.vetting.gating import holm
from tests.reference import stats_reference as slow


def pair(n, *, both, lost, gained):
  """Outcomes with exactly these counts."""
  old, new = np.zeros(n), np.zeros(n)
  old[: both + lost] = 1
  new[:both] = 1
  new[both + lost : both + lost + gained] = 1
  return old, new


def judge(old, new, policy=None, *, claims=(), **test):
  suite = Suite("s", "1", [Test("t", lambda p: p, **test)])
  return gate(
    suite.outcomes({"t": old}),
    suite.outcomes({"t": new}),
    suite,
    policy,
    claims=claims,
  )


LOOSE = Policy(margin=0.02, flips=None)


def test_counts_are_exact():
  old, new = pair(1000, both=700, lost=12, gained=34)
  row = judge(old, new, LOOSE).rows[0]
  assert (row.n, row.both, row.lost, row.gained) == (1000, 700, 12, 34)
  assert row.old == 0.712 and row.new == 0.734
  assert row.difference == pytest.approx(0.022)
  assert row.p == paired.exact_p(12, 34, 1000, -0.02)
  assert (row.low, row.high) == paired.score_interval(12, 34, 1000, alpha=0.05)
  assert row.mcnemar == pytest.approx(slow.mcnemar(12, 34))
  assert row.flip_bound == pytest.approx(
    slow.clopper_pearson(12, 1000, 0.05)[1]
  )


@pytest.mark.parametrize(
  "lost, gained, result",
  [(20, 20, "pass"), (300, 70, "fail"), (35, 20, "undecided")],
)
def test_three_values(lost, gained, result):
  old, new = pair(1200, both=700, lost=lost, gained=gained)
  verdict = judge(old, new, LOOSE)
  assert verdict.rows[0].result == result
  assert (
    verdict.outcome
    == {
      "pass": "accepted",
      "fail": "refused",
      "undecided": "undecided",
    }[result]
  )
  flags = (verdict.accepted, verdict.refused, verdict.undecided)
  assert sum(flags) == 1


def test_mirrored_evidence_gives_mirrored_p_values():
  old, new = pair(400, both=200, lost=30, gained=12)
  one = paired.compare(old, new, null=-0.05, alpha=0.05)
  two = paired.compare(new, old, null=0.05, alpha=0.05)
  assert one.p_above == two.p_below and one.p_below == two.p_above


def test_identical_models_with_few_examples_are_undecided_not_accepted():
  old, new = pair(100, both=60, lost=0, gained=0)
  row = judge(old, new, Policy(margin=0.01, flips=None)).rows[0]
  assert row.result == "undecided" and row.more == 199
  assert "too few examples" in row.reason


def test_advice_is_the_plan_at_the_observed_discordance():
  old, new = pair(300, both=200, lost=10, gained=10)
  row = judge(old, new, LOOSE).rows[0]
  assert row.result == "undecided"
  assert row.more == plan(0.02, 20 / 300) - 300
  # The advice holds: the same rates at that size pass.
  n = 300 + row.more
  lost = round(n * 10 / 300)
  old, new = pair(n, both=2 * n // 3, lost=lost, gained=lost)
  assert judge(old, new, LOOSE).accepted


def test_advice_counts_the_rows_that_must_pass_together():
  old, new = pair(300, both=200, lost=10, gained=10)
  slices = {name: np.arange(300) for name in "abc"}
  row = judge(old, new, LOOSE, slices=slices).rows[0]
  assert row.more == plan(0.02, 20 / 300, tests=4) - 300


def test_advice_where_the_loss_eats_the_margin():
  old, new = pair(3000, both=2000, lost=92, gained=48)
  row = judge(old, new, LOOSE).rows[0]
  d = -44 / 3000
  assert row.result == "undecided" and "uses up the margin" in row.reason
  assert row.more == plan(0.02, 140 / 3000, difference=d) - 3000


def test_no_advice_where_more_examples_cannot_help():
  old, new = pair(2000, both=1000, lost=120, gained=80)
  row = judge(old, new, LOOSE).rows[0]
  assert row.result == "undecided" and row.more is None
  assert "hardly help" in row.reason


@pytest.mark.parametrize(
  "lost, result", [(0, "pass"), (12, "pass"), (20, "undecided"), (60, "fail")]
)
def test_flip_cap(lost, result):
  # As many gained as lost: only the flips speak.
  old, new = pair(1000, both=600, lost=lost, gained=lost)
  policy = Policy(margin=0.05, flips=0.02)
  row = judge(old, new, policy).rows[0]
  assert row.result == result
  low, high = slow.clopper_pearson(lost, 1000, 0.05)
  assert row.flip_bound == pytest.approx(high) and row.flip_cap == 0.02
  assert (high <= 0.02) == (result == "pass")
  assert (low > 0.02) == (result == "fail")
  if result == "fail":
    assert f"{lost} of 1000 flipped" in row.reason


def test_flip_advice_holds():
  old, new = pair(1000, both=600, lost=17, gained=17)
  row = judge(old, new, Policy(margin=0.05, flips=0.02)).rows[0]
  n = 1000 + row.more
  bound = flips.clopper_pearson(0.017 * n, n, alpha=0.05)[1]
  assert bound <= 0.02


def test_a_slice_declared_beforehand_refuses_a_good_mean():
  # 1000 examples; the mean even gains, the minority of 150 is broken.
  old = np.ones(1000)
  old[150:400] = 0
  new = old.copy()
  new[:40] = 0
  new[150:220] = 1
  slices = {"minority": np.arange(1000) < 150, "rest": np.arange(150, 1000)}
  policy = Policy(margin=0.02, slice_margin=0.06, flips=0.1, slice_flips=0.2)
  verdict = judge(old, new, policy, slices=slices)
  assert [row.result for row in verdict.rows] == ["pass", "fail", "pass"]
  assert verdict.refused
  assert verdict.rows[1].name == "t/minority" and verdict.rows[1].n == 150
  assert verdict.reasons[0].startswith("t/minority: worse by more than")
  assert "t/minority" not in str(judge(old, new, policy))
  assert judge(old, new, policy).accepted  # without it nobody would have seen


def test_unprotected_tests_are_watched():
  old, new = pair(500, both=300, lost=100, gained=0)
  same = np.ones(500)
  suite = Suite(
    "s",
    "1",
    [
      Test("guard", lambda p: p),
      Test("extra", lambda p: p, protected=False, slices={"a": [0, 1]}),
    ],
  )
  verdict = gate(
    suite.outcomes({"guard": same, "extra": old}),
    suite.outcomes({"guard": same, "extra": new}),
    suite,
    LOOSE,
  )
  assert verdict.accepted
  assert [r.role for r in verdict.rows] == ["protected", "watched", "watched"]
  assert verdict.rows[1].lost == 100 and verdict.rows[1].result == "watched"


def test_claims_need_their_gain_shown():
  old, new = pair(1000, both=600, lost=20, gained=120)
  verdict = judge(old, new, LOOSE, claims=["t"])
  assert verdict.accepted and verdict.rows[1].role == "claim"
  assert judge(old, new, LOOSE, claims="t") == verdict
  assert judge(old, new, LOOSE, claims={"t": 0.05}).accepted
  unsure = judge(old, new, LOOSE, claims={"t": 0.09})
  assert unsure.undecided and unsure.rows[1].more > 0
  over = judge(old, new, LOOSE, claims={"t": 0.2})
  assert over.refused and "shown not to" in over.reasons[0]
  assert over.reasons[0].startswith("claim t:")
  same = judge(old, old, LOOSE, claims=["t"])
  assert same.undecided and same.rows[1].more is None


def test_claims_on_a_slice():
  old, new = pair(1000, both=600, lost=0, gained=100)
  slices = {"a": np.arange(500, 1000), "b": np.arange(500)}
  assert judge(old, new, LOOSE, slices=slices, claims=["t/a"]).accepted
  verdict = judge(old, new, LOOSE, slices=slices, claims=["t/b"])
  assert verdict.rows[-1].name == "t/b" and verdict.undecided


def test_claims_are_corrected_together():
  # p of one claim about .02: shown alone, not beside another weak one.
  old, new = pair(1000, both=500, lost=42, gained=60)
  suite = Suite("s", "1", [Test(x, lambda p: p) for x in "ab"])
  policy = Policy(margin=0.05, flips=None)
  outcomes = [suite.outcomes({"a": x, "b": x}) for x in (old, new)]
  alone = gate(*outcomes, suite, policy, claims=["a"])
  together = gate(*outcomes, suite, policy, claims=["a", "b"])
  p = paired.exact_p(42, 60, 1000, 0.0)
  assert 0.5 * 0.05 < p < 0.05
  assert alone.accepted and alone.rows[-1].p == p
  assert together.rows[-1].p == pytest.approx(2 * p)
  assert together.undecided


def test_holm_is_the_closed_test():
  rng = np.random.default_rng(0)
  for k in (1, 2, 3, 4):
    for _ in range(50):
      p = list(rng.uniform(0.0, 0.1, size=k))
      rejected = [x <= 0.05 for x in holm(p)]
      assert rejected == slow.holm_by_closure(p, 0.05)


def test_real_valued_outcomes_have_no_flips():
  rng = np.random.default_rng(1)
  old = rng.normal(size=800)
  row = judge(old, old + rng.normal(0.0, 0.02, 800), Policy()).rows[0]
  assert row.result == "pass"
  assert row.both is row.lost is row.gained is row.mcnemar is None
  assert row.flip_bound is row.flip_cap is None
  worse = judge(old, old + rng.normal(-0.1, 0.1, 800), Policy())
  assert worse.refused and "lost" not in worse.reasons[0]
  noise = rng.normal(size=800)
  noisy = judge(old, old + noise - noise.mean(), Policy()).rows[0]
  assert noisy.result == "undecided" and noisy.more > 10_000


def test_half_points_make_outcomes_real_valued():
  old, new = pair(1000, both=600, lost=5, gained=5)
  new[-1] = 0.5
  assert judge(old, new, LOOSE).rows[0].lost is None


def test_margins_of_real_outcomes_may_exceed_one():
  old = np.linspace(0.0, 100.0, 500)
  new = old - np.linspace(1.0, 1.5, 500)
  assert judge(old, new, Policy(margin=2.0)).accepted
  with pytest.raises(VetError, match="'t': outcomes are 0 or 1.*below 1"):
    judge(np.ones(9), np.ones(9), Policy(margin=1.0))


def test_clusters_widen():
  rng = np.random.default_rng(2)
  old = np.ones(1000)
  new = np.repeat((rng.random(100) > 0.01).astype(float), 10)
  clusters = np.repeat(np.arange(100), 10)
  alone = judge(old, new, LOOSE).rows[0]
  grouped = judge(old, new, LOOSE, clusters=clusters).rows[0]
  assert (alone.units, grouped.units) == (1000, 100)
  assert grouped.lost == alone.lost
  assert grouped.p > alone.p and grouped.flip_bound > alone.flip_bound


def test_one_cluster_shows_nothing():
  same = np.ones(1000)
  verdict = judge(same, same, LOOSE, clusters=np.zeros(1000))
  row = verdict.rows[0]
  assert row.result == "undecided" and row.low is None
  assert "1 unit" in row.reason


def test_constant_real_outcomes_show_nothing():
  same = np.full(1000, 0.5)
  row = judge(same, same, LOOSE).rows[0]
  assert row.result == "undecided" and "vary too little" in row.reason


def test_parameters_are_evaluated_and_named():
  suite = Suite("s", "1", [Test("t", lambda p: p["w"] > 0)])
  old, new = {"w": np.ones(300)}, {"w": np.full(300, 2.0)}
  verdict = gate(old, new, suite)
  assert verdict.accepted
  assert verdict.old != verdict.new
  assert verdict.old == suite.run(old).subject
  assert gate(suite.run(old), new, suite) == verdict


def test_the_accept_error_holds_over_many_rows(monkeypatch):
  # Five tests, one of them worse by exactly its margin: accepted at most 5 %.
  cached = functools.lru_cache(maxsize=None)(paired.exact_p)
  monkeypatch.setattr(paired, "exact_p", cached)
  rng = np.random.default_rng(3)
  n, margin = 400, 0.05
  suite = Suite("s", "1", [Test(x, lambda p: p) for x in "abcde"])
  policy = Policy(margin=margin, flips=None)
  wrong = 0
  for _ in range(100):
    old, new = {}, {}
    for i, name in enumerate("abcde"):
      lose, gain = (0.07, 0.02) if i == 0 else (0.02, 0.02)
      kind = rng.choice(3, size=n, p=[lose, gain, 1 - lose - gain])
      old[name], new[name] = kind != 1, kind != 0
    wrong += gate(
      suite.outcomes(old), suite.outcomes(new), suite, policy
    ).accepted
  assert wrong / 100 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)


@pytest.mark.parametrize(
  "arguments, words",
  [
    ({"claims": ["T"]}, "claimed on 'T', but the suite has 't'"),
    ({"claims": {"t": -0.1}}, "least gain must be 0 or more"),
    (
      {"policy": Policy(margins={"tt": 0.1})},
      "given for 'tt', but the suite has 't'",
    ),
    ({"policy": Policy(flip_caps={"t/x": 0.1})}, "given for 't/x'"),
  ],
)
def test_refuses_unknown_rows(arguments, words):
  arguments = {"policy": LOOSE, **arguments}
  with pytest.raises(VetError, match=words):
    judge(np.ones(5), np.ones(5), **arguments)


def test_refuses_outcomes_that_do_not_belong():
  suite = Suite("s", "1", [Test("t", lambda p: p)])
  other = Suite("s", "2", [Test("t", lambda p: p)])
  ones = suite.outcomes({"t": np.ones(5)})
  with pytest.raises(VetError, match="'t': 5 outcomes of the old.*and 4 of"):
    gate(ones, suite.outcomes({"t": np.ones(4)}), suite)
  with pytest.raises(VetError, match="new model are of suite s@2.*s@1"):
    gate(ones, other.outcomes({"t": np.ones(5)}), suite)
  with pytest.raises(VetError, match="not finite"):
    gate(ones, {"t": np.ones(5)}["t"] * np.nan, suite)


def test_refuses_to_decide_on_nothing():
  suite = Suite("s", "1", [Test("t", lambda p: p, protected=False)])
  ones = suite.outcomes({"t": np.ones(500)})
  with pytest.raises(VetError, match="nothing to decide"):
    gate(ones, ones, suite)
  with pytest.raises(VetError, match="no test 'missing'"):
    suite["missing"]
