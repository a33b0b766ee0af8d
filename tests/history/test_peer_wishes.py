"""What users of git-theta, the nearest peer, ask for in its issues."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.history import Repo
from tests.history.peer_cases import (
  LARGE,
  bits,
  chained,
  forked,
  noise,
  packs_of,
  scattered,
  size,
)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_merges_can_be_scripted(repo):
  base = {name: noise(LARGE, i) for i, name in enumerate("abc")}
  ours = base | {"a": noise(LARGE, 7), "c": base["c"] + 1}
  theirs = base | {"b": noise(LARGE, 8), "c": base["c"] + 3}
  forked(repo, base, ours, theirs)
  method = pj.merging.linear()
  repo.merge("main", "theirs", method=method, message="by a script")
  found = repo.checkout()
  # Changes that collide with none are taken to the bit, leaf by leaf.
  assert bits({"a": found["a"], "b": found["b"]}) == bits(
    {"a": ours["a"], "b": theirs["b"]}
  )
  assert np.allclose(found["c"], base["c"] + 2, atol=1e-6)
  assert repo.replay().same


def test_a_part_is_loaded_without_the_rest(repo):
  first = {"encoder": {"w": noise(LARGE)}}
  repo.commit(first, message="encoder")
  repo.commit(first | {"head": noise(LARGE, 1)}, message="head")
  (rest,) = packs_of(repo, repo.tree()["head"].digest)
  shutil.rmtree(repo.files.path(rest))
  found = Repo(repo.path).checkout(only="encoder/.*")
  assert bits(found) == bits(first)


def test_a_model_is_streamed_leaf_by_leaf_and_slice_by_slice(repo):
  value = {"layers": {str(i): {"w": noise(LARGE, i)} for i in range(4)}}
  repo.commit(value, message="start")
  value["layers"]["2"]["w"] = scattered(value["layers"]["2"]["w"], 50, 1)
  repo.commit(value, message="sparse")
  lazy = Repo(repo.path).open("main")
  seen = {}
  for name, expected in pj.trees.named_leaves(value).items():
    leaf = lazy[name]
    assert leaf.shape == LARGE
    assert np.array_equal(leaf[10:20, ::2], expected[10:20, ::2])
    seen[name] = leaf.read()
  assert list(lazy) == list(seen)
  assert bits(pj.trees.names.nested(seen)) == bits(value)


def test_a_training_loop_saves_and_goes_on_as_if_never_stopped(repo):
  optimizer = optax.adam(0.1)

  @jax.jit
  def step(state, key):
    target = jax.random.normal(key, (160, 160))
    gradient = jax.grad(lambda w: jnp.sum((w - target) ** 2))(state["w"])
    # Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      update, inner = optimizer.update(gradient, state["inner"])
    return {"w": optax.apply_updates(state["w"], update), "inner": inner}

  def train(state, first, last, saver=None):
    for i in range(first, last):
      key = jax.random.fold_in(jax.random.key(0), i)
      values = step({"w": state["w"], "inner": state["inner"]}, key)
      state = {**values, "step": i + 1}
      if saver is not None:
        saver.save(i + 1, state)
    return state

  start = jax.device_put(noise(LARGE))
  start = {"w": start, "inner": optimizer.init(start), "step": 0}
  expected = train(start, 0, 6)
  with pj.history.Checkpointer(repo, every=2, keep_last=2) as saver:
    train(start, 0, 4, saver)
  with pj.history.Checkpointer(Repo(repo.path), every=2) as saver:
    state = saver.restore(start)
    assert state["step"] == saver.latest_step == 4
    found = train(state, state["step"], 6, saver)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
  assert set(repo.checkout(only="w")) == {"w"}  # without the optimizer


def test_a_diff_has_numbers(repo):
  old, new = noise(LARGE), noise(LARGE)
  new[3, 4] += 2
  new[5, 6] -= 3
  repo.commit({"w": old, "same": old}, message="old")
  repo.commit({"w": new, "same": old}, message="new")
  found = repo.diff("main~1", "main")
  (leaf,) = found.leaves
  assert (leaf.name, leaf.count, found.same) == ("w", 2, 1)
  assert leaf.largest == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
def test_formats_are_recognised(repo, tmp_path, suffix):
  value = {"layer": {"w": noise(LARGE), "b": noise((160,), 1)}}
  path = str(tmp_path / f"model{suffix}")
  pj.interop.write(path, value)
  pj.interop.import_(repo, path)
  assert bits(repo.checkout()) == bits(value)


def test_a_chain_is_squashed_without_a_new_id(repo):
  values = chained(repo, 20)
  ids = [commit.id for commit in repo.log()]
  before = len(repo.index.packs()), size(repo)
  repo.repack()
  repo.gc(grace=0)
  assert repo.fsck().ok
  # A pack or two instead of one a commit, and hardly more bytes.
  assert len(repo.index.packs()) < before[0] / 4
  assert size(repo) < 1.1 * before[1]
  found = Repo(repo.path)
  assert [commit.id for commit in found.log()] == ids
  for back, value in enumerate(reversed(values)):
    assert bits(found.checkout(f"main~{back}")) == bits({"w": value})
