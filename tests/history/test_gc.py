"""gc: what nothing reaches goes; what anything reaches, or may, stays."""

import json
import os
import shutil
import time
import uuid

import jax
import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import index
from patchjax.history.upkeep import bins
from patchjax.trees import dtypes, errors
from tests.history.accidents import files_below, flip

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)
WEEK = 7 * 86400.0


def params(seed):
  """A value of a checkpoint of its own: no leaf is shared."""
  rng = np.random.default_rng(seed)
  return {"x": rng.standard_normal((200, 300)).astype(np.float32)}


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    repo.commit({"x": LARGE}, message="start")
    yield repo


def age(repo, seconds=3 * WEEK):
  """Makes everything as old as if written long ago."""
  then = time.time() - seconds
  for path in files_below(repo.path):
    os.utime(path, (then, then))


def lose(repo, branch):
  """Removes a branch and all memory of it."""
  repo.files.delete(f"refs/heads/{branch}")
  shutil.rmtree(repo.files.path(f"logs/heads/{branch}"), ignore_errors=True)


def lost_branch(repo, value, name="lost"):
  repo.branch(name)
  commit = repo.commit(value, message=name, branch=name)
  lose(repo, name)
  return commit


def kinds(report):
  return sorted(item.kind for item in report.removed)


def check(repo, *refs):
  fresh = Repo(repo.path)
  report = fresh.fsck()
  assert report.ok, str(report)
  for ref in refs:
    fresh.checkout(ref)
  return report


def test_what_is_reachable_stays_pushed_or_not(repo):
  """git-theta deletes models that were never pushed, and calls that fine."""
  for i in range(3):
    repo.branch(f"unpushed{i}")
    repo.commit(params(i), message="work", branch=f"unpushed{i}")
  repo.tag("v1", "unpushed0")
  age(repo, 1000 * WEEK)
  before = files_below(repo.path)
  report = repo.gc(grace=0, expire=0)
  assert report.bytes == 0 or set(kinds(report)) == {"reflog"}
  gone = set(before) - set(files_below(repo.path))
  assert all("/logs/" in path for path in gone)
  for i in range(3):
    found = Repo(repo.path).checkout(f"unpushed{i}")
    assert np.array_equal(found["x"], params(i)["x"])


def test_what_nothing_reaches_goes(repo):
  lost_branch(repo, params(1))
  age(repo)
  report = repo.gc()
  assert kinds(report) == ["commit", "payload", "tree"]
  assert report.bytes > 200_000
  assert check(repo, "main").dangling == ()
  assert repo.gc().removed == ()


def test_a_dry_run_touches_nothing(repo):
  lost_branch(repo, params(1))
  age(repo)
  before = files_below(repo.path)
  would = repo.gc(dry_run=True)
  assert [p for p in files_below(repo.path) if "/cache/" not in p] == [
    p for p in before if "/cache/" not in p
  ]
  assert "would remove 1 commit, 1 payload, 1 tree" in str(would)
  done = repo.gc()
  assert would.removed == done.removed
  assert json.loads(json.dumps(done.to_json()))["bytes"] == done.bytes


def test_what_is_young_stays_whole(repo):
  commit = lost_branch(repo, params(1))
  age(repo, WEEK)
  assert repo.gc().removed == ()
  repo.branch("found", at=commit)
  check(repo, "found")
  lose(repo, "found")
  # An old parent of a young commit stays for its sake.
  old = lost_branch(repo, params(2), "old")
  age(repo)
  repo.commit(params(3), message="young", branch="young", parents=[old])
  lose(repo, "young")
  repo.gc()
  repo.branch("found", at=old)
  check(repo, "found")


def test_no_grace_takes_what_is_new(repo):
  lost_branch(repo, params(1))
  assert kinds(repo.gc(grace=0)) == ["commit", "payload", "tree"]
  check(repo, "main")


