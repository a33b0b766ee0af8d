"""Policies: which margin and cap holds where, and what is refused."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from patchjax.trees.errors import FormatError, VetError
from patchjax.vetting import Policy

RATES = st.floats(1e-6, 1.0)
ROWS = st.text(min_size=1, max_size=8)
POLICIES = st.builds(
  Policy,
  margin=st.floats(1e-6, 50.0),
  slice_margin=st.none() | st.floats(1e-6, 50.0),
  margins=st.dictionaries(ROWS, RATES, max_size=3),
  flips=st.none() | RATES,
  slice_flips=st.none() | RATES,
  flip_caps=st.dictionaries(ROWS, st.none() | RATES, max_size=3),
  alpha=st.floats(0.001, 0.499),
  power=st.floats(0.01, 0.99),
  changed=st.floats(0.0, 1.0),
  uses=st.integers(1, 1000),
)


@hypothesis.given(POLICIES)
def test_json_round_trip(policy):
  assert Policy.from_json(policy.to_json()) == policy
  assert Policy.from_json(json.dumps(policy.to_json())) == policy


def test_single_rows_come_first_then_slices_then_the_test():
  policy = Policy(
    margin=0.01,
    margins={"a": 0.02, "a/x": 0.05},
    flips=0.03,
    flip_caps={"a": 0.04, "a/x": None},
  )
  assert policy.margin_of("b") == policy.margin_of("b", "x") == 0.01
  assert policy.margin_of("a") == policy.margin_of("a", "y") == 0.02
  assert policy.margin_of("a", "x") == 0.05
  assert policy.cap_of("b", "x") == 0.03
  assert policy.cap_of("a", "y") == 0.04
  assert policy.cap_of("a", "x") is None
  wide = Policy(slice_margin=0.06, slice_flips=0.1, margins={"a": 0.02})
  assert wide.margin_of("a", "y") == 0.06 and wide.margin_of("a") == 0.02
  assert wide.cap_of("a", "y") == 0.1 and wide.cap_of("a") == 0.02


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"margin": 0.0}, "margin must be a positive number, got 0.0"),
    ({"margin": float("nan")}, "margin"),
    ({"slice_margin": -1.0}, "slice_margin"),
    ({"margins": {"t": 0.0}}, r"margins\['t'\]"),
    ({"flips": 0.0}, "flips must be a rate"),
    ({"slice_flips": 1.5}, "slice_flips"),
    ({"flip_caps": {"t": 2.0}}, r"flip_caps\['t'\]"),
    ({"alpha": 0.5}, "alpha"),
    ({"alpha": 0.0001}, "alpha"),
    ({"power": 1.0}, "power"),
    ({"changed": 1.1}, "changed"),
    ({"uses": 0}, "uses"),
  ],
)
def test_refuses(fields, words):
  with pytest.raises(VetError, match=words):
    Policy(**fields)


def test_keyword_only_and_frozen():
  with pytest.raises(TypeError):
    Policy(0.01)
  with pytest.raises(AttributeError):
    Policy().margin = 0.5


@pytest.mark.parametrize(
  "value",
  [
    "{",
    "[]",
    "{}",
    {"schema": "patchjax/policy/9"},
    {**Policy().to_json(), "unknown": 1},
    {**Policy().to_json(), "margin": "wide"},
    {**Policy().to_json(), "margins": ["t"]},
    {**Policy().to_json(), "margins": "t"},
  ],
)
def test_from_json_refuses(value):
  with pytest.raises(FormatError, match="not a policy"):
    Policy.from_json(value)


def test_a_written_policy_may_leave_fields_out():
  text = '{"schema": "patchjax/policy/1", "margin": 0.02}'
  assert Policy.from_json(text) == Policy(margin=0.02)
  with pytest.raises(VetError, match="margin must be a positive number"):
    Policy.from_json(text.replace("0.02", "-1"))
