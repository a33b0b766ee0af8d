"""fsck: what it finds, and that what it says mends it."""

import json
import os
import shutil

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import index, reading
from patchjax.history.upkeep import fsck_run, verifying
from patchjax.trees import errors
from tests.history.accidents import files_below, flip

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)
TUNED = LARGE * np.float32(1.0001)


@pytest.fixture
def repo():
  """Two versions: a checkpoint, and a difference to it."""
  with Repo.temporary() as repo:
    repo.commit({"x": LARGE}, message="start")
    repo.commit({"x": TUNED}, message="tuned")
    repo.tag("v1", "main~1")
    yield repo


@pytest.fixture
def spare(repo, tmp_path):
  """Another copy of the repository."""
  return Repo(shutil.copytree(repo.path, tmp_path / "spare"))


def fsck(repo, **options):
  return Repo(repo.path).fsck(**options)


def only_problem(repo, kind, repair, **options):
  """The one problem that a repository has, which says what mends it."""
  problems = fsck(repo, **options).problems
  assert [problem.kind for problem in problems] == [kind], problems
  assert repair in problems[0].repair
  return problems[0]


def damage(repo, key, position=10):
  flip(repo.files.path(key), position)


def place_of(repo, ref):
  repo.index.refresh()
  digest = repo.tree(ref)["x"].digest
  [place] = repo.index.find([digest])[digest]
  return place


def test_all_is_well(repo):
  report = fsck(repo)
  assert report.ok and not report.quick
  assert report.counts == {
    "refs": 2,
    "commits": 2,
    "objects": 4,
    "packs": 2,
    "leaves": 2,
  }
  assert report.dangling == report.leftovers == ()
  assert json.loads(json.dumps(report.to_json()))["ok"]


def test_progress_is_reported(repo):
  seen = []
  fsck(repo, progress=lambda *step: seen.append(step))
  assert {what for what, _, _ in seen} == {"objects", "leaves"}
  assert all(done <= total for _, done, total in seen)
  assert ("leaves", 2, 2) in seen


def test_a_branch_is_mended_with_its_reflog(repo):
  tip = repo.resolve("main")
  damage(repo, "refs/heads/main", 64)
  only_problem(repo, "ref", "`patchjax reflog` names it")
  last = Repo(repo.path).reflog("main")[0].new
  repo.files.write("refs/heads/main", f"{last}\n".encode())
  assert fsck(repo).ok
  assert repo.resolve("main") == tip


def test_a_branch_without_a_reflog_is_mended_with_what_dangles(repo):
  tip = repo.resolve("main")
  shutil.rmtree(repo.files.path("logs"))
  damage(repo, "refs/heads/main", 64)
  only_problem(repo, "ref", "dangling commits")
  [found] = [d for d in fsck(repo).dangling if d.startswith("commit ")]
  repo.files.write("refs/heads/main", f"{found[7:]}\n".encode())
  assert fsck(repo).ok
  assert repo.resolve("main") == tip


@pytest.mark.parametrize("again", [False, True])
def test_a_note_is_attached_again(repo, again):
  repo.annotate("main", "verdict", {"good": True})
  key = f"refs/notes/{repo.resolve('main')}"
  damage(repo, key, 64)
  only_problem(repo, "ref", "attach the note again")
  [found] = [d for d in fsck(repo).dangling if d.startswith("note ")]
  repo.files.delete(key)
  if again:
    repo.annotate("main", "verdict", {"good": True})
  else:
    repo.files.write(key, f"{found[5:]}\n".encode())
  assert fsck(repo).ok
  [note] = repo.annotations("main", "verdict")
  assert note["payload"] == {"good": True}


def test_a_remote_branch_is_fetched_again(repo, spare):
  repo.add_remote("origin", spare.path)
  repo.fetch()
  key = "refs/remotes/origin/main"
  damage(repo, key, 64)
  only_problem(repo, "ref", "fetch")
  repo.files.delete(key)
  Repo(repo.path).fetch()
  assert fsck(repo).ok
  assert repo.files.exists(key)


def test_a_reflog_entry_is_removed(repo):
  key = f"logs/heads/main/{repo.files.names('logs/heads/main')[0]}"
  repo.files.write(key, b"{")
  problem = only_problem(repo, "reflog", "remove the file")
  assert problem.where == key
  with pytest.raises(errors.IntegrityError, match="remove the file"):
    Repo(repo.path).gc()
  repo.files.delete(key)
  assert fsck(repo).ok
  Repo(repo.path).gc()


def object_key(name):
  return f"objects/{name[:2]}/{name[2:]}"


