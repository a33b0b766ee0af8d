"""Where refs have been; refs removed, renamed and reset; damaged refs."""

import json
import os

import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.storage import reflog
from patchjax.history.storage.refs import HEADS
from patchjax.trees import errors


def value(number):
  return {"w": np.float32([number, 1])}


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    for i in range(3):
      repo.commit(value(i), message=f"step {i}", author="Ada", time=float(i))
    yield repo


def whys(repo, name="main"):
  return [move.why for move in repo.reflog(name)]


def test_every_move_is_written_down(repo):
  method = pj.merging.linear()
  repo.branch("side", at="main~1")
  repo.tag("v1", "main~2")
  repo.commit(value(7), message="more\n\nat length", branch="side")
  repo.reset("main~1", author="Bob")
  repo.merge("main", "side", method=method)  # fast-forward
  repo.commit(value(8), message="eight")
  repo.commit(value(9), message="nine", branch="side")
  repo.merge("main", "side", method=method)
  assert whys(repo) == [
    "merge: Merge side into main",
    "commit: eight",
    "merge side: fast-forward",
    "reset: moving to main~1",
    "commit: step 2",
    "commit: step 1",
    "commit (initial): step 0",
  ]
  assert whys(repo, "side")[-2:] == ["commit: more", "branch: at main~1"]
  assert whys(repo, "v1") == ["tag: main~2"]
  log = repo.reflog()
  assert [move.old for move in log[:-1]] == [move.new for move in log[1:]]
  assert (log[-1].old, log[0].new) == (None, repo.resolve("main"))
  assert [move.who for move in log[3:]] == ["Bob", "Ada", "Ada", "Ada"]
  assert len(repo.reflog(limit=2)) == 2
  assert log[0].to_json()["ref"] == "refs/heads/main"
  assert repo.fsck().ok


def test_revisions_before_moves(repo):
  ids = [repo.resolve(f"main~{n}") for n in range(3)]
  repo.reset("main~2")
  assert repo.resolve("main@{0}") == ids[2] == repo.resolve("main")
  assert repo.resolve("main@{1}") == repo.resolve("@{1}") == ids[0]
  assert repo.resolve("heads/main@{1}~1") == ids[1]
  assert repo.resolve("main@{3}") == ids[2]
  for ref, why in {
    "main@{4}": "did not exist then",
    "main@{5}": r"has 4 move\(s\)",
    "absent@{1}": "never was",
  }.items():
    with pytest.raises(errors.RefNotFoundError, match=why):
      repo.resolve(ref)
  with pytest.raises(errors.RefNotFoundError, match="never was"):
    repo.reflog("absent")


def test_a_deleted_branch_comes_back(repo):
  repo.branch("try")
  tip = repo.commit(value(9), message="tried", branch="try")
  with pytest.raises(errors.RepositoryError, match=r"force.*try@\{1\}"):
    repo.branch("try", delete=True)
  assert repo.branch("try", delete=True, force=True) == tip
  assert list(repo.branches()) == ["main"]
  assert whys(repo, "try")[0] == "branch: deleted"
  with pytest.raises(errors.RefNotFoundError, match="did not exist then"):
    repo.resolve("try@{0}")
  assert repo.branch("try", at="try@{1}") == tip
  assert [move.done for move in repo.reflog("try")] == [True] * 4
  repo.tag("keep", "try")
  repo.branch("try", delete=True)  # the tag leads to its commits
  with pytest.raises(errors.RefNotFoundError, match="no branch 'try'"):
    repo.branch("try", delete=True)
  assert repo.tag("keep", delete=True) == tip and repo.tags() == {}


def test_branches_are_renamed_and_their_folders_freed(repo):
  tip = repo.branch("a/b")
  assert repo.branch("a/b", rename="c") == tip
  assert list(repo.branches()) == ["c", "main"]
  repo.branch("a")  # its name was a folder
  repo.branch("a", delete=True)
  repo.branch("a/b/c")
  assert whys(repo, "a") == ["branch: deleted", "branch: at main"]
  with pytest.raises(errors.ConflictError, match="exists already"):
    repo.branch("c", rename="main")
  assert repo.branches()["c"] == tip
  with pytest.raises(errors.RepositoryError, match="not both"):
    repo.branch("c", rename="d", delete=True)