def test_bases_of_differences_stay(repo):
  """The version is gone; its leaf is still what another one is a change of."""
  base = lost_branch(repo, params(1), "base")
  tuned = {"x": params(1)["x"] * np.float32(1.0001)}
  repo.commit(tuned, message="tuned", branch="tuned", parents=[base])
  tree = repo.tree("tuned")
  repo.index.refresh()
  [place] = repo.index.find([tree["x"].digest])[tree["x"].digest]
  assert place.base is not None
  repo.commit(tuned, message="squashed", branch="squashed", parents=[])
  lose(repo, "tuned")
  age(repo)
  report = repo.gc()
  assert kinds(report) == ["commit", "commit", "tree"]
  found = Repo(repo.path).checkout("squashed")
  assert np.array_equal(found["x"], tuned["x"])
  check(repo)
  lose(repo, "squashed")
  age(repo)
  assert kinds(repo.gc()) == ["commit", "payload", "payload", "tree"]


def test_notes_go_with_their_commit(repo):
  commit = lost_branch(repo, params(1))
  repo.annotate(commit, "verdict", {"good": True})
  repo.annotate(commit, "verdict", {"good": False})
  repo.annotate("main", "verdict", {"good": True})
  age(repo)
  assert kinds(repo.gc()).count("note") == 3
  assert len(repo.annotations("main")) == 1
  assert repo.files.names("refs/notes") == [repo.resolve("main")]
  check(repo)


def test_a_patch_file_stays_with_its_commit(repo, tmp_path):
  import patchjax as pj

  patch = pj.diff({"x": LARGE}, params(1))
  kept = repo.commit(patch, message="patch", on="main")
  age(repo)
  assert kinds(repo.gc()) == []
  assert repo.patch_of(kept) is not None


def entry(repo, old, new, seconds, branch="main"):
  stamp = f"{time.time_ns() - int(seconds * 1e9):020}-{uuid.uuid4().hex}"
  what = {"ref": f"refs/heads/{branch}", "old": old, "new": new}
  what |= {"who": "a", "when": "", "why": "reset"}
  data = json.dumps(what).encode()
  repo.files.write(f"logs/heads/{branch}/{stamp}", data)


def test_the_reflog_holds_what_it_names_until_it_expires(repo):
  main = repo.resolve("main")
  young, old = (lost_branch(repo, params(i), f"b{i}") for i in range(2))
  entry(repo, young, main, 10 * WEEK)
  entry(repo, old, main, 20 * WEEK)
  # A branch that was removed has a log too.
  gone = lost_branch(repo, params(2), "b2")
  entry(repo, gone, None, WEEK, branch="gone")
  # Killed before anything of its commit was written.
  entry(repo, main, "0" * 64, WEEK)
  age(repo)
  report = repo.gc()
  assert kinds(report).count("commit") == 1
  assert kinds(report).count("reflog") == 1
  check(repo, young, gone)
  with pytest.raises(errors.RepositoryError):
    repo.checkout(old)
  assert kinds(repo.gc(expire=0)).count("commit") == 2
  check(repo)


def test_a_commit_that_was_written_in_part_is_no_obstacle(repo):
  """Killed between the entry of the reflog, the commit, and its trees."""
  commit = lost_branch(repo, params(1))
  entry(repo, repo.resolve("main"), commit, 1)
  tree = repo.show(commit).tree
  repo.files.delete(f"objects/{tree[:2]}/{tree[2:]}")
  age(repo)
  assert kinds(Repo(repo.path).gc()) == ["payload"]
  check(repo, "main")
  assert kinds(Repo(repo.path).gc(expire=0)).count("commit") == 1


def test_a_patch_file_stays_while_leaves_are_read_from_it(repo):
  """A leaf held as factors outlives the commit that brought the factors."""
  import patchjax as pj

  rng = np.random.default_rng(1)
  base = {"w": rng.standard_normal((256, 256)).astype(np.float32)}
  patch = pj.tuning.lora(jax.random.key(0), base, rank=2)
  values, rebuild = pj.trainable(patch)
  patch = rebuild(jax.tree.map(lambda x: x + np.float32(0.1), values))
  root = repo.commit(base, message="base", branch="base", parents=[])
  tuned = repo.commit(patch, message="patch", branch="base", on=root)
  value = repo.checkout(tuned)
  repo.index.refresh()
  [place] = repo.index.find([repo.tree(tuned)["w"].digest]).popitem()[1]
  assert place.encoding == "factors"
  repo.commit(value, message="value", branch="value", parents=[root])
  assert repo.show("value").patch is None
  lose(repo, "base")
  age(repo)
  assert kinds(repo.gc()) == ["commit"]
  found = Repo(repo.path).checkout("value")
  assert np.array_equal(found["w"], value["w"])
  assert check(repo).dangling == ()


