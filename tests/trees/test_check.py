"""Compatibility: every bad leaf in one message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax import trees
from patchjax.trees import check
from patchjax.trees.errors import MismatchError
from tests import containers


@pytest.mark.parametrize("container", containers.SHARED)
def test_containers_of_one_model_fit_each_other(container):
  got = trees.check_compatible(
    containers.pure_dict(), containers.SHARED[container]()
  )
  assert sorted(got) == sorted(containers.NAMES)


def test_all_bad_leaves_are_listed_with_counts_and_fixes():
  x = jnp.zeros((2, 3))
  expected = {"dense": {"kernel": x, "bias": x}, "out": x, "scale": x, "ok": x}
  found = {
    "dense": {"kernle": x, "bias": x[0]},
    "out": x.astype(jnp.bfloat16),
    "scale": jnp.zeros(3, jnp.int32),
    "ok": x,
    "head": x,
  }
  with pytest.raises(MismatchError) as caught:
    trees.check_compatible(expected, found, what="the patch")
  assert str(caught.value) == (
    "the patch does not fit: of 5 leaves expected and 6 found, 1 missing, "
    "2 extra, 2 of another shape, 2 of another dtype\n"
    " - dense/bias: float32[2,3]\n"
    " + dense/bias: float32[3]  another shape\n"
    " - dense/kernel: float32[2,3]\n"
    " + dense/kernle: float32[2,3]  did you mean 'dense/kernel'?\n"
    " + head: float32[2,3]\n"
    " - out: float32[2,3]\n"
    " + out: bfloat16[2,3]  another dtype\n"
    " - scale: float32[2,3]\n"
    " + scale: int32[3]  another dtype and shape\n"
    "to mend it: rename leaves with patchjax.trees.rename; or leave leaves "
    'as they are with missing="keep"; or drop leaves with extra="ignore"; '
    "or convert or reshape the leaves before the call"
  )


def test_partial_fits_are_asked_for():
  x = np.zeros(3, np.float32)
  both = {"a": x, "b": x}
  with pytest.raises(MismatchError, match="1 missing"):
    trees.check_compatible(both, {"a": x})
  assert trees.check_compatible(both, {"a": x}, missing="keep") == ("a",)
  with pytest.raises(MismatchError, match="1 extra"):
    trees.check_compatible({"a": x}, both, missing="keep")
  assert trees.check_compatible({"a": x}, both, extra="ignore") == ("a",)


def test_dtype_and_shape_can_be_left_out():
  expected = {"a": np.zeros(3, np.float32)}
  trees.check_compatible(expected, {"a": np.zeros(3, np.int8)}, dtype=False)
  trees.check_compatible(expected, {"a": np.zeros(4, np.float32)}, shape=False)


def test_options_are_checked():
  with pytest.raises(ValueError, match="missing='ignore'"):
    trees.check_compatible({}, {}, missing="ignore")


def test_abstract_leaves_keys_and_entries_are_compared():
  tree = {"w": jnp.ones((2, 3), jnp.bfloat16), "key": jax.random.key(0)}
  abstract = jax.eval_shape(lambda: tree)
  assert trees.check_compatible(abstract, tree) == ("key", "w")
  entry = trees.Entry("", "key<fry>", ())
  assert check.check_named({"key": entry}, tree, extra="ignore") == ("key",)


def test_leaves_that_are_no_arrays_are_left_out():
  x = np.zeros(3, np.float32)
  assert trees.check_compatible({"w": x, "f": len}, {"w": x}) == ("w",)
