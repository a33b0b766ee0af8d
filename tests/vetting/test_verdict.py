"""Verdicts: storing, identity, and the printed table."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from patchjax.trees.errors import FormatError
from patchjax.vetting import Policy, Row, Suite, Test, Verdict, gate

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**9)
TEXT = st.text(max_size=12)
ROWS = st.builds(
  Row,
  test=TEXT,
  slice=TEXT,
  role=st.sampled_from(["protected", "claim", "watched"]),
  result=st.sampled_from(["pass", "fail", "undecided", "watched"]),
  n=COUNT,
  units=COUNT,
  both=st.none() | COUNT,
  lost=st.none() | COUNT,
  gained=st.none() | COUNT,
  old=NUMBER,
  new=NUMBER,
  difference=NUMBER,
  low=st.none() | NUMBER,
  high=st.none() | NUMBER,
  margin=NUMBER,
  p=NUMBER,
  flip_bound=st.none() | NUMBER,
  flip_cap=st.none() | NUMBER,
  mcnemar=st.none() | NUMBER,
  more=st.none() | COUNT,
  reason=TEXT,
)
VERDICTS = st.builds(
  Verdict,
  outcome=st.sampled_from(["accepted", "refused", "undecided"]),
  suite=TEXT,
  digest=TEXT,
  old=TEXT,
  new=TEXT,
  policy=st.builds(Policy, margin=st.floats(1e-6, 1.0)),
  rows=st.lists(ROWS, max_size=4).map(tuple),
  used=st.none() | COUNT,
)


@hypothesis.given(VERDICTS)
def test_json_round_trip(verdict):
  text = json.dumps(verdict.to_json(), allow_nan=False)
  found = Verdict.from_json(text)
  assert found == verdict == Verdict.from_json(verdict.to_json())
  assert found.id == verdict.id


@hypothesis.given(VERDICTS)
def test_id_is_of_the_evidence_and_not_of_the_count(verdict):
  assert dataclasses.replace(verdict, used=7).id == verdict.id
  assert dataclasses.replace(verdict, digest="other words").id != verdict.id


@pytest.fixture
def verdict():
  rng = np.random.default_rng(0)
  suite = Suite(
    "five-tasks",
    "1.0.0",
    [
      Test(
        "a-long-test-name",
        lambda p: p,
        slices={"positives": np.arange(12000) < 7000},
      ),
      Test("loss", lambda p: p, protected=False),
      Test("nyt", lambda p: p),
    ],
  )
  old = {
    "a-long-test-name": rng.random(12000) < 0.7,
    "loss": rng.normal(size=500) * 100,
    "nyt": np.arange(900) < 600,
  }
  new = dict(old, loss=rng.normal(size=500) * 100, nyt=np.arange(900) < 500)
  return gate(
    suite.outcomes(old),
    suite.outcomes(new),
    suite,
    Policy(margin=0.01),
    claims=["nyt"],
    used=40,
  )


def test_table_fits_and_says_what_matters(verdict):
  text = str(verdict)
  assert max(map(len, text.splitlines())) <= 100
  first = text.splitlines()[0]
  assert first.startswith("refused: suite five-tasks@1.0.0")
  assert "2 pass, 2 fail, 0 undecided" in first
  (row,) = [x for x in text.splitlines() if x.startswith(" nyt")]
  assert "900" in row and "500" in row and "100 / 0" in row and "fail" in row
  assert "/positives" in text and "claim nyt" in text and "watched" in text
  assert "- nyt: worse by more than the margin of 0.01: -0.111" in text
  assert "use 41 of 32 of this suite here; it is worn out" in text


def test_stored_verdict_prints_the_same(verdict):
  assert str(Verdict.from_json(json.dumps(verdict.to_json()))) == str(verdict)


def test_failed_reasons_come_before_undecided_ones():
  suite = Suite("s", "1", [Test("a", lambda p: p), Test("b", lambda p: p)])
  ones = np.ones(100)
  verdict = gate(
    suite.outcomes({"a": ones, "b": ones}),
    suite.outcomes({"a": ones, "b": 0 * ones}),
    suite,
  )
  assert [r.split(":")[0] for r in verdict.reasons] == ["b", "a"]


@pytest.mark.parametrize(
  "change",
  [
    {"schema": "patchjax/verdict/9"},
    {"rows": [{"test": "t"}]},
    {"rows": 3},
    {"surprise": 1},
    {"policy": {}},
  ],
)
def test_from_json_refuses(verdict, change):
  with pytest.raises(FormatError, match="not a (verdict|policy)"):
    Verdict.from_json({**verdict.to_json(), **change})
  value = verdict.to_json()
  del value["policy"]
  with pytest.raises(FormatError, match="not a verdict"):
    Verdict.from_json(value)
