"""Merge bases, merges and patches as commits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.commits import graph
from patchjax.trees import errors

RNG = np.random.default_rng(0)
BASE = {
  "dense": {"kernel": RNG.standard_normal((20, 30)).astype(np.float32)},
  "step": np.int32(1),
}


def shifted(amount, rows=slice(None)):
  kernel = BASE["dense"]["kernel"].copy()
  kernel[rows] += np.float32(amount)
  return {"dense": {"kernel": kernel}, "step": BASE["step"]}


def kernel(repo, ref):
  return np.asarray(repo.checkout(ref)["dense"]["kernel"])


@pytest.fixture
def repo():
  """main at the base; `left` and `right` changed different rows."""
  with Repo.temporary() as repo:
    repo.commit(BASE, message="base", time=1.0)
    for time, (name, rows) in enumerate(
      {"left": slice(0, 5), "right": slice(10, 12)}.items(), 2
    ):
      repo.branch(name)
      repo.commit(shifted(1, rows), message=name, branch=name, time=float(time))
    yield repo


def test_merge_base(repo):
  base = repo.resolve("main")
  assert repo.merge_base("left", "right") == base
  assert repo.merge_base("left", "left") == repo.resolve("left")
  assert repo.merge_base("main", "left", "right") == base


def test_merging_both_sides(repo):
  method = pj.merging.task_arithmetic(scale=1.0)
  commit = repo.merge("main", ["left", "right"], method=method)
  expected = shifted(1, slice(0, 5))["dense"]["kernel"]
  expected[10:12] = kernel(repo, "right")[10:12]
  np.testing.assert_array_equal(kernel(repo, "main"), expected)
  shown = repo.show("main")
  assert shown.id == commit
  assert shown.parents == (
    repo.resolve("main~1"),
    repo.resolve("left"),
    repo.resolve("right"),
  )
  assert shown.message == "Merge left, right into main"
  recipe = shown.recipe
  assert recipe["base"] == repo.resolve("main~1")
  # A parent that equals the base contributes nothing, and is not counted.
  assert recipe["contributors"] == [repo.resolve(r) for r in ("left", "right")]
  assert recipe["versions"]["jax"] == jax.__version__
  again = pj.from_spec(recipe["spec"], recipe["numbers"])
  assert again.spec == method.spec
  replayed = pj.merge(
    repo.checkout(recipe["base"]),
    [repo.checkout(c) for c in recipe["contributors"]],
    again,
  )
  assert pj.trees.tree_id(replayed) == shown.tree
  assert json.loads(json.dumps(shown.to_json()))["recipe"] == recipe
  assert repo.fsck().ok


def test_means_do_not_count_idle_parents(repo):
  repo.merge("main", ["left", "right"], method=pj.merging.linear())
  np.testing.assert_allclose(
    kernel(repo, "main")[0] - kernel(repo, "main~1")[0], 0.5, rtol=1e-5
  )


def test_merging_what_is_contained_or_ahead(repo):
  method = pj.merging.linear()
  tip = repo.resolve("left")
  assert repo.merge("left", "main", method=method) == tip
  assert repo.merge("main", "left", method=method) == tip  # fast-forward
  assert repo.resolve("main") == tip
  merged = repo.merge("right", "main", method=method)
  assert len(repo.show(merged).parents) == 2


def test_without_fast_forward_the_method_runs(repo):
  method = pj.merging.task_arithmetic(scale=0.5)
  repo.merge(
    "main", "left", method=method, fast_forward=False, one_sided="method"
  )
  assert repo.show().recipe["contributors"] == [repo.resolve("left")]
  np.testing.assert_allclose(
    kernel(repo, "main")[0] - kernel(repo, "main~1")[0], 0.5, rtol=1e-5
  )


def test_a_one_sided_change_is_taken_to_the_bit(repo):
  repo.branch("idle")
  repo.commit(BASE, message="nothing", branch="idle")
  method = pj.merging.ties(density=0.1, scale=1.0)
  repo.merge("idle", "left", method=method)
  assert repo.show("idle").tree == repo.show("left").tree
  assert len(repo.show("idle").parents) == 2


def test_criss_cross_asks_for_the_base(repo):
  method = pj.merging.linear()
  left, right = repo.resolve("left"), repo.resolve("right")
  repo.merge("left", right, method=method)
  repo.merge("right", left, method=method)
  assert graph.merge_bases(
    [repo.resolve("left"), repo.resolve("right")], repo.objects
  ) == sorted([left, right])
  with pytest.raises(errors.RepositoryError, match="base=") as info:
    repo.merge_base("left", "right")
  assert left[:12] in str(info.value)
  with pytest.raises(errors.RepositoryError, match="criss-cross"):
    repo.merge("left", "right", method=method)
  repo.commit(shifted(3), message="more", branch="left")
  repo.commit(shifted(5), message="more", branch="right")
  merged = repo.merge("left", "right", method=method, base="main")
  assert repo.show(merged).recipe["base"] == repo.resolve("main")


def test_unrelated_histories_ask_for_the_base(repo):
  repo.commit(shifted(9), message="root", branch="other", parents=[])
  with pytest.raises(errors.RepositoryError, match="no common ancestor"):
    repo.merge("left", "other", method=pj.merging.linear())


def test_collisions_that_cannot_be_merged_are_all_listed(repo):
  repo.commit({"other": np.ones(2)}, message="x", branch="right")
  repo.commit(
    {**shifted(2), "step": np.int32(7), "other": np.ones(3)},
    message="y",
    branch="left",
  )
  with pytest.raises(errors.ConflictError, match="3 leaf") as info:
    repo.merge("left", "right", method=pj.merging.linear())
  for line in (
    "dense/kernel: removed here and changed there",
    "step: removed here",
    "other: added in different ways",
  ):
    assert line in str(info.value)
  repo.commit({**shifted(2), "step": np.int32(8)}, message="z", branch="right")
  with pytest.raises(errors.ConflictError, match="step: int32 has no mean"):
    repo.merge("left", "right", method=pj.merging.linear())


def test_log_puts_children_first_whatever_the_clocks_say():
  with Repo.temporary() as repo:
    repo.commit(BASE, message="a", time=100.0)
    repo.branch("b")
    repo.commit(shifted(1), message="b", branch="b", time=1.0)
    repo.commit(shifted(2), message="c", branch="b", time=50.0)
    repo.commit(shifted(3), message="d", time=160.0)
    repo.merge("main", "b", method=pj.merging.linear(), time=2.0)
    titles = [c.message for c in repo.log()]
    assert titles == ["Merge b into main", "d", "c", "b", "a"]


# Patches.


def test_committing_a_patch(repo):
  tuned = shifted(0.25)
  patch = pj.diff(BASE, tuned, only=".*kernel")
  repo.commit(patch, message="patched")
  expected = pj.patches.pinned.apply_host(
    BASE["dense"]["kernel"], patch.deltas["dense/kernel"]
  )
  assert kernel(repo, "main").tobytes() == expected.tobytes()
  assert repo.tree("main")["step"] == repo.tree("main~1")["step"]
  again = repo.patch_of("main")
  assert again.base == repo.show("main~1").tree
  assert (
    pj.trees.tree_id(pj.apply(repo.checkout("main~1"), again))
    == repo.show("main").tree
  )


def test_patch_files_are_kept_byte_for_byte(repo, tmp_path):
  path = tmp_path / "fix.safetensors"
  pj.diff(BASE, shifted(0.5), exact=True).save(path, base=BASE)
  repo.commit(str(path), message="file")
  assert repo.objects.read(repo.show().patch) == path.read_bytes()
  assert repo.show().tree == pj.trees.tree_id(shifted(0.5))
  assert repo.fsck().ok


def test_patches_in_memory_have_the_same_id_as_their_result(repo):
  """A commit is a value: factors or not, the tree id is that of the result."""
  a = jnp.asarray(RNG.standard_normal((20, 2)), jnp.float32)
  b = jnp.asarray(RNG.standard_normal((2, 30)), jnp.float32)
  code = pj.patches.LowRank(a, b, jnp.float32(0.5))
  patch = pj.Patch({"dense/kernel": pj.patches.Delta(code, "add")})
  repo.commit(patch, message="low rank")
  value = repo.checkout()
  assert repo.show().tree == pj.trees.tree_id(value)


def test_a_wrong_base_is_refused_with_directions(repo):
  patch = pj.diff(BASE, shifted(0.5)).replace(base=pj.trees.tree_id(BASE))
  with pytest.raises(errors.BaseMismatchError) as info:
    repo.commit(patch, message="late", branch="left")
  assert repo.resolve("main")[:12] in str(info.value)
  stranger = patch.replace(base="0" * 64)
  with pytest.raises(errors.BaseMismatchError, match="no version"):
    repo.commit(stranger, message="stranger")
  # To a branch of its own, made on the way.
  commit = repo.commit(patch, message="fine", branch="fix", on="main")
  assert repo.show(commit).parents == (repo.resolve("main"),)
  with pytest.raises(errors.ConflictError, match="left"):
    repo.commit(patch, message="no", branch="left", on="main")


def test_a_patch_that_does_not_fit_lists_the_leaves(repo):
  other = {"dense": {"kernel": np.ones((3, 3), np.float32)}, "b": np.ones(2)}
  patch = pj.diff(other, other)
  with pytest.raises(errors.MismatchError, match="dense/kernel"):
    repo.commit(patch, message="no")
  with pytest.raises(errors.BaseMismatchError, match="b"):
    repo.commit(pj.Patch({"b": patch.deltas["b"]}), message="no")
  assert len(repo.log()) == 1


def test_a_patch_needs_a_version():
  with Repo.temporary() as repo:
    with pytest.raises(errors.RepositoryError, match="commit the base first"):
      repo.commit(pj.diff(BASE, BASE), message="no")


def test_structural_patches_are_values_too(repo):
  new = {"dense": {"kernel": BASE["dense"]["kernel"]}, "more": np.ones(3, "f")}
  patch = pj.diff(BASE, new, structural=True)
  repo.commit(patch, message="grown")
  assert sorted(repo.tree()) == ["dense/kernel", "more"]
  assert repo.show().tree == pj.trees.tree_id(new)


def test_patch_of_a_plain_commit_is_exact(repo):
  patch = repo.patch_of("left")
  result = pj.apply(repo.checkout("left~1"), patch)
  assert pj.trees.tree_id(result) == repo.show("left").tree
  with pytest.raises(errors.RepositoryError, match="first of its history"):
    repo.patch_of("main")


def test_damaged_patch_files_are_found(repo, tmp_path):
  path = tmp_path / "fix.safetensors"
  pj.diff(BASE, shifted(0.5)).save(path, base=BASE)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(errors.FormatError):
    repo.commit(path, message="truncated")
  path.write_bytes(data)
  repo.commit(path, message="fine")
  name = repo.show().patch
  with open(repo.files.path(f"objects/{name[:2]}/{name[2:]}"), "ab") as file:
    file.write(b"x")
  assert not repo.fsck().ok
  with pytest.raises(errors.IntegrityError):
    repo.patch_of("main")