def test_a_tree_comes_back_with_the_same_value(repo):
  key = object_key(repo.show("main").tree)
  damage(repo, key)
  problem = only_problem(repo, "object", "committing the same value again")
  assert problem.where == key
  repo.files.delete(key)
  assert "is missing" in only_problem(repo, "object", "same value").what
  again = Repo(repo.path)
  again.commit({"x": TUNED}, message="same", branch="mend", parents=[])
  assert fsck(repo).ok
  assert np.array_equal(Repo(repo.path).checkout("main")["x"], TUNED)


def test_a_commit_is_copied_from_another_copy(repo, spare):
  key = object_key(repo.resolve("main~1"))
  damage(repo, key)
  only_problem(repo, "object", "another copy of the repository")
  repo.files.delete(key)
  repo.files.write(key, spare.files.read(key))
  assert fsck(repo).ok


def test_a_stranger_is_moved_out(repo):
  repo.files.write("objects/ab/notes.txt", b"mine")
  only_problem(repo, "object", "out of the repository")
  repo.files.delete("objects/ab/notes.txt")
  assert fsck(repo).ok


def test_what_a_killed_gc_took_is_put_back_by_gc(repo):
  name = repo.show("main").tree
  taken = f"objects/{name[:2]}/.tmp-gc-{'0' * 32}-{name[2:]}"
  os.rename(repo.files.path(object_key(name)), repo.files.path(taken))
  only_problem(repo, "object", "run gc")
  Repo(repo.path).gc()
  assert fsck(repo).ok


def test_settings_are_made_anew(repo, spare):
  repo.add_remote("origin", spare.path)
  repo.files.write("config.json", b'{"version": 1, "remotes": []}')
  only_problem(repo, "settings", "add the remotes again")
  repo.files.delete("config.json")
  repo.add_remote("origin", spare.path)
  assert fsck(repo).ok


@pytest.mark.parametrize("complete", [False, True])
def test_where_a_history_was_cut_is_written_down_again(
  repo, tmp_path, complete
):
  clone = Repo.clone(repo.path, tmp_path / "clone", depth=1)
  assert fsck(clone).ok
  before = clone.files.read("shallow")
  clone.files.write("shallow", before[:-2] + b"?\n")
  problems = fsck(clone).problems
  assert {problem.kind for problem in problems} == {"settings", "object"}
  assert "--complete" in problems[0].repair
  if complete:
    clone.files.delete("shallow")
    Repo(clone.path).fetch(complete=True)
    assert Repo(clone.path).log()[-1].title == "start"
  else:
    clone.files.write("shallow", before)
  assert fsck(clone).ok


@pytest.mark.parametrize("ref", ["main", "main~1"])
def test_a_payload_is_copied_from_another_copy(repo, spare, ref):
  pack = place_of(repo, ref).pack
  largest = max(files_below(repo.files.path(pack)), key=os.path.getsize)
  damage(repo, os.path.relpath(largest, repo.path), 200)
  problems = fsck(repo).problems
  assert {problem.kind for problem in problems} <= {"leaf", "index"}
  assert all("another copy" in problem.repair for problem in problems)
  repo.files.delete(pack)
  source, target = spare.files.path(pack), repo.files.path(pack)
  copy = shutil.copytree if os.path.isdir(source) else shutil.copy
  copy(source, target)
  assert fsck(repo).ok


@pytest.mark.parametrize("quick", [False, True])
def test_a_version_comes_back_when_its_value_is_committed(repo, quick):
  """The base is gone: what is stored of the other version is no use."""
  pack = place_of(repo, "main~1").pack
  repo.files.delete(pack)
  problems = fsck(repo, quick=quick).problems
  assert [problem.kind for problem in problems] == ["leaf", "leaf"]
  assert all("commit a good copy" in problem.repair for problem in problems)
  again = Repo(repo.path)
  again.commit({"x": TUNED}, message="again", branch="again", parents=[])
  assert np.array_equal(Repo(repo.path).checkout("main")["x"], TUNED)
  # What is left of the first copy is read no more.
  kinds = {problem.repair for problem in fsck(repo, quick=quick).problems}
  assert kinds <= {fsck_run._REPAIR_PACK, fsck_run._REPAIR_COPY}
  again.commit({"x": LARGE}, message="again", branch="first", parents=[])
  assert fsck(repo).ok
  assert np.array_equal(Repo(repo.path).checkout("main~1")["x"], LARGE)


