"""Many writers on one branch: no lost commit, and changes put together."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.storage.objects import id_of
from patchjax.trees import errors

START = {
  name: np.arange(4, dtype=np.float32) for name in ("a", "b", "c", "d", "e")
}


def changed(base=START, /, **leaves):
  return {**base, **{k: np.float32([v] * 4) for k, v in leaves.items()}}


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    repo.commit(START, message="start")
    yield repo


def same(tree, expected):
  return pj.trees.tree_id(tree) == pj.trees.tree_id(expected)


def test_changes_of_other_leaves_are_put_together(repo):
  first = repo.resolve("main")
  theirs = repo.commit(changed(a=1), message="theirs", author="Ada")
  with pytest.raises(errors.ConflictError, match=r"Ada.*theirs.*retry=True"):
    repo.commit(changed(b=2), message="mine", parents=[first])
  mine = repo.commit(changed(b=2), message="mine", parents=[first], retry=True)
  assert repo.show(mine).parents == (theirs,)
  assert same(repo.checkout(), changed(a=1, b=2))
  assert repo.fsck().ok


def test_one_try_is_no_more_than_one(repo, monkeypatch):
  first = repo.resolve("main")
  move = repo.refs.move
  others = iter("abcd")

  def late(space, name, *, old, new):
    """Somebody else is faster, each time."""
    monkeypatch.setattr(repo.refs, "move", move)
    other = next(others)
    tip = repo.checkout("main")
    repo.commit(changed(tip, **{other: 9}), message=other, author="Ada")
    monkeypatch.setattr(repo.refs, "move", late)
    move(space, name, old=old, new=new)

  monkeypatch.setattr(repo.refs, "move", late)
  with pytest.raises(errors.ConflictError, match="Ada.*: b"):
    repo.commit(changed(e=2), message="mine", retry=1)
  assert [c.title for c in repo.log()] == ["b", "a", "start"]
  assert not [m for m in repo.reflog() if "mine" in m.why]
  with pytest.raises(StopIteration):  # it would go on for ever
    repo.commit(changed(e=2), message="mine", parents=[first], retry=True)
  assert len(repo.log()) == 5


def test_changes_of_the_same_leaf_are_a_conflict_that_names_it(repo):
  first = repo.resolve("main")
  theirs = repo.commit(changed(a=1, b=1), message="theirs", author="Ada")
  with pytest.raises(errors.ConflictError, match=r"Ada.*theirs.*1 leaf.*: b;"):
    repo.commit(changed(b=2, c=2), message="mine", parents=[first], retry=True)
  assert repo.resolve("main") == theirs
  # The same change is none.
  repo.commit(changed(b=1, c=2), message="mine", parents=[first], retry=True)
  assert same(repo.checkout(), changed(a=1, b=1, c=2))


def test_leaves_that_come_and_go(repo):
  first = repo.resolve("main")
  less = {k: v for k, v in START.items() if k != "a"}
  repo.commit({**less, "n": {"x": START["a"]}}, message="theirs")
  fewer = {k: v for k, v in START.items() if k != "e"}
  repo.commit(
    {**fewer, "n2": START["b"]}, message="mine", parents=[first], retry=True
  )
  assert sorted(repo.tree()) == ["b", "c", "d", "n/x", "n2"]
  for mine, why in {
    "changes what they removed": (changed(a=3), "1 leaf.*: a;"),
    "a leaf with the name of their folder": (
      {**START, "n": START["a"]},
      "'n",
    ),
  }.values():
    with pytest.raises(errors.ConflictError, match=why):
      repo.commit(mine, message="mine", parents=[first], retry=True)


def test_patches_are_put_together_too(repo):
  first = repo.resolve("main")
  patch = pj.diff(START, changed(b=2), exact=True, only="b")
  repo.commit(changed(a=1), message="theirs")
  repo.commit(patch, message="fix", on=first, retry=True)
  assert same(repo.checkout(), changed(a=1, b=2))


def test_nothing_is_put_on_a_branch_that_was_reset(repo):
  second = repo.commit(changed(a=1), message="second")
  repo.reset("main~1")
  repo.commit(changed(c=1), message="other")
  with pytest.raises(errors.ConflictError, match="does not follow"):
    repo.commit(changed(a=1, b=2), message="m", parents=[second], retry=True)
  with pytest.raises(errors.ConflictError):
    repo.commit(changed(b=2), message="m", parents=[], retry=True)


WRITER = """
import sys
import numpy as np
from patchjax.history import Repo

path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
repo = Repo(path)
print("ready", flush=True)
sys.stdin.readline()
for step in range(count):
  tip = repo.resolve("main")
  value = repo.checkout(tip)
  value[name] = np.full(4, step + 1, np.float32)
  made = repo.commit(
    value, message=f"{name} {step}", author=name, parents=[tip], retry=True
  )
  print(made, flush=True)
"""


def test_four_processes_lose_no_commit(repo, tmp_path):
  """Each owns a leaf; all start at once, and none ever waits."""
  program = tmp_path / "writes.py"
  program.write_text(WRITER)
  count, names = 6, "abcd"
  running = [
    subprocess.Popen(
      [sys.executable, program, repo.path, name, str(count)],
      cwd=pathlib.Path(pj.__file__).parents[1],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for name in names
  ]
  made = {}
  try:
    for process in running:
      ready = process.stdout.readline()
      assert ready == "ready\n", process.communicate(timeout=60)
    for process in running:  # now
      process.stdin.write("\n")
      process.stdin.flush()
    for name, process in zip(names, running, strict=True):
      out, err = process.communicate(timeout=120)
      assert process.returncode == 0, err
      made[name] = out.split()
  finally:
    for process in running:
      process.kill()
      process.communicate()
  commits = repo.log()
  ids = [commit.id for commit in commits]
  assert len(ids) == 1 + count * len(names)
  assert {c for name in names for c in made[name]} == set(ids[:-1])
  for commit in commits:  # in one line, each of them what its id says
    assert id_of(repo.objects.read(commit.id)) == commit.id
    assert len(commit.parents) == (0 if commit.id == ids[-1] else 1)
  for name in names:  # each in its own order
    own = [c.title for c in commits if c.author == name]
    assert own == [f"{name} {step}" for step in reversed(range(count))]
  # Every version holds what its history says, and nothing else.
  expected = dict(START)
  for commit in reversed(commits[:-1]):
    name, step = commit.title.split()
    expected = changed(expected, **{name: int(step) + 1})
    assert same(repo.checkout(commit.id), expected)
  log = repo.reflog()
  assert [move.new for move in log] == ids and all(m.done for m in log)
  assert json.dumps([move.to_json() for move in log])
  assert repo.fsck().ok
