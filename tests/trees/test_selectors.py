"""Selectors pick what they say, or say what is wrong."""

import jax.numpy as jnp
import pytest

from patchjax import trees
from patchjax.trees import selectors
from patchjax.trees.errors import SelectionError
from tests import containers

KERNELS = ("blocks/0/kernel", "blocks/1/kernel")
FIRST = ("blocks/0/bias", "blocks/0/kernel")


@pytest.mark.parametrize("container", containers.SHARED)
@pytest.mark.parametrize(
  "only, want",
  [
    (r".*/kernel", KERNELS),
    ([r"blocks/0/bias", r".*/0/kernel"], FIRST),
    (lambda name, leaf: leaf.ndim == 2, KERNELS),
    ({"blocks": {"0": True, "1": False}}, FIRST),
    ({"blocks": [True, False]}, FIRST),
    (True, containers.NAMES),
    (None, containers.NAMES),
  ],
  ids=["regex", "list", "callable", "dict", "other", "bool", "none"],
)
def test_all_kinds_of_selectors_in_all_containers(container, only, want):
  tree = containers.SHARED[container]()
  got = trees.select(tree, only, expect=len(want))
  assert sorted(got) == sorted(want)
  assert list(got) == [n for n in trees.named_leaves(tree) if n in want]


def test_a_regex_must_match_the_whole_name():
  with pytest.raises(SelectionError, match="inside 2: try '.*kernel.*'"):
    trees.select(containers.pure_dict(), "kernel")


def test_every_regex_of_a_list_must_match():
  with pytest.raises(SelectionError, match="'.*/kernle' matches no whole name"):
    trees.select(containers.pure_dict(), [r".*/bias", r".*/kernle"])


def test_a_misspelt_name_is_answered_with_the_right_one():
  with pytest.raises(SelectionError, match="did you mean 'blocks/0/kernel'"):
    trees.select(containers.pure_dict(), "blocks/0/kernle")


def test_expect_counts_and_names_both_sides():
  with pytest.raises(SelectionError) as caught:
    trees.select(containers.pure_dict(), r".*/0/.*", expect=3)
  text = str(caught.value)
  assert "picks 2 of 4 leaves (12 of 24 parameters); expected 3" in text
  assert "picked: 'blocks/0/bias', 'blocks/0/kernel'" in text
  assert "left: 'blocks/1/bias', 'blocks/1/kernel'" in text


def test_nothing_picked_is_an_error_unless_expected():
  nothing = {"blocks": False}
  with pytest.raises(SelectionError, match="0 of 4 leaves"):
    trees.select(containers.pure_dict(), nothing)
  with pytest.raises(SelectionError, match="expected at least 1"):
    trees.select(containers.pure_dict(), lambda name, leaf: False)
  assert trees.select(containers.pure_dict(), nothing, expect=0) == ()


@pytest.mark.parametrize(
  "prefix, message",
  [
    ({"blocks": {"0": True}}, "does not reach: 'blocks/1/bias'"),
    ({"blocks": True, "head": False}, "reach no leaf: 'head'"),
    ({"blocks": 1.5}, "is not a selector"),
    ({}, "is not a selector"),
    (3, "is not a selector"),
    ("(", "is not a regex"),
    (["a", 3], "is not a regex"),
  ],
)
def test_what_is_no_selector_for_this_tree_is_refused(prefix, message):
  with pytest.raises(SelectionError, match=message):
    trees.select(containers.pure_dict(), prefix)


def test_named_leaves_are_selected_by_the_names_they_have():
  named = trees.named_leaves({"mlp/~/linear": {"w": jnp.ones(2)}})
  assert selectors.select_named(named, r"mlp~1.*") == tuple(named)
  assert selectors.select_named(named, {"mlp/~/linear": True}) == tuple(named)


def test_an_empty_tree_has_no_leaves_to_select():
  assert trees.select({}) == ()
  with pytest.raises(SelectionError):
    trees.select({}, "a")