def test_a_damaged_index_is_moved_out_and_the_values_committed(repo):
  pack = place_of(repo, "main~1").pack
  damage(repo, f"{pack}/{index.INDEX}", 40)
  assert {p.kind for p in fsck(repo).problems} == {"index", "leaf"}
  repo.files.delete(pack)
  for name, x in {"a": LARGE, "b": TUNED}.items():
    Repo(repo.path).commit({"x": x}, message=name, branch=name, parents=[])
  assert fsck(repo).ok


def test_a_damaged_copy_is_moved_out(repo):
  pack = place_of(repo, "main~1").pack
  copy = "payloads/" + "0" * 32
  shutil.copytree(repo.files.path(pack), repo.files.path(copy))
  shutil.rmtree(repo.files.path(f"{copy}/state"))
  assert np.array_equal(Repo(repo.path).checkout("main")["x"], TUNED)
  only_problem(repo, "leaf", "another place holds the leaf")
  repo.files.delete(copy)
  assert fsck(repo).ok


def test_quick_reads_no_bits(repo):
  pack = place_of(repo, "main~1").pack
  for path in files_below(repo.files.path(f"{pack}/state")):
    open(path, "wb").close()
  assert not fsck(repo).ok
  report = fsck(repo, quick=True)
  assert report.ok and report.quick
  assert "not read" in str(report)


def test_what_the_reflog_holds_does_not_dangle(repo):
  repo.commit({"x": LARGE + 1}, message="lost")
  repo.reset("main~1")
  assert fsck(repo).dangling == ()
  shutil.rmtree(repo.files.path("logs"))
  report = fsck(repo)
  assert report.ok
  kinds = {what.split()[0].split("/")[0] for what in report.dangling}
  assert kinds == {"commit", "tree", "payloads"}


def test_a_move_that_never_came_is_no_problem(repo):
  """Killed between the entry of the reflog and the objects it names."""
  [name, *_] = repo.files.names("logs/heads/main")
  entry = json.loads(repo.files.read(f"logs/heads/main/{name}"))
  entry |= {"old": repo.resolve("main"), "new": "0" * 64}
  key = f"logs/heads/main/9{name[1:]}"
  repo.files.write(key, json.dumps(entry).encode())
  assert fsck(repo).ok
  Repo(repo.path).gc(grace=0)
  assert fsck(repo).ok


def test_what_killed_writers_left_is_listed(repo):
  open(repo.files.path("objects/.tmp-1-x"), "w").close()
  os.makedirs(repo.files.path("payloads/1.orbax-checkpoint-tmp"))
  os.makedirs(repo.files.path("payloads/2/state"))  # no index yet
  report = fsck(repo)
  assert report.ok
  assert len(report.leftovers) == 3


def test_leaves_are_verified_in_batches(repo, monkeypatch):
  """No more than a batch is in memory, whatever the size of the repository."""
  for i in range(4):
    value = {"x": RNG.standard_normal((200, 300)).astype(np.float32)}
    repo.commit(value, message=f"{i}", branch=f"b{i}", parents=[])
  sizes = []
  real = fsck_run.FsckRun._verify

  def verify(self, batch):
    sizes.append(sum(entry.size * 4 for entry in batch.values()))
    return real(self, batch)

  monkeypatch.setattr(fsck_run.FsckRun, "_verify", verify)
  monkeypatch.setattr(verifying, "BATCH", 2 * LARGE.nbytes)
  assert fsck(repo).ok
  assert len(sizes) == 3
  assert max(sizes) <= 2 * LARGE.nbytes


@pytest.mark.parametrize("shape", [(640, 1024), (3, 500_000), (1_500_000,)])
def test_a_leaf_larger_than_a_batch_is_verified_in_parts(
  repo, monkeypatch, shape
):
  x = RNG.standard_normal(shape).astype(np.float32)
  repo.commit({"x": x}, message="large", branch="large", parents=[])
  y = x * np.float32(1.0001)
  repo.commit({"x": y}, message="tuned", branch="large")
  monkeypatch.setattr(verifying, "BATCH", 2 << 20)
  whole = []
  real = reading.LeafReader.verify

  def verify(self, entries):
    whole.extend(entries)
    return real(self, entries)

  monkeypatch.setattr(reading.LeafReader, "verify", verify)
  assert fsck(repo).ok
  digests = {repo.tree(ref)["x"].digest for ref in ("large", "large~1")}
  assert not digests & set(whole)
  pack = place_of(repo, "large").pack
  largest = max(files_below(repo.files.path(pack)), key=os.path.getsize)
  damage(repo, os.path.relpath(largest, repo.path), 100_000)
  problem = only_problem(repo, "leaf", "another copy")
  assert repo.resolve("large")[:12] in problem.where