def test_a_lost_swap_leaves_no_entry(repo):
  first, tip = repo.resolve("main~2"), repo.resolve("main")
  with pytest.raises(errors.ConflictError):
    reflog.move(repo, HEADS, "main", old=first, new=first, why="late")
  assert "late" not in whys(repo)
  assert repo.resolve("main") == tip


def entries(repo, name="main"):
  folder = repo.files.path(f"logs/heads/{name}")
  return [os.path.join(folder, key) for key in sorted(os.listdir(folder))]


def test_a_move_that_never_happened_is_told_apart(repo):
  """A process killed between the entry and the swap."""
  for path in entries(repo)[1:]:  # in the middle of the log, and at its end
    with open(path) as file:
      entry = json.load(file)
    dead = {"old": entry["new"], "new": repo.resolve("main~2"), "why": "dead"}
    stamp = f"{int(os.path.basename(path)[:20]) + 1:020}-{'0' * 32}"
    with open(repo.files.path(f"logs/heads/main/{stamp}"), "w") as file:
      json.dump({**entry, **dead}, file)
  log = repo.reflog()
  assert [(m.why, m.done) for m in log if not m.done] == [("dead", False)] * 2
  assert whys(repo)[:3] == ["commit: step 2", "commit: step 1"] + [
    "commit (initial): step 0"
  ]
  assert repo.resolve("main@{2}") == repo.resolve("main~2")


def test_clocks_that_disagree_and_entries_that_expired(repo):
  repo.commit(value(3), message="step 3")
  paths = entries(repo)
  late = paths[1].replace(os.path.basename(paths[1])[:2], "90", 1)
  os.rename(paths[1], late)  # written by a machine whose clock is ahead
  assert [m.why[-6:] for m in repo.reflog() if m.done] == [
    f"step {i}" for i in (3, 2, 1, 0)
  ]
  os.remove(late)
  assert [m.why[-6:] for m in repo.reflog() if m.done] == [
    f"step {i}" for i in (3, 2, 0)
  ]
  os.remove(paths[0])
  with pytest.raises(errors.RefNotFoundError, match="has 2"):
    repo.resolve("main@{3}")
  with open(entries(repo)[0], "w") as file:
    file.write("{")  # damaged: the log is shorter, and the history whole
  assert whys(repo) == ["commit: step 3"]
  assert len(repo.log()) == 4


def test_a_branch_mended_by_hand_has_its_log(repo):
  second = repo.resolve("main~1")
  with open(repo.files.path("refs/heads/main"), "w") as file:
    file.write(second + "\n")
  assert [m.done for m in repo.reflog()] == [True, True, False]
  repo.commit(value(5), message="step 5")
  assert repo.resolve("main@{1}") == repo.resolve("main~1")


def test_a_damaged_ref_does_not_hide_the_others(repo):
  repo.branch("side")
  repo.branch("bad")
  with open(repo.files.path("refs/heads/bad"), "w") as file:
    file.write("zzz")
  with pytest.warns(UserWarning, match="'bad' is damaged"):
    assert list(repo.branches()) == ["main", "side"]
  assert len(repo.log("side")) == 3
  repo.commit(value(4), message="goes on", branch="side")
  with pytest.raises(errors.IntegrityError, match="bad"):
    repo.log("bad")
  assert whys(repo, "side") == ["commit: goes on", "branch: at main"]
  # What it was is in its log.
  assert repo.reflog("bad")[0].new == repo.resolve("bad@{0}")
  assert repo.resolve("bad@{0}") == repo.resolve("main")


def test_messages_that_say_nothing_are_refused(repo):
  for message in ("", " \n"):
    with pytest.raises(errors.RepositoryError, match="message is empty"):
      repo.commit(value(5), message=message)
  assert len(repo.log()) == 3