def test_what_is_read_from_a_lost_pack_stays(repo, monkeypatch):
  """A leaf of a lost version, used again in a value of its own."""
  lost_branch(repo, params(1))
  age(repo)
  real = bins.LocalBin.remove
  commits = []

  def racing(bin_, key, **options):
    if not commits:
      value = {**params(1), "more": np.float32(1)}
      again = {"message": "again", "branch": "again", "parents": ["main"]}
      commits.append(Repo(repo.path).commit(value, **again))
    return real(bin_, key, **options)

  monkeypatch.setattr(bins.LocalBin, "remove", racing)
  assert kinds(repo.gc()) == ["commit", "tree"]
  assert np.array_equal(Repo(repo.path).checkout("again")["x"], params(1)["x"])
  check(repo)


def test_a_remote_tracking_ref_holds_its_commit(repo):
  commit = lost_branch(repo, params(1))
  repo.files.write("refs/remotes/origin/main", f"{commit}\n".encode())
  age(repo)
  assert kinds(repo.gc()) == []


def copy_pack(repo, generation=1):
  """Repacks the only payload as it is."""
  [pack] = repo.index.packs()
  copy = f"payloads/{uuid.uuid4().hex}"
  shutil.copytree(repo.files.path(pack), repo.files.path(copy))
  document = json.loads(repo.files.read(f"{pack}/{index.INDEX}"))
  index.write(repo.files, copy, document["entries"], generation=generation)
  return pack, copy


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("old", [False, True])
def test_of_two_places_the_repacked_one_stays(repo, generation, old):
  pack, copy = copy_pack(repo, generation)
  if old:
    age(repo)
  report = repo.gc()
  assert [(item.kind, item.key) for item in report.removed] == [
    ("superseded", pack)
  ]
  assert repo.index.packs() == [copy]
  check(repo, "main")


def test_a_damaged_copy_supersedes_nothing(repo):
  pack, copy = copy_pack(repo)
  shutil.rmtree(repo.files.path(f"{copy}/state"))
  report = repo.gc()
  assert report.removed == ()
  assert len(report.damaged) == 1
  assert "run fsck" in str(report)
  assert np.array_equal(Repo(repo.path).checkout()["x"], LARGE)
  shutil.rmtree(repo.files.path(copy))
  assert check(repo, "main")
  assert repo.index.packs() == [pack]


def test_who_was_about_to_read_the_old_copy_reads_the_new_one(
  repo, monkeypatch
):
  pack, _ = copy_pack(repo)
  reader = Repo(repo.path)
  # The old copy is the best known, and goes when the plan is made.
  reader.index.refresh()
  real, calls = index.Index.refresh, []

  def refresh(self):
    if not calls:
      calls.append(repo.gc())
    else:
      real(self)

  places = reader.index.find([repo.tree()["x"].digest]).popitem()[1]
  assert pack in {place.pack for place in places}
  tree = reader.tree()
  monkeypatch.setattr(index.Index, "refresh", refresh)
  monkeypatch.setattr(repo.index, "refresh", lambda: real(repo.index))
  assert np.array_equal(
    dtypes.from_words(reader.reader.read(tree)["x"], "float32"), LARGE
  )
  assert [item.key for item in calls[0].removed] == [pack]


