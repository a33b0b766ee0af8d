"""clone, fetch, pull, push between folders: once, verified, nothing lost."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import patchjax as pj
from patchjax.cli.app import patchjax
from patchjax.history import Repo
from patchjax.history.remotes import pushing
from patchjax.history.storage import local
from patchjax.history.storage.refs import HEADS, REMOTES
from patchjax.trees.errors import (
  ConflictError,
  FormatError,
  IntegrityError,
  NotARepositoryError,
  RefNotFoundError,
  RepositoryError,
  SelectionError,
)
from tests.history.remote_cases import (
  bytes_of,
  equal,
  history,
  same,
  tuned,
  value,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return history(tmp_path_factory.mktemp("made") / "repo")


@pytest.fixture
def repo(made, tmp_path):
  shutil.copytree(made.path, tmp_path / "repo")
  return Repo(tmp_path / "repo")


@pytest.fixture
def ours(repo, tmp_path):
  return Repo.clone(repo.path, tmp_path / "ours")


def test_a_clone_has_everything(repo, ours):
  assert ours.branches() == {"main": repo.resolve("main")}
  assert ours.tags() == repo.tags()
  for ref in ("main", "main~2", "v1"):
    assert same(repo, ours, ref)
  assert same(repo, ours, "dev", "origin/dev")
  assert ours.annotations("main") == repo.annotations("main")
  assert ours.remotes()["origin"].url == repo.path
  report = ours.fsck()
  assert report.ok and not report.dangling, str(report)
  assert bytes_of(ours) == bytes_of(repo)


def test_what_is_there_is_not_copied_again(repo, ours):
  nothing = {"objects": 0, "packs": 0, "files": 0, "bytes": 0, "commits": 0}
  assert ours.fetch().to_json()["copied"] == nothing
  assert ours.push().to_json()["copied"] == nothing
  before = bytes_of(repo)
  ours.commit(tuned(ours.checkout(), "layer2"), message="more")
  pushed = ours.push()
  assert pushed.copied.commits == 1 and pushed.copied.packs == 1
  assert bytes_of(repo) - before == pushed.copied.bytes
  assert same(repo, ours) and repo.fsck().ok
  assert ours.refs.get(REMOTES, "origin/main") == ours.resolve("main")
  assert ours.push().copied.bytes == 0


def test_only_what_is_pushed_goes_along(repo, tmp_path):
  backup = Repo.init(tmp_path / "backup")
  repo.push(backup.path, ["main"])
  assert list(backup.branches()) == ["main"] and not backup.tags()
  assert not backup.fsck().dangling
  assert len(backup.log()) == 4
  lacking = repo.resolve("dev")
  with pytest.raises(RefNotFoundError):
    backup.resolve(lacking)
  repo.push(backup.path, ["dev"], tags=True)
  assert same(repo, backup, "dev") and same(repo, backup, "v1")


def test_push_works_after_merge_commits(repo, ours):
  mean = pj.merging.linear()
  ours.branch("dev", "origin/dev")
  ours.merge("main", "dev", method=mean)
  ours.branch("more", "main~1")
  ours.commit(value(5), message="more", branch="more")
  ours.merge("main", "more", method=mean)
  ours.push()
  assert len(repo.show().parents) == 2
  assert same(repo, ours) and repo.fsck().ok


def test_nobody_elses_push_is_lost(repo, ours, tmp_path):
  theirs = Repo.clone(repo.path, tmp_path / "theirs")
  theirs.commit(value(7), message="theirs", author="Duck")
  theirs.push()
  ours.commit(value(8), message="ours", author="Fid")
  with pytest.raises(ConflictError) as refused:
    ours.push()
  assert "Duck" in str(refused.value) and "Fid" in str(refused.value)
  assert "patchjax pull" in str(refused.value)
  with pytest.raises(ConflictError, match="expected") as refused:
    ours.push(force=True)  # it moved since it was last looked at
  assert repo.resolve("main") == theirs.resolve("main")
  with pytest.raises(ConflictError, match="say how to merge"):
    ours.pull()
  merged = ours.pull(method=pj.merging.linear())
  assert set(ours.show(merged).parents) == {
    theirs.resolve("main"),
    ours.resolve("main~1"),
  }
  ours.push()
  assert theirs.pull() == merged and same(repo, theirs)
  assert repo.fsck().ok


def test_force_drops_what_was_seen(repo, ours):
  ours.reset("main~1")
  with pytest.raises(ConflictError, match="does not lead to yours"):
    ours.push()
  ours.push(force=True)
  assert repo.resolve("main") == ours.resolve("main")
  assert repo.show("main@{1}").title == "step 3"  # and is in the log there


def test_a_race_for_a_branch_has_one_winner(repo, ours, tmp_path, monkeypatch):
  theirs = Repo.clone(repo.path, tmp_path / "theirs")
  ours.commit(value(8), message="ours")
  theirs.commit(value(7), message="theirs")
  real = pushing._notes

  def slow(*args):
    monkeypatch.setattr(pushing, "_notes", real)
    theirs.push()  # somebody is faster between the check and the swap
    real(*args)

  monkeypatch.setattr(pushing, "_notes", slow)
  with pytest.raises(ConflictError, match="somebody else pushed"):
    ours.push()
  assert repo.resolve("main") == theirs.resolve("main")
  assert ours.refs.get(REMOTES, "origin/main") != ours.resolve("main")


def test_tags_never_move(repo, ours):
  repo.tag("late", "main")
  ours.tag("late", "main~1")
  with pytest.raises(ConflictError, match="tags never move"):
    ours.push(branches=["late"], force=True)
  fetched = ours.fetch()
  assert fetched.clashes == {"late": repo.resolve("late")}
  assert ours.resolve("late") == ours.resolve("main~1")
  repo.tag("v2", "dev")
  assert ours.fetch().tags == {"v2": repo.resolve("dev")}


def test_nothing_unpushed_is_lost_by_gc(repo, ours):
  ours.commit(value(7), message="not pushed")
  ours.branch("mine")
  ours.commit(value(8), message="not pushed either", branch="mine")
  ours.push()
  repo.commit(value(9), message="not fetched")
  ours.fetch()
  for each in (ours, repo):
    each.gc(grace=0)
    assert each.fsck().ok
  assert equal(ours.checkout("mine"), value(8))
  assert equal(ours.checkout("origin/main"), value(9))
  assert equal(ours.checkout("main"), value(7))


def test_notes_of_both_sides_are_kept(repo, ours):
  ours.annotate("main", "verdict", {"from": "ours"})
  repo.annotate("main", "verdict", {"from": "theirs"})
  ours.push()
  ours.fetch()
  for each in (ours, repo):
    found = [note["payload"] for note in each.annotations("main")]
    assert sorted(map(str, found)) == sorted(
      map(str, [{"accepted": True}, {"from": "ours"}, {"from": "theirs"}])
    )
    assert each.fsck().ok
  assert ours.fetch().copied.bytes == 0


def test_chains_of_two_repositories_make_no_loop(tmp_path):
  """One holds b as a difference to a, the other a as one to b."""
  a = value(leaves=1)
  b = tuned(a, "layer0")
  one, two = Repo.init(tmp_path / "one"), Repo.init(tmp_path / "two")
  for repo, values in ((one, (a, b)), (two, (b, a))):
    for i, each in enumerate(values):
      repo.commit(each, message=f"{i}")
  other = {**b, "new": {"kernel": value(3)["layer0"]["kernel"]}}
  one.commit(other, message="more")
  one.push(two.path, [one_branch(one, "side")])
  for ref, expected in (("side", other), ("side~1", b), ("side~2", a)):
    assert equal(two.checkout(ref), expected)
  assert two.fsck().ok, str(two.fsck())


def one_branch(repo, name):
  repo.branch(name)
  return name


@pytest.mark.parametrize("kind", ["object", "index", "blob", "data"])
def test_damage_is_not_spread(repo, tmp_path, kind):
  places = {
    "object": "objects/*/*",
    "index": "payloads/*/index.json",
    "blob": "blobs/*",
    "data": "payloads/*/state/**/d/*",
  }
  repo.commit({"w": np.arange(9.0)}, message="a blob")
  found = max(pathlib.Path(repo.path).glob(places[kind]), key=os.path.getsize)
  data = bytearray(found.read_bytes())
  data[len(data) // 2] ^= 1
  found.write_bytes(data)
  shutil.rmtree(pathlib.Path(repo.path, "cache"))
  with pytest.raises(IntegrityError):
    Repo.clone(repo.path, tmp_path / "ours", verify=kind == "data")
  ours = Repo(tmp_path / "ours")
  assert not ours.branches() and not ours.refs.all(REMOTES)


class Died(BaseException):
  """Stands for the end of the process: nothing may catch it and go on."""


@pytest.mark.parametrize("verb", ["push", "clone"])
def test_death_at_every_storage_operation(repo, tmp_path, monkeypatch, verb):
  """Nothing half-copied is ever visible; the next run goes on from there."""
  disk = types.SimpleNamespace(**vars(os))
  monkeypatch.setattr(local, "os", disk)
  operations = [(disk, name) for name in ("makedirs", "fsync", "replace")]
  operations += [(local.LocalFiles, "swap")]
  there = tmp_path / "there"
  deaths = 0
  while True:
    # Each run goes on where the last one ended, and lives a little longer.
    lives = iter(range(deaths))

    def dying(real, lives=lives):
      def call(*args, **kwargs):
        if next(lives, None) is None:
          raise Died
        return real(*args, **kwargs)

      return call

    with monkeypatch.context() as patched:
      for owner, name in operations:
        patched.setattr(owner, name, dying(getattr(owner, name)))
      try:
        if verb == "push":
          repo.push(there, ["main", "dev"], tags=True)
        else:
          Repo.clone(repo.path, there)
        break
      except Died:
        deaths += 1
    if (there / "patchjax.json").exists():
      report = Repo(there).fsck()
      assert report.ok, str(report)
    assert deaths < 200
  assert deaths > 15
  there = Repo(there)
  assert same(repo, there) and there.fsck().ok
  assert there.tags() == repo.tags()


_KILLED = """
import os, sys, threading
from patchjax.history import Repo

