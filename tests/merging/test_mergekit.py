"""The methods beside mergekit's own answers, as recorded in tests/golden."""

import inspect

import ml_dtypes
import numpy as np
import pytest

import patchjax as pj
from tests.golden import recorded
from tests.merging.battery import CASES
from tests.merging.calls import RANDOM, masks, references

FLOAT32 = [case for case in recorded.cases() if case.dtype == "float32"]
BFLOAT16 = [case for case in recorded.cases() if case.dtype == "bfloat16"]


def of_mergekit(case):
  """The method that a call of mergekit stands for."""
  make = getattr(pj.merging, case.method)
  options = dict(case.settings)
  known = inspect.signature(make).parameters
  if "flavour" in known:
    options["flavour"] = "mergekit"
  if "task_vectors" in known:
    options["task_vectors"] = case.base is not None
  if "from_base" in known:
    options["from_base"] = case.base is not None
  if case.method in RANDOM:
    options |= CASES[case.method].only_method
  return make(**options)


def cut(case, leaves):
  """Base (or None) and models with these leaves only."""

  def some(tree):
    return {leaf: tree[leaf] for leaf in leaves}

  return case.base and some(case.base), list(map(some, case.models))


def leaves_of(case, first):
  """Leaves to be merged: each of another shape is one more compilation.

  The reference is held to all of them.
  """
  kinds = [
    x for x in ("layers.1.conv", "embed", *case.merged) if x in case.merged
  ]
  light = not CASES[case.method].heavy
  vector = ["norm.scale"] if first and light else []
  return [*kinds[:1], *(x for x in vector if x in case.merged)]


@pytest.mark.parametrize("name", sorted({case.method for case in FLOAT32}))
def test_float32(name):
  calls = [case for case in FLOAT32 if case.method == name]
  for case in calls:
    few = leaves_of(case, case is calls[0])
    base, others = cut(case, few)
    found = pj.merge(base, others, of_mergekit(case))
    expected = case.merged
    if name in RANDOM:
      # Recorded draws are held against the reference elsewhere.
      settings = {**case.settings, "flavour": "mergekit"}
      own = masks(name, base, others, settings)
      expected = references()[name](
        base, others, flavour="mergekit", **case.settings, **own
      )
    for leaf in few:
      wanted = expected[leaf]
      np.testing.assert_allclose(
        found[leaf],
        wanted,
        rtol=0,
        atol=1e-6 * np.max(np.abs(wanted)),
        err_msg=f"{case.name} {case.settings} {leaf}",
      )


@pytest.mark.parametrize("case", BFLOAT16, ids=lambda case: case.method)
def test_bfloat16(case):
  """Rounded once, where mergekit rounds every step of most methods."""
  few = ["layers.0.kernel", "layers.1.conv"]
  base, others = cut(case, few)
  exact = references()[case.method](
    base, others, flavour="mergekit", **case.settings
  )

  def short(tree):
    return {leaf: x.astype(ml_dtypes.bfloat16) for leaf, x in tree.items()}

  found = pj.merge(
    base and short(base), list(map(short, others)), of_mergekit(case)
  )
  wrong = 0
  for leaf in few:
    assert found[leaf].dtype == ml_dtypes.bfloat16
    mine, theirs = np.float32(found[leaf]), case.merged[leaf]
    wrong += np.sum(mine != recorded.bfloat16(exact[leaf]))
    if case.method in ("linear", "slerp"):  # of which theirs is one, too
      np.testing.assert_array_equal(mine, theirs, err_msg=leaf)
      continue
    # Theirs are some units of the last place away in a tenth to a third of
    # the entries: at most one unit of the largest number.
    unit = 2.0**-7 * np.max(np.abs(theirs))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=unit, err_msg=leaf)
    error = np.abs(mine - exact[leaf])
    assert np.all(error <= np.abs(theirs - exact[leaf])), leaf
  assert wrong <= sum(found[leaf].size for leaf in few) / 1000
