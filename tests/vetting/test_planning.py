"""Sample sizes: the published table, and agreement with the gate itself."""

import numpy as np
import pytest

from patchjax.trees.errors import VetError
from patchjax.vetting import Policy, Suite, Test, flips, gate, planning
from patchjax.vetting.planning import plan, smallest

# Examples at alpha .05, power .8, no true difference; columns: discordance.
TABLE = {
  0.005: (2473, 4946, 12365, 24730, 49460),
  0.01: (618, 1237, 3091, 6183, 12365),
  0.02: (155, 309, 773, 1546, 3091),
  0.05: (25, 49, 124, 247, 495),
}
UNPAIRED = {0.005: 79137, 0.01: 19784, 0.02: 4946, 0.05: 791}


@pytest.mark.parametrize("margin", TABLE)
def test_plan_is_the_table(margin):
  found = tuple(plan(margin, rho) for rho in (0.01, 0.02, 0.05, 0.1, 0.2))
  assert found == TABLE[margin]
  # Two independent samples of accuracy .8: the variances add.
  assert plan(margin, 2 * 0.8 * 0.2) == UNPAIRED[margin]


def test_plan_closed_form():
  z = 1.6448536 + 0.8416212
  assert plan(0.01, 0.05, difference=0.01) == round(
    z * z * (0.05 - 0.0001) / 0.02**2
  )
  # Power of each of K tests: 1 - (1 - power) / K.
  assert plan(0.01, 0.05, tests=4) == plan(0.01, 0.05, power=0.95)
  assert plan(0.0, 0.1, difference=0.05) == round(
    z * z * (0.1 - 0.0025) / 0.0025
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    (
      {"margin": 0.01, "discordance": 0.05, "difference": -0.01},
      "widen the margin",
    ),
    ({"margin": 0.01, "discordance": 0.0, "difference": 0.1}, "impossible"),
    ({"margin": 0.01, "discordance": 0.05, "alpha": 0.7}, "alpha"),
    ({"margin": 0.01, "discordance": 0.05, "power": 1.0}, "power"),
    ({"margin": 0.01, "discordance": 0.05, "tests": 0}, "tests"),
  ],
)
def test_plan_refuses(arguments, words):
  with pytest.raises(VetError, match=words):
    plan(**arguments)


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_smallest_is_where_the_gate_begins_to_pass(margin, alpha):
  n = smallest(margin, alpha=alpha)
  suite = Suite("s", "1", [Test("t", lambda p: p)])
  policy = Policy(margin=margin, alpha=alpha, flips=None)

  def outcome(n):
    same = suite.outcomes({"t": np.ones(n)})
    return gate(same, same, suite, policy).outcome

  assert outcome(n) == "accepted"
  assert outcome(n - 1) == "undecided"


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.008])
def test_smallest_for_cap_is_tight(rate):
  n = planning.smallest_for_cap(rate, 0.01, alpha=0.05)

  def bound(n):
    return flips.clopper_pearson(rate * n, n, alpha=0.05)[1]

  assert bound(n) <= 0.01 < bound(n - 1)