source, there, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
copied, lock = 0, threading.Lock()

def progress(what, done, total):
  if what == "bytes" and done >= most:
    os.kill(os.getpid(), 9)

verb = sys.argv[4]
if verb == "push":
  Repo(source).push(there, ["main", "dev"], tags=True, progress=progress)
else:
  Repo.clone(source, there, progress=progress)
"""


@pytest.mark.parametrize("verb", ["push", "clone"])
def test_kill_9_in_the_middle_costs_little(repo, tmp_path, verb):
  there = tmp_path / "there"
  total = bytes_of(repo)
  for share in (0.2, 0.5):
    most = str(int(total * share))
    done = subprocess.run(
      [sys.executable, "-c", _KILLED, repo.path, str(there), most, verb]
    )
    assert done.returncode == -9
    report = Repo(there).fsck()
    assert report.ok and report.counts["refs"] == 0, str(report)
  before = bytes_of(Repo(there))
  if verb == "push":
    copied = repo.push(there, ["main", "dev"], tags=True).copied
  else:
    Repo.clone(repo.path, there)
    copied = None
  assert same(repo, Repo(there)) and Repo(there).fsck().ok
  again = 0 if copied is None else copied.bytes + before - total
  # What was being written when it died, at most.
  assert again <= 0.5 * total
  assert before > 0.3 * total


def test_hundreds_of_small_tensors_start_no_process(tmp_path):
  program = """
