"""What a merge takes as it is, what it leaves to the method, and replays."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.patches.transform import Step, Transform, register_step
from patchjax.trees import errors

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


def fork(repo, start, **tuned):
  """Commits a base to `main`, and each of the others to a branch from it."""
  repo.commit(start, message="start")
  for name, value in tuned.items():
    repo.branch(name)
    repo.commit(value, message=name, branch=name)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def bits(x):
  return pj.trees.leaf_digest(x)


ODD = {
  "nan": np.array([0x7FC12345, 0xFFFFFFFF], np.uint32).view(np.float32),
  "inf": np.float32([-np.inf, -0.0]),
  "bf16": np.array([1.5, 2.5], ml_dtypes.bfloat16),
  "int4": np.array([3, -4], ml_dtypes.int4),
  "bool": np.array([True, False]),
  "complex": np.complex64([1 + 2j, np.nan]),
  "wide": np.float64([1e-300, 2]),
  "tiny": np.float32([1e-42, 1e-10]),
  "key": jax.random.key(7),
}


@pytest.mark.parametrize(
  "method",
  [
    pj.merging.task_arithmetic(scale=0.3),
    pj.merging.ties(density=0.01),
    pj.merging.linear(weights=[0.9, 0.1]),
  ],
  ids=["task_arithmetic", "ties", "linear"],
)
def test_one_sided_changes_come_out_to_the_bit(repo, method):
  """Of every dtype, whatever the method, while another leaf is merged."""
  old = {
    name: jax.random.key(1) if name == "key" else np.zeros_like(x)
    for name, x in ODD.items()
  }
  start = {"both": normal(8), "here": old, "there": old, "rest": normal(3)}
  left = {**start, "both": start["both"] + 1, "here": ODD}
  right = {**start, "both": start["both"] - normal(8), "there": ODD}
  fork(repo, start, left=left, right=right)
  repo.merge("main", ["left", "right"], method=method)
  both = [{"both": value["both"]} for value in (start, left, right)]
  merged = pj.merge(both[0], both[1:], method)
  expected = {"both": merged["both"], "here": ODD, "there": ODD}
  expected["rest"] = start["rest"]
  assert repo.show().tree == pj.trees.tree_id(expected)
  assert repo.replay().same and repo.fsck().ok


def test_the_order_of_sides_does_not_matter_to_one_sided_changes(repo):
  start = {"a": normal(3), "b": normal(3), "c": normal(3), "d": normal(3)}
  sides = {
    name: {**start, name: start[name] + normal(3)} for name in ("a", "b", "c")
  }
  fork(repo, start, **sides)
  method = pj.merging.linear()
  repo.merge("main", ["a", "b", "c"], method=method)
  expected = {**start, **{name: sides[name][name] for name in sides}}
  assert repo.show().tree == pj.trees.tree_id(expected)
  assert len(repo.show().parents) == 4
  repo.branch("other", at="main~1")
  repo.merge("other", ["c", "a", "b"], method=method)
  assert repo.show("other").tree == repo.show("main").tree


def test_equal_changes_are_one_change(repo):
  start = {"w": normal(4), "n": np.int32(1)}
  same = {"w": start["w"] + 1, "n": np.int32(2)}
  fork(repo, start, left=same, right=same)
  repo.merge("main", ["left", "right"], method=pj.merging.task_arithmetic())
  assert repo.show().tree == pj.trees.tree_id(same)  # and not doubled


def test_leaves_that_one_side_adds_removes_or_reshapes(repo):
  start = {"w": normal(4), "old": normal(2), "x": normal(2)}
  left = {**start, "w": start["w"] + 1, "lora": {"a": normal(2, 4)}}
  del left["old"]
  right = {**start, "w": start["w"] + 2, "x": normal(5).astype(np.float16)}
  fork(repo, start, left=left, right=right)
  repo.merge("main", ["left", "right"], method=pj.merging.linear())
  found = repo.checkout()
  assert sorted(repo.tree()) == ["lora/a", "w", "x"]
  assert bits(found["lora"]["a"]) == bits(left["lora"]["a"])
  assert bits(found["x"]) == bits(right["x"])
  np.testing.assert_allclose(found["w"], start["w"] + 1.5, rtol=1e-6)
  assert repo.replay().same


def test_the_method_alone_is_what_patchjax_merge_gives(repo):
  start = {"a": normal(20), "b": normal(20), "n": np.int32(1)}
  left = {**start, "a": start["a"] + normal(20), "n": np.int32(2)}
  right = {**start, "b": start["b"] + normal(20)}
  fork(repo, start, left=left, right=right)
  method = pj.merging.ties(density=0.3, scale=0.5)
  repo.merge("main", ["left", "right"], method=method, one_sided="method")
  floats = [{k: v[k] for k in "ab"} for v in (start, left, right)]
  expected = pj.merge(floats[0], floats[1:], method)
  assert repo.show().tree == pj.trees.tree_id({**expected, "n": np.int32(2)})
  assert repo.show().recipe["one_sided"] == "method"
  assert repo.replay().same


def test_a_merge_without_a_fast_forward_takes_the_one_side(repo):
  start = {"w": normal(4)}
  fork(repo, start, left={"w": start["w"] + 1})
  method = pj.merging.task_arithmetic(scale=0.5)
  repo.merge("main", "left", method=method, fast_forward=False)
  assert repo.show().tree == repo.show("left").tree
  assert len(repo.show().parents) == 2 and repo.replay().same


def _noisy(leaf, deltas, base, state, shared):
  del leaf, base, shared
  noise = jax.random.normal(state["key"], deltas[0].shape)
  weight = state["statistics"].mean()
  return sum(deltas) + noise * weight


NOISY = register_step(Step("noisy_sum", _noisy, reducing=True))


def test_keys_and_statistics_are_in_the_recipe(repo):
  start = {"w": normal(4)}
  fork(repo, start, a={"w": start["w"] + 1}, b={"w": start["w"] + 2})
  key = jax.random.key(3)

  def method(size, key=key):
    statistics = jnp.arange(size, dtype=jnp.float32)
    return Transform.of(NOISY, {"key": key, "statistics": statistics})

  repo.merge("main", ["a", "b"], method=method(3))
  numbers = repo.show().recipe["numbers"][0]
  assert numbers["key"]["words"] == [0, 3]
  assert repo.replay().same
  # Large statistics are known by their digest.
  repo.branch("more", at="main~1")
  repo.merge("more", ["a", "b"], method=method(5000))
  numbers = repo.show("more").recipe["numbers"][0]
  assert numbers["statistics"]["digest"] == bits(np.arange(5000, dtype="f"))
  with pytest.raises(errors.RepositoryError, match="method="):
    repo.replay("more")
  assert repo.replay("more", method=method(5000)).same
  for other in (method(4999), method(5000, jax.random.key(4))):
    with pytest.raises(errors.FormatError, match="another numbers"):
      repo.replay("more", method=other)


def test_replays_say_what_differs(repo):
  start = {"w": normal(4), "v": normal(4)}
  both = {
    name: {k: x + i for k, x in start.items()} for i, name in enumerate("ab", 1)
  }
  fork(repo, start, **both)
  with pytest.raises(errors.RepositoryError, match="no recipe"):
    repo.replay()
  repo.merge("main", ["a", "b"], method=pj.merging.linear(weights=[1, 3]))
  assert repo.replay().changed == {}
  recipe = {
    **repo.show().recipe,
    "versions": {"jax": "0.1"},
    "numbers": repo.show().recipe["numbers"],
  }
  repo.commit(
    {**repo.checkout(), "w": normal(4)},
    message="not what its recipe says",
    recipe=recipe,
  )
  found = repo.replay()
  assert not found.same and found.differing == ("w",)
  assert found.changed["jax"] == ("0.1", jax.__version__)
  assert "w" in str(found) and found.to_json()["same"] is False
