"""The check sees what is wrong, and says so where it sees nothing."""

import jax
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


@pytest.mark.parametrize("seed", range(4))
def test_two_units_are_seen_to_change_places(seed):
  params = drawn({"w1": (4, 2), "w2": (2, 5)})
  with pytest.raises(MismatchError, match="u, in w1"):
    given_permutations({"w1": (None, "u")}, two, params, X, seed=seed)


def attended(p, x):
  q, k, v = (x @ p[name] for name in ("q", "k", "v"))
  return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


def test_inputs_that_show_nothing_are_refused():
  params = drawn({"q": (4, 6), "k": (4, 6), "v": (4, 5)})
  x = drawn({"x": (2, 3, 4)}, 1)["x"]
  right = {"q": (None, "u"), "k": (None, "u")}
  for axes in (right, {"q": (None, "u")}):
    with pytest.raises(StructureError, match="- u, in q") as error:
      given_permutations(axes, attended, params, x[:, :1])
    assert "several steps" in str(error.value)
  # What is inferred is proven by the rules: it is told.
  spec = pj.merging.infer_permutations(attended, params, x[:, :1])
  assert spec.unseen == {"k:1": ("k", "q")}
  assert given_permutations(right, attended, params, x).unseen == {}


def test_dead_units_are_refused():
  def net(p, x):
    return jax.nn.relu(x @ p["w1"] - 100) @ p["w2"] + x @ p["w3"]

  params = drawn(SHAPES | {"w3": (4, 5)})
  with pytest.raises(StructureError, match="- u, in w1, w2"):
    given_permutations(RIGHT, net, params, X)


def test_leaves_that_show_nothing_are_told():
  params = drawn({"q": (4, 6), "k": (4, 6), "kb": (6,), "v": (4, 5)})
  x = drawn({"x": (2, 3, 4)}, 1)["x"]

  def net(p, x):  # a softmax forgets what all keys have in common
    q, k = x @ p["q"], x @ p["k"] + jnp.broadcast_to(p["kb"], (2, 3, 6))
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ (x @ p["v"])

  spec = pj.merging.infer_permutations(net, params, x)
  assert spec.unseen == {"k:1": ("kb",)}
  assert "the check sees nothing of kb" in repr(spec)


def test_a_dimension_of_one_leaf_is_seen():
  def net(p, x):
    return jnp.tanh(x @ p["w"]).sum(-1)

  params = drawn({"w": (4, 6)})
  assert pj.merging.infer_permutations(net, params, X).moving == ("w:1",)