import sys
import numpy as np
from patchjax.history import Repo

started = []
sys.addaudithook(
  lambda event, args: event in ("subprocess.Popen", "os.fork", "os.exec",
    "os.posix_spawn", "os.system") and started.append(event)
)
repo = Repo.init(sys.argv[1] + "/a")
x = {f"leaf{i}": np.full(3, i, np.float32) for i in range(500)}
repo.commit(x, message="500 leaves")
repo.push(sys.argv[1] + "/b")
copy = Repo.clone(sys.argv[1] + "/b", sys.argv[1] + "/c")
assert len(copy.checkout()) == 500
print(started)
"""
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert done.stdout == "[]\n", done.stderr


def test_a_partial_clone_has_the_leaves_asked_for(repo, tmp_path):
  ours = Repo.clone(repo.path, tmp_path / "ours", only="layer1/.*")
  assert bytes_of(ours) < 0.5 * bytes_of(repo)
  for ref in ("main", "main~1", "main~3", "v1"):
    assert equal(
      ours.checkout(ref, only="layer1/.*"),
      repo.checkout(ref, only="layer1/.*"),
    )
  report = ours.fsck()
  assert report.ok and report.counts["left out"], str(report)
  ours.gc(grace=0)
  assert ours.fsck().ok
  with pytest.raises(IntegrityError) as lacking:
    ours.checkout()
  assert repo.path in str(lacking.value)
  assert "patchjax fetch origin --only" in str(lacking.value)
  # Later fetches keep to it, more can be asked for, and all.
  repo.commit(tuned(repo.checkout(), "layer0", 50), message="more")
  assert ours.fetch().copied.packs == 0
  ours.fetch(only="layer0/.*")
  assert ours.remotes()["origin"].only == ("layer1/.*", "layer0/.*")
  assert same_leaves(ours, repo, "origin/main", only="layer[01]/.*")
  ours.fetch(complete=True)
  assert ours.remotes()["origin"].only is None
  assert same(repo, ours, "main", "origin/main") and ours.fsck().ok


def same_leaves(ours, repo, ref, only):
  return equal(ours.checkout(ref, only=only), repo.checkout("main", only=only))


def test_a_partial_clone_can_push(repo, tmp_path):
  ours = Repo.clone(repo.path, tmp_path / "ours", only="layer1/.*")
  patch = pj.diff(
    {"layer1": {"bias": np.zeros(4, np.float32)}},
    {"layer1": {"bias": np.ones(4, np.float32)}},
  )
  patch = patch.replace(base=None, structure=None)
  ours.commit(patch, message="patched")
  ours.push()
  assert repo.show().title == "patched" and repo.fsck().ok
  with pytest.raises(IntegrityError, match="partial clone"):
    ours.push(Repo.init(tmp_path / "empty").path)


def test_only_must_match_something(repo, tmp_path):
  with pytest.raises(SelectionError, match="layer0/bias"):
    Repo.clone(repo.path, tmp_path / "ours", only="nothing")
  with pytest.raises(SelectionError, match="no regex"):
    Repo.clone(repo.path, tmp_path / "ours", only="(")


def test_a_shallow_clone_ends_where_it_was_cut(repo, tmp_path):
  ours = Repo.clone(repo.path, tmp_path / "ours", depth=2)
  # Of main two; the third is within two of dev.
  assert [c.title for c in ours.log()] == ["step 3", "step 2", "step 1"]
  assert [c.title for c in ours.log("origin/dev")] == ["try", "step 1"]
  assert same(repo, ours) and same(repo, ours, "main~1")
  assert ours.tags() == repo.tags()  # it is within the two
  assert ours.fsck().ok
  ours.gc(grace=0)
  assert ours.fsck().ok and same(repo, ours)
  # It can be worked with, and pushed from, as long as the other side has
  # what lies behind.
  ours.commit(value(5), message="more")
  ours.push()
  assert same(repo, ours) and repo.fsck().ok
  with pytest.raises(RepositoryError, match="--complete"):
    ours.push(Repo.init(tmp_path / "empty").path)
  # Further back, and all of it.
  ours.fetch(depth=4)
  assert [c.title for c in ours.log()][-1] == "step 0"
  fetched = ours.fetch(complete=True)
  assert not ours.objects.shallow
  assert [c.id for c in ours.log()] == [c.id for c in repo.log()]
  assert ours.fsck().ok and fetched.copied.commits


def test_patch_files_go_along_with_leaves_read_from_them(tmp_path):
  """A leaf may be held as the factors of a patch, further back than depth."""
  x = value()
  repo = Repo.init(tmp_path / "repo")
  repo.commit(x, message="base")
  key = jax.random.key(0)
  patch = pj.tuning.lora(key, x, rank=2, only="layer0/kernel")
  patch = jax.tree.map(lambda a: a + 1, patch)
  patched = repo.commit(patch, message="patched")
  name = repo.show(patched).patch
  repo.commit({**repo.checkout(), "more": np.zeros(3)}, message="more")
  ours = Repo.clone(repo.path, tmp_path / "ours", depth=1)
  assert same(repo, ours) and ours.fsck().ok
  ours.gc(grace=0)
  assert same(Repo(repo.path), Repo(ours.path))
  part = Repo.clone(repo.path, tmp_path / "part", depth=1, only="layer0/.*")
  assert part.fsck().ok
  assert same_leaves(part, repo, "main", only="layer0/.*")
  repo.index.refresh()
  digest = repo.tree()["layer0/kernel"].digest
  assert repo.index.find([digest])[digest][0].encoding == "factors"
  assert ours.objects.read(name) == part.objects.read(name)


def test_a_clone_of_a_shallow_clone_is_shallow(repo, tmp_path):
  ours = Repo.clone(repo.path, tmp_path / "ours", depth=1)
  again = Repo.clone(ours.path, tmp_path / "again")
  assert len(again.log()) == 1 and again.fsck().ok
  assert again.objects.shallow <= ours.objects.shallow
  # Pushing to a shallow clone gives it no more than it needs.
  repo.commit(value(5), message="more")
  repo.push(ours.path)
  assert len(ours.log()) == 2 and same(repo, ours)
  assert Repo(ours.path).fsck().ok


def test_progress_counts_bytes(repo, tmp_path):
  seen = []
  Repo.clone(repo.path, tmp_path / "ours", progress=lambda *a: seen.append(a))
  done = [d for what, d, _ in seen if what == "bytes"]
  assert done == sorted(done)
  assert 0 <= bytes_of(Repo(tmp_path / "ours")) - done[-1] < 300  # the note
  assert seen[-1][1] == seen[-1][2]


def test_pull_moves_on_or_waits(repo, ours):
  repo.commit(value(5), message="more")
  assert ours.pull() == repo.resolve("main") == ours.resolve("main")
  assert ours.pull() == ours.resolve("main")
  mine = ours.commit(value(6), message="mine")
  assert ours.pull() == mine  # we are ahead
  assert ours.pull(branch="dev") == repo.resolve("dev")
  assert ours.refs.get(HEADS, "dev") == repo.resolve("dev")
  assert "pull origin" in ours.reflog("main")[1].why


def test_remotes_are_named(repo, tmp_path):
  ours = Repo.init(tmp_path / "ours")
  with pytest.raises(RefNotFoundError, match="no remote is named"):
    ours.fetch()
  ours.add_remote("up", repo.path)
  with pytest.raises(ConflictError, match="already"):
    ours.add_remote("up", "elsewhere")
  with pytest.raises(RepositoryError, match="cannot name a remote"):
    ours.add_remote("a/b", "elsewhere")
  ours.fetch()  # the only one
  assert same(repo, ours, "main", "up/main")
  with pytest.raises(RefNotFoundError, match="found: up"):
    ours.fetch("origin")
  repo.branch("dev", rename="tried")
  assert "up/dev" in ours.refs.all(REMOTES)
  ours.fetch(prune=True)
  assert set(ours.refs.all(REMOTES)) == {"up/main", "up/tried"}
  ours.remove_remote("up")
  assert not ours.remotes() and not ours.refs.all(REMOTES)
  with pytest.raises(RefNotFoundError):
    ours.remove_remote("up")
  pathlib.Path(ours.path, "config.json").write_text("{")
  with pytest.raises(FormatError, match="config.json is damaged"):
    ours.remotes()


def test_bad_places(repo, tmp_path):
  with pytest.raises(NotARepositoryError, match="nowhere"):
    Repo.clone(tmp_path / "nowhere", tmp_path / "ours")
  assert not (tmp_path / "ours").exists()
  with pytest.raises(RepositoryError, match="ftp"):
    repo.push("ftp://host/path")
  with pytest.raises(RepositoryError, match="Orbax cannot write S3 payloads"):
    Repo("s3://bucket/path")
  Repo.clone(repo.path, tmp_path / "ours")
  with pytest.raises(RepositoryError, match="fetch into it"):
    Repo.clone(repo.path, tmp_path / "ours")
  with pytest.raises(RefNotFoundError, match="no branch 'nope'"):
    Repo(tmp_path / "ours").fetch(branches=["nope"])
  with pytest.raises(RefNotFoundError, match="to push"):
    repo.push(tmp_path / "new", ["nope"])
  assert not (tmp_path / "new").exists()


def run(*arguments, code=0):
  result = CliRunner().invoke(patchjax, [str(a) for a in arguments])
  assert result.exit_code == code, result.output + repr(result.exception)
  return result.stderr if code == 2 else result.stdout


def test_the_command_line(repo, tmp_path):
  ours = tmp_path / "ours"
  assert "cloned" in run("clone", repo.path, ours, "--only", "layer0/.*")
  listed = json.loads(run("-C", ours, "remote", "--json"))
  assert listed == [{"name": "origin", "url": repo.path, "only": ["layer0/.*"]}]
  assert "only layer0" in run("-C", ours, "remote", "list")
  made = json.loads(run("-C", ours, "fetch", "--complete", "--json"))
  assert made["branches"]["dev"][1] == repo.resolve("dev")
  Repo(ours).commit(value(5), message="more")
  text = run("-C", ours, "push")
  assert f"main: {repo.resolve('main~1')[:12]} -> " in text
  assert "copied 1 commits" in text
  assert "up to date" in run("-C", ours, "pull")
  run("-C", ours, "remote", "add", "backup", tmp_path / "backup")
  run("-C", ours, "push", "backup", "--all", "--tags")
  assert same(repo, Repo(tmp_path / "backup"))
  repo.commit(value(6), message="theirs")
  Repo(ours).commit(value(7), message="ours")
  assert "does not lead to yours" in run("-C", ours, "push", code=2)
  assert "say how to merge" in run("-C", ours, "pull", code=2)
  run("-C", ours, "pull", "--method", "linear")
  run("-C", ours, "push")
  assert same(repo, Repo(ours))
  run("-C", ours, "remote", "remove", "backup")
  third = tmp_path / "third"
  shown = CliRunner().invoke(
    patchjax, ["clone", repo.path, str(third), "--depth", "1", "--progress"]
  )
  assert f"cloned {repo.path}" in shown.stdout and "B/s" in shown.stderr
  log = run("-C", third, "log", "--oneline")
  assert "(main, origin/main, history cut here" in log