def test_nothing_goes_while_something_needed_is_damaged(repo):
  lost_branch(repo, params(1))
  age(repo)
  tree = repo.show().tree
  path = repo.files.path(f"objects/{tree[:2]}/{tree[2:]}")
  before = files_below(repo.path)
  flip(path, 5)
  with pytest.raises(errors.IntegrityError, match=f"{tree} is damaged"):
    Repo(repo.path).gc()
  flip(path, 5)
  pack = repo.index.packs()[0]
  flip(repo.files.path(f"{pack}/{index.INDEX}"), 40)
  with pytest.raises(errors.IntegrityError, match=pack):
    Repo(repo.path).gc()
  assert set(before) <= set(files_below(repo.path))


def test_a_missing_payload_does_not_stop_gc(repo):
  repo.commit(params(1), message="next")
  lost_branch(repo, params(2))
  repo.index.refresh()
  [place] = repo.index.find([repo.tree()["x"].digest]).popitem()[1]
  shutil.rmtree(repo.files.path(place.pack))
  age(repo)
  assert kinds(repo.gc()) == ["commit", "payload", "tree"]
  repo.checkout("main~1")


def test_leftovers_of_killed_writers_go_when_they_are_old(repo):
  repo.files.write("objects/.tmp-1-x", b"")
  for key in ("payloads/1.orbax-checkpoint-tmp/x", "payloads/2/state/x"):
    repo.files.write(key, b"")
  repo.files.write("refs/heads/main.__lock", b"")
  assert repo.gc().removed == ()
  age(repo)
  for name in ("payloads", "payloads/2", "payloads/2/state"):
    os.utime(repo.files.path(name), (0, 0))
  os.utime(repo.files.path("payloads/1.orbax-checkpoint-tmp"), (0, 0))
  report = repo.gc()
  assert kinds(report) == ["leftover"] * 4
  assert check(repo).leftovers == ()
  repo.commit(params(1), message="goes on")


class Died(BaseException):
  """Stands for the end of the process."""


def test_death_anywhere_in_gc_leaves_everything_whole(
  repo, monkeypatch, tmp_path
):
  """Killed before any of its operations: whole, and the next gc finishes."""
  commit = lost_branch(repo, params(1))
  repo.annotate(commit, "verdict", {"good": True})
  lost_branch(repo, {"b": np.float32([1, 2])}, "blob")
  repo.files.write("objects/.tmp-1-x", b"")
  age(repo)
  deaths = 0
  finished = False
  while not finished:
    fresh = Repo(shutil.copytree(repo.path, tmp_path / str(deaths)))
    lives = iter(range(deaths))

    def dying(real, lives=lives):
      def call(*args, **kwargs):
        if next(lives, None) is None:
          raise Died
        return real(*args, **kwargs)

      return call

    with monkeypatch.context() as patched:
      for name in ("rename", "unlink", "rmdir"):
        patched.setattr(os, name, dying(getattr(os, name)))
      try:
        fresh.gc()
        finished = True
      except Died:
        deaths += 1
    check(fresh, "main")
    # What can still be found is found whole.
    if fresh.files.exists(f"objects/{commit[:2]}/{commit[2:]}"):
      fresh.branch("found", at=commit)
      check(fresh, "found")
      lose(fresh, "found")
    fresh.gc(grace=0)
    report = check(fresh, "main")
    assert report.dangling == report.leftovers == ()
  assert deaths > 20


def test_what_was_being_removed_is_put_back_if_it_is_whole(repo):
  [pack] = repo.index.packs()
  trash = f"payloads/{bins._REMOVED}{'0' * 32}-{pack[9:]}"
  os.rename(repo.files.path(pack), repo.files.path(trash))
  with pytest.raises(errors.IntegrityError):
    Repo(repo.path).checkout()
  repo.gc()
  assert np.array_equal(Repo(repo.path).checkout()["x"], LARGE)


def test_who_freshens_in_time_gets_it_back(repo, monkeypatch):
  """A writer that finds the value stored, at the worst moment."""
  lost_branch(repo, params(1))
  age(repo)
  real = bins.LocalBin.remove
  commits = []

  def racing(bin_, key, **options):
    if not commits:  # everything is decided; nothing is gone yet
      commits.append(
        Repo(repo.path).commit(
          params(1), message="again", branch="again", parents=["main"]
        )
      )
    return real(bin_, key, **options)

  monkeypatch.setattr(bins.LocalBin, "remove", racing)
  report = repo.gc()
  assert kinds(report) == ["commit"]
  assert np.array_equal(Repo(repo.path).checkout("again")["x"], params(1)["x"])
  check(repo)


