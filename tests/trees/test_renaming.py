"""Renaming rules: other people's names, without losing a leaf."""

import pytest

from patchjax import trees
from patchjax.trees import renaming
from patchjax.trees.errors import SelectionError, StructureError


def test_the_first_rule_that_matches_wins_and_others_stay():
  named = {"params/layers_0/w": 1, "params/out": 2, "step": 3}
  rules = {
    r"params/layers_(\d+)/(.*)": r"layers/\1/\2",
    r"params/(?P<rest>.*)": r"\g<rest>",
  }
  assert trees.rename(named, rules) == {"layers/0/w": 1, "out": 2, "step": 3}


def test_names_may_be_exchanged():
  assert trees.rename({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {
    "b": 1,
    "a": 2,
  }


def test_a_dry_run_gives_the_map():
  assert renaming.rename_map(["x/w"], {"x/(.*)": r"y/\1"}) == {"x/w": "y/w"}


@pytest.mark.parametrize(
  "rules, message",
  [
    ({"a/(.*)": "x"}, "several leaves one name:\n  a/w -> x\n  a/v -> x"),
    ({"a/w": "b"}, "several leaves one name"),
    ({"a/w": "b/w"}, "is a leaf and also holds others"),
    ({"a/w": "x~y"}, "not a leaf name"),
  ],
)
def test_collisions_are_refused(rules, message):
  with pytest.raises(StructureError, match=message):
    trees.rename({"a/w": 1, "a/v": 2, "b": 3}, rules)


@pytest.mark.parametrize(
  "rules, message",
  [
    ({"layer/w": "x"}, "did you mean 'layers/w'"),
    ({"layers/.*": "x", "layers/w": "y"}, "move it up"),
    ({"(": "x"}, "is not a regex"),
    ({"layers/w": r"\2"}, "does not fit the regex"),
  ],
)
def test_rules_that_do_nothing_are_reported(rules, message):
  with pytest.raises(SelectionError, match=message):
    trees.rename({"layers/w": 1}, rules)
