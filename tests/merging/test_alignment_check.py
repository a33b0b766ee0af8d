"""The check sees what is wrong, and says so where it sees nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging.alignment import given_permutations
from patchjax.trees.errors import (
  MismatchError,
  NonFiniteError,
  StructureError,
)
from tests.merging.networks import drawn

SHAPES = {"w1": (4, 6), "w2": (6, 5)}
RIGHT = {"w1": (None, "u"), "w2": ("u", None)}
X = drawn({"x": (3, 4)}, 1)["x"]


def two(p, x):
  return jnp.tanh(x @ p["w1"]) @ p["w2"]


def masked(value):
  def net(p, x):
    return jnp.where(jnp.arange(5) < 4, two(p, x), jnp.float32(value))

  return net


@pytest.mark.parametrize("value", [-1e9, -np.inf])
def test_masks_hide_nothing(value):
  params, net = drawn(SHAPES), masked(value)
  assert given_permutations(RIGHT, net, params, X).error < 1e-4
  with pytest.raises(MismatchError, match="u, in w1"):
    given_permutations({"w1": (None, "u")}, net, params, X)


def test_align_sees_behind_a_mask():
  params = drawn(SHAPES)
  spec = given_permutations(RIGHT, two, params, X)
  turned = pj.merging.permute(spec, {"u": np.arange(6)[::-1]}, params)

  def ordered(p, x):
    return masked(-1e9)({**p, "w2": p["w2"] * jnp.arange(6.0)[:, None]}, x)

  with pytest.raises(MismatchError, match="compute something else"):
    pj.merging.align(ordered, params, turned, X, spec=spec)
  with pytest.raises(StructureError, match="do not depend on the parameters"):
    pj.merging.align(lambda p, x: 0 * x, params, turned, X, spec=spec)


def test_nan_is_no_agreement():
  params = drawn(SHAPES)
  spec = given_permutations(RIGHT, two, params, X)

  def net(p, x):  # NaN where the first unit is smaller than the last
    return jnp.sqrt(p["w1"][0, 0] - p["w1"][0, 5]) + two(p, x)

  params["w1"][0] = np.arange(6)
  turned = pj.merging.permute(spec, {"u": np.arange(6)[::-1]}, params)
  with pytest.raises(MismatchError, match="compute something else"):
    pj.merging.align(net, params, turned, X, spec=spec)
  with pytest.raises(NonFiniteError, match="gives NaN"):
    given_permutations(RIGHT, net, params, X)
