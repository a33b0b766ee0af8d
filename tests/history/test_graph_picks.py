"""revert, cherry-pick and rebase, against histories made anew."""

import ml_dtypes
import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.commits import recipes
from patchjax.trees import errors

RNG = np.random.default_rng(1)
ADD = pj.merging.task_arithmetic()


def normal(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


START = {
  "a": normal(6, 5),
  "b": {"x": normal(30), "y": normal(4).astype(ml_dtypes.bfloat16)},
  "n": np.int32([1, 2, 3]),
}


def patch(name, size=(6, 5)):
  """A dense, an additive patch of one leaf, that fits any base."""
  code = pj.patches.Dense(normal(*size))
  return pj.Patch({name: pj.patches.Delta(code, "add")})


def value_of(repo, ref="main"):
  return repo.show(ref).tree


def tree_id(value):
  return pj.trees.tree_id(value)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    repo.commit(START, message="start", author="Ada", time=1.0)
    yield repo


def run(steps, skip=None):
  """Makes a history of steps without one of them; returns repo and ids."""
  with Repo.temporary() as repo:
    ids = {}
    for name, step in steps.items():
      if name != skip:
        ids[name] = step(repo, ids)
    yield repo, ids


# Reverts.


def test_reverting_the_tip_restores_the_bits_of_its_parent(repo):
  odd = np.array([0x7FC12345, 0x80000000, 1], np.uint32).view(np.float32)
  before = {**START, "odd": odd}
  first = repo.commit(before, message="before")
  after = {**START, "a": START["a"] * 3, "odd": odd[::-1].copy(), "new": odd}
  del after["n"]
  wrong = repo.commit(after, message="wrong\n\nvery")
  made = repo.revert()
  assert value_of(repo) == tree_id(before) == value_of(repo, first)
  shown = repo.show()
  assert shown.id == made and shown.parents == (wrong,)
  assert shown.message == f'Revert "wrong"\n\nThis reverts commit {wrong}.'
  assert shown.recipe == {"kind": "revert", "commit": wrong, "to": first}
  repo.revert(made)
  assert value_of(repo) == tree_id(after)


def test_what_nobody_touched_since_comes_back_to_the_bit(repo):
  wrong = {**START, "a": START["a"].copy(), "n": np.int32([1, 9, 3])}
  wrong["a"][0] += 1
  commit = repo.commit(wrong, message="wrong")
  later = {
    **wrong,
    "a": wrong["a"].copy(),
    "b": {**START["b"], "x": normal(30)},
  }
  later["a"][3:] *= 2  # other entries of the same leaf
  repo.commit(later, message="later")
  repo.revert(commit)
  expected = {**later, "a": later["a"].copy(), "n": START["n"]}
  expected["a"][0] = START["a"][0]
  assert value_of(repo) == tree_id(expected)


def test_entries_set_since_are_a_conflict_or_for_a_method(repo):
  wrong = {**START, "a": START["a"] + 1, "n": START["n"] + 1}
  commit = repo.commit(wrong, message="wrong")
  later = {**wrong, "a": wrong["a"] * 2}
  repo.commit(later, message="later")
  with pytest.raises(errors.ConflictError, match="later.*") as info:
    repo.revert(commit)
  assert "a: 30 of 30 entries" in str(info.value)
  assert len(repo.log()) == 3
  repo.revert(commit, method=ADD)
  expected = pj.merge(wrong["a"], [START["a"], later["a"]], ADD)
  assert value_of(repo) == tree_id({**START, "a": expected})
  assert repo.show().recipe["method"]["numbers"] is not None


def commit_patch(name, branch="main", size=(6, 5)):
  made = patch(name, size)
  return lambda repo, ids: repo.commit(
    made, message=f"add {name}", branch=branch
  )


def commit_value(value, branch="main"):
  return lambda repo, ids: repo.commit(value, message="set", branch=branch)


def merging(*refs, method, into="main", **options):
  return lambda repo, ids: repo.merge(into, refs, method=method, **options)


def branching(name, at):
  return lambda repo, ids: repo.branch(name, at=ids[at])


def start(repo, ids):
  return repo.commit(START, message="start")


HISTORIES = {
  "patches in a line": {
    "start": start,
    "wrong": commit_patch("a"),
    "more": commit_patch("a"),
    "other": commit_patch("b/x", size=(30,)),
    "again": commit_patch("a"),
  },
  "a linear merge": {
    "start": start,
    "side": branching("side", "start"),
    "wrong": commit_patch("a", "side"),
    "on": commit_patch("a", "side"),
    "here": commit_patch("a"),
    "merge": merging("side", method=pj.merging.linear(weights=[0.3, 0.7])),
    "after": commit_patch("a"),
  },
  "a merge that is not linear": {
    "start": start,
    "side": branching("side", "start"),
    "wrong": commit_patch("b/x", "side", (30,)),
    "on": commit_patch("a", "side"),
    "on too": commit_patch("b/x", "side", (30,)),
    "here": commit_patch("a"),
    "here too": commit_patch("b/x", size=(30,)),
    "merge": merging("side", method=pj.merging.ties(density=0.4)),
    "after": commit_patch("b/x", size=(30,)),
  },
  "an octopus of which a side vanishes": {
    "start": start,
    "p": branching("p", "start"),
    "q": branching("q", "start"),
    "wrong": commit_patch("a", "p"),
    "q1": commit_patch("a", "q"),
    "q2": commit_patch("b/x", "q", (30,)),
    "here": commit_patch("a"),
    "merge": merging("p", "q", method=pj.merging.linear()),
    "after": commit_patch("a"),
  },
  "a merge run on the whole tree": {
    "start": start,
    "side": branching("side", "start"),
    "wrong": commit_patch("b/x", "side", (30,)),
    "on": commit_patch("a", "side"),
    "here": commit_patch("a"),
    "merge": merging(
      "side", method=pj.merging.ties(density=0.4), one_sided="method"
    ),
  },
  "two merges, one of them behind": {
    "start": start,
    "side": branching("side", "start"),
    "wrong": commit_patch("a"),
    "on": commit_patch("a", "side"),
    "first": merging("main", into="side", method=ADD),
    "here": commit_patch("a"),
    "merge": merging("side", method=pj.merging.ties(density=0.5)),
  },
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_revert_gives_the_history_without_the_commit(name):
  """To the bit: made anew, with the same patches and merges."""
  steps = HISTORIES[name]
  for repo, ids in run(steps):
    repo.revert(ids["wrong"])
    found = value_of(repo)
    assert found != value_of(repo, "main~1")
    assert repo.fsck().ok
  for repo, _ in run(steps, skip="wrong"):
    assert found == value_of(repo)


def test_merges_are_reverted_to_a_parent(repo):
  repo.branch("side")
  repo.commit(patch("a"), message="side", branch="side")
  repo.commit(patch("b/x", (30,)), message="main")
  before = value_of(repo)
  merge = repo.merge("main", "side", method=ADD)
  repo.commit({**repo.checkout(), "n": np.int32([7, 7, 7])}, message="later")
  with pytest.raises(errors.RepositoryError, match="mainline=1 to 2"):
    repo.revert(merge)
  with pytest.raises(errors.RepositoryError, match="found mainline=3"):
    repo.revert(merge, mainline=3)
  repo.revert(merge, mainline=1)
  now = repo.tree()
  assert now["n"] != repo.tree("main~3")["n"]
  assert {**now, "n": 0} == {**repo.tree("main~3"), "n": 0}
  assert before == value_of(repo, "main~3")


def test_merges_without_a_recipe_are_followed_to_where_leaves_came_from(repo):
  repo.branch("side")
  wrong = repo.commit(patch("a"), message="wrong", branch="side")
  repo.commit({**START, "b": {**START["b"], "x": normal(30)}}, message="here")
  joined = {**repo.checkout(), "a": repo.checkout("side")["a"]}
  repo.commit(joined, message="by hand", parents=["main", "side"])
  repo.revert(wrong)
  assert value_of(repo) == tree_id({**joined, "a": START["a"]})


def test_what_cannot_be_reverted(repo):
  with pytest.raises(errors.RepositoryError, match="first of its history"):
    repo.revert()
  repo.branch("side")
  other = repo.commit(patch("a"), message="other", branch="side")
  with pytest.raises(errors.RepositoryError, match="does not contain"):
    repo.revert(other)
  repo.commit(START, message="nothing")
  with pytest.raises(errors.RepositoryError, match="nothing is left"):
    repo.revert()


def test_a_merge_that_gives_other_bits_here_is_not_computed_again(repo):
  repo.branch("side")
  wrong = repo.commit(patch("a"), message="wrong", branch="side")
  repo.commit(patch("a"), message="on", branch="side")
  repo.commit(patch("a"), message="here")
  repo.merge("main", "side", method=pj.merging.linear())
  recipe = {**repo.show().recipe, **recipes.of_method(ADD)}  # not what it was
  merged = repo.checkout()
  repo.reset("main~1")
  parents = ["main", "side"]
  repo.commit(merged, message="merge", parents=parents, recipe=recipe)
  with pytest.raises(errors.RepositoryError, match="gives other bits here"):
    repo.revert(wrong)


# Picks.


def test_a_pick_is_exact_where_nobody_else_was(repo):
  repo.branch("side")
  value = {**START, "a": START["a"].copy(), "new": normal(2)}
  value["a"][0] = 7
  del value["n"]
  fix = repo.commit(value, message="fix", branch="side", author="Bob", time=9.0)
  here = {**START, "a": START["a"].copy(), "b": {**START["b"], "x": normal(30)}}
  here["a"][5] = 8
  repo.commit(here, message="here")
  repo.cherry_pick(fix)
  expected = {**here, "a": here["a"].copy(), "new": value["new"]}
  expected["a"][0] = 7
  del expected["n"]
  assert value_of(repo) == tree_id(expected)
  shown = repo.show()
  assert (shown.message, shown.author, shown.when.timestamp()) == (
    "fix",
    "Bob",
    9,
  )
  assert shown.recipe == {"kind": "cherry-pick", "picked": fix}
  assert repo.reflog()[0].why == "cherry-pick: fix"
  with pytest.raises(errors.RepositoryError, match="has all that"):
    repo.cherry_pick(fix)


def test_picked_patches_are_applied_again(repo):
  repo.branch("side")
  made = patch("a")
  fix = repo.commit(made, message="fix", branch="side")
  here = {**START, "a": START["a"] * 2}
  repo.commit(here, message="here")
  repo.cherry_pick(fix)
  expected = pj.patches.pinned.apply_host(here["a"], made.deltas["a"])
  assert value_of(repo) == tree_id({**here, "a": expected})
  again = repo.patch_of()  # made out for its new base
  assert again.base == value_of(repo, "main~1")
  applied = pj.patches.pinned.apply_named(
    pj.trees.named_leaves(repo.checkout("main~1")), again
  )
  assert tree_id(applied["a"]) == tree_id(repo.checkout()["a"])


def test_exact_patches_are_not_applied_to_other_numbers(repo):
  """Differences of bit patterns mean nothing elsewhere."""
  repo.branch("side")
  exact = pj.diff(START, {**START, "a": START["a"] + 1}, exact=True, only="a")
  fix = repo.commit(exact, message="fix", branch="side")
  repo.commit({**START, "a": START["a"] * 2}, message="here")
  with pytest.raises(errors.ConflictError, match="a: 30 of 30"):
    repo.cherry_pick(fix)
  repo.cherry_pick(fix, method=ADD)
  np.testing.assert_allclose(
    repo.checkout()["a"], START["a"] * 2 + 1, rtol=1e-5, atol=1e-5
  )
  assert repo.show().patch is None


def test_conflicts_of_picks_list_every_leaf(repo):
  repo.branch("side")
  theirs = {**START, "a": normal(7, 5), "n": START["n"] + 1}
  theirs["b"] = {"x": START["b"]["x"]}
  fix = repo.commit(theirs, message="fix", branch="side")
  here = {**START, "a": START["a"] * 2, "n": START["n"] * 5}
  here["b"] = {**START["b"], "y": START["b"]["y"] * 2}
  tip = repo.commit(here, message="here")
  with pytest.raises(errors.ConflictError, match="3 leaf") as info:
    repo.cherry_pick(fix, method=ADD)  # none of them is for a method
  for line in (
    "a: float32[6, 5] before it, float32[7, 5] after it, float32[6, 5] here",
    "b/y: bfloat16[4] before it, absent after it, bfloat16[4] here",
    "n: 3 of 3 entries",
  ):
    assert line in str(info.value)
  assert repo.resolve("main") == tip


# Rebases.


def test_a_rebase_keeps_what_commits_did_and_who_did_it(repo):
  repo.branch("topic")
  value = {**START, "b": {**START["b"], "x": normal(30)}}
  repo.commit(value, message="one", branch="topic", author="Bob", time=5.0)
  made = patch("a")
  repo.commit(made, message="two", branch="topic", author="Eve")
  old = repo.resolve("topic")
  here = {**START, "a": START["a"] * 2}
  repo.commit(here, message="here")
  tip = repo.rebase("topic", "main")
  assert repo.resolve("topic") == tip and repo.resolve("topic@{1}") == old
  log = repo.log("topic")
  assert [c.title for c in log] == ["two", "one", "here", "start"]
  assert [c.author for c in log[:2]] == ["Eve", "Bob"]
  assert log[1].when.timestamp() == 5.0
  expected = pj.patches.pinned.apply_host(here["a"], made.deltas["a"])
  assert value_of(repo, "topic") == tree_id({**value, "a": expected})
  assert repo.reflog("topic")[0].why == "rebase: 2 commit(s) onto main"
  assert repo.rebase("topic", "main") == tip  # it is there already
  assert repo.fsck().ok


def test_commits_that_are_there_already_are_left_out(repo):
  repo.branch("topic")
  fix = repo.commit(patch("a"), message="fix", branch="topic")
  repo.commit(
    {**repo.checkout(fix), "n": START["n"] + 1}, message="n", branch="topic"
  )
  repo.cherry_pick(fix)
  repo.commit({**repo.checkout(), "b": START["b"]}, message="empty")
  repo.rebase("topic")
  assert [c.title for c in repo.log("topic")] == ["n", "empty", "fix", "start"]
  repo.branch("behind", at="main~2")
  assert repo.rebase("behind") == repo.resolve("main")  # fast-forward


def test_a_conflict_leaves_the_branch_where_it_was(repo):
  repo.branch("topic")
  repo.commit({**START, "n": START["n"] + 1}, message="n", branch="topic")
  tip = repo.commit({**START, "a": START["a"] + 1}, message="a", branch="topic")
  repo.commit({**START, "a": START["a"] * 2}, message="here")
  with pytest.raises(errors.ConflictError, match=r"\(a\) changed"):
    repo.rebase("topic")
  assert repo.resolve("topic") == tip
  repo.rebase("topic", method=ADD)
  np.testing.assert_allclose(
    repo.checkout("topic")["a"], START["a"] * 2 + 1, rtol=1e-5, atol=1e-5
  )


def test_merges_in_a_rebase(repo):
  """A choice of leaves becomes a line; computed numbers are not thrown away."""
  repo.branch("topic")
  repo.branch("other")
  repo.commit({**START, "n": START["n"] + 1}, message="n", branch="topic")
  repo.commit({**START, "a": START["a"] + 1}, message="a", branch="other")
  repo.merge("topic", "other", method=ADD)
  merged = value_of(repo, "topic")
  repo.commit({**START, "extra": normal(2)}, message="here")
  repo.branch("second", at="topic")
  repo.rebase("topic")
  assert sorted(c.title for c in repo.log("main..topic")) == ["a", "n"]
  assert {**repo.tree("topic")} == {
    **repo.tree("second"),
    "extra": repo.tree("main")["extra"],
  }
  assert value_of(repo, "second") == merged
  repo.commit(
    {**repo.checkout("other"), "a": normal(6, 5)}, message="b", branch="other"
  )
  repo.commit(
    {**repo.checkout("second"), "a": normal(6, 5)}, message="c", branch="second"
  )
  repo.merge("second", "other", method=ADD)
  with pytest.raises(errors.RepositoryError, match=r"computed 1 leaves \(a\)"):
    repo.rebase("second")