def test_who_names_a_lost_commit_in_time_gets_all_of_it(repo, monkeypatch):
  commit = lost_branch(repo, params(1))
  repo.annotate(commit, "verdict", {"good": True})
  age(repo)
  real = bins.LocalBin.remove

  def racing(bin_, key, **options):
    if "found" not in repo.branches():
      Repo(repo.path).branch("found", at=commit)
    return real(bin_, key, **options)

  monkeypatch.setattr(bins.LocalBin, "remove", racing)
  assert repo.gc().removed == ()
  check(repo, "found")
  assert len(repo.annotations("found")) == 1


def test_who_comes_too_late_is_told(repo):
  commit = lost_branch(repo, params(1))
  fresh = Repo(repo.path)
  fresh.show(commit)
  age(repo)
  repo.gc()
  with pytest.raises(errors.RepositoryError):
    fresh.branch("found", at=commit)
  with pytest.raises(errors.RepositoryError):
    fresh.annotate(commit, "verdict", {})
  assert "found" not in fresh.branches()
  # A value is simply written again.
  fresh.commit(params(1), message="again")
  check(repo, "main")


def test_one_gc_at_a_time(repo):
  from patchjax.history.upkeep import gc

  with gc._alone(repo.files):
    with pytest.raises(errors.RepositoryError, match="another gc"):
      repo.gc()
  repo.gc()


def test_bad_ages_are_refused(repo):
  with pytest.raises(errors.RepositoryError, match="grace"):
    repo.gc(grace=-1)
  with pytest.raises(errors.RepositoryError, match="expire"):
    repo.gc(expire=float("nan"))


@pytest.fixture
def bucket():
  """A repository in a store without times, with a branch that was removed."""
  repo = Repo.init(f"memory://bucket/{uuid.uuid4().hex}")
  repo.commit({"b": np.float32([1])}, message="start")
  lost = lost_small(repo)
  assert repo.files.exists(f"objects/{lost[:2]}/{lost[2:]}")
  return repo


def lost_small(repo, seed=2):
  repo.branch("lost")
  value = {"b": np.float32([seed])}
  lost = repo.commit(value, message="lost", branch="lost")
  repo.branch("lost", delete=True, force=True)
  repo.files.delete("logs/heads/lost")
  return lost


def test_a_bucket_gives_back_what_could_go_a_grace_ago(bucket, monkeypatch):
  start = time.time()
  assert bucket.gc().removed == ()
  monkeypatch.setattr(time, "time", lambda: start + WEEK)
  young = lost_small(bucket, 3)
  assert bucket.gc().removed == ()
  assert bucket.gc(dry_run=True, grace=WEEK / 2).removed
  monkeypatch.setattr(time, "time", lambda: start + 2.5 * WEEK)
  assert kinds(bucket.gc()) == ["blob", "commit", "tree"]
  # What was first seen a week later has a week to go.
  assert Repo(bucket.path).show(young).title == "lost"
  assert check(bucket, "main", young)
  monkeypatch.setattr(time, "time", lambda: start + 3.5 * WEEK)
  assert kinds(bucket.gc()) == ["blob", "commit", "tree"]
  assert check(bucket, "main").dangling == ()


def test_what_is_found_again_in_a_bucket_starts_anew(bucket, monkeypatch):
  start = time.time()
  bucket.gc()
  [lost] = [d for d in bucket.fsck().dangling if d.startswith("commit ")]
  bucket.branch("found", at=lost.removeprefix("commit "))
  monkeypatch.setattr(time, "time", lambda: start + 3 * WEEK)
  assert bucket.gc().removed == ()
  bucket.branch("found", delete=True, force=True)
  bucket.files.delete("logs/heads/found")
  assert bucket.gc().removed == ()
  assert kinds(bucket.gc(grace=0)) == ["blob", "commit", "tree"]
  check(bucket, "main")
