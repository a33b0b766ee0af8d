"""repack: fewer bytes, shorter chains, the same ids; old packs go by gc."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.arrays import chains, encodings, payloads
from patchjax.trees import errors


def near(x, seed, scale=1e-3):
  rng = np.random.default_rng(seed)
  noise = scale * rng.standard_normal(x.shape)
  return (x * (1 + noise)).astype(x.dtype)


def start(seed=0, shape=(300, 200)):
  rng = np.random.default_rng(seed)
  return {
    "a": rng.standard_normal(shape).astype(np.float32),
    "b": {"c": rng.standard_normal(shape).astype(np.float32)},
  }


def snapshot(repo):
  """Every version by ref, with its id and its bits."""
  refs = {**repo.branches(), **repo.tags()}
  ids = [commit.id for tip in refs.values() for commit in repo.log(tip)]
  return refs, {id_: flat(repo.checkout(id_)) for id_ in dict.fromkeys(ids)}


def flat(tree):
  from patchjax.trees.names import named_leaves

  return {k: np.asarray(v).tobytes() for k, v in named_leaves(tree).items()}


def place(repo, ref, name):
  repo.index.refresh()
  digest = repo.tree(ref)[name].digest
  return repo.index.find([digest])[digest][0]


def disk(repo):
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for top in ("payloads", "blobs")
    for folder, _, names in os.walk(os.path.join(repo.path, top))
    for name in names
  )


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def two_roots(repo):
  """A branch without a common ancestor, close to main all the same."""
  value = start()
  repo.commit(value, message="one")
  other = {"a": near(value["a"], 1), "b": {"c": near(value["b"]["c"], 2)}}
  repo.commit(other, message="two", branch="other", parents=[])
  return value, other


def test_another_branch_is_a_base(repo):
  two_roots(repo)
  before = snapshot(repo)
  size = disk(repo)
  assert place(repo, "other", "a").base is None
  report = repo.repack()
  assert (report.leaves, report.recoded, report.packs) == (4, 2, 1)
  assert report.after < 0.85 * report.before
  assert place(Repo(repo.path), "main", "a").base is None
  # The old place is read while it is there: its chain is shorter.
  assert place(repo, "other", "a").base is None
  gone = repo.gc(grace=0)
  assert [item.kind for item in gone.removed] == ["superseded"]
  found = place(repo, "other", "a")
  assert found.base == repo.tree("main")["a"].digest
  assert encodings.ENCODINGS[found.encoding].delta
  assert disk(repo) < 0.85 * size
  assert snapshot(Repo(repo.path)) == before
  assert repo.fsck().ok
  again = repo.repack()
  assert again.recoded == again.gathered == again.packs == 0


def test_a_dry_run_writes_nothing(repo):
  two_roots(repo)
  files = sorted(repo.files.walk("payloads"))
  report = repo.repack(dry_run=True)
  assert report.recoded == 2 and report.packs == 0
  assert "would rewrite 2 of 4 leaves" in str(report)
  assert sorted(repo.files.walk("payloads")) == files
  assert report.to_json()["dry_run"]


def test_a_release_is_a_base(repo):
  rng = np.random.default_rng(5)
  value = start()
  repo.commit(value, message="release")
  repo.tag("v1")
  scrambled = {"a": rng.permutation(value["a"]), "b": value["b"]}
  repo.commit(scrambled, message="something else")
  back = {"a": near(value["a"], 3), "b": value["b"]}
  repo.commit(back, message="back to what it was, nearly")
  assert place(repo, "main", "a").base is None
  before = snapshot(repo)
  assert repo.repack().recoded == 1
  repo.gc(grace=0)
  assert place(repo, "main", "a").base == repo.tree("v1")["a"].digest
  assert snapshot(Repo(repo.path)) == before


def test_small_packs_are_gathered(repo):
  value = start(shape=(60, 50))
  repo.commit(value, message="start")
  for step in range(20):
    value = {"a": value["a"].copy(), "b": value["b"]}
    value["a"][step] += 1
    repo.commit(value, message=f"step {step}")
  assert len(repo.index.packs()) >= 20
  before = snapshot(repo)
  report = repo.repack()
  assert report.packs == 1
  repo.gc(grace=0)
  assert len(repo.index.packs()) == 1
  assert snapshot(Repo(repo.path)) == before
  assert repo.fsck().ok
  depths = [place(repo, commit.id, "a").depth for commit in repo.log()]
  assert max(depths) <= encodings.MAX_DEPTH


def test_fine_tunes_lie_on_each_other_up_to_a_bound(repo):
  value = {"a": start(shape=(500, 400))["a"]}
  repo.commit(value, message="start")
  heavy = []
  for step in range(7):
    value = {"a": near(value["a"], step)}
    before = disk(repo)
    commit = repo.commit(value, message=f"step {step}")
    entry = repo.tree(commit)["a"]
    repo.index.refresh()
    places = chains.gather(repo.index.find, [entry.digest])
    chain = chains.chain(entry.digest, places)
    assert chain is not None
    heavy.append(sum(map(chains.is_heavy, chain)))
    if heavy[-1] == step + 1:  # a difference to the version before
      assert disk(repo) - before < 0.75 * value["a"].nbytes
  assert heavy[: chains.HEAVY] == [*range(1, chains.HEAVY + 1)]
  assert max(heavy) == chains.HEAVY
  repo = Repo(repo.path)
  assert np.array_equal(repo.checkout("main")["a"], value["a"])


def test_patches_stay_where_their_files_are(repo):
  value = start(shape=(500, 400))
  repo.commit(value, message="start")
  rng = np.random.default_rng(0)
  code = pj.patches.LowRank(
    rng.standard_normal((500, 2)).astype(np.float32),
    rng.standard_normal((2, 400)).astype(np.float32),
    np.float32(1e-3),
  )
  patch = pj.Patch({"a": pj.patches.Delta(code, "add")}, None)
  repo.commit(patch, message="low rank", any_base=True)
  assert place(repo, "main", "a").encoding == "factors"
  before = snapshot(repo)
  assert repo.repack().recoded == 0
  repo.gc(grace=0)
  assert snapshot(Repo(repo.path)) == before


def test_a_leaf_is_read_while_its_base_goes_deeper(repo):
  # main and other are near each other; other has a version of its own, which
  # is a difference to a leaf that is about to become one itself.
  _, other = two_roots(repo)
  third = {"a": other["a"].copy(), "b": other["b"]}
  third["a"][7, :50] += 1
  repo.commit(third, message="three", branch="other")
  assert place(repo, "other", "a").encoding == "sparse"
  before = snapshot(repo)
  report = repo.repack()
  assert (report.recoded, report.gathered) == (2, 1)
  assert snapshot(Repo(repo.path)) == before
  repo.gc(grace=0)
  assert place(repo, "other", "a").depth == 2
  assert snapshot(Repo(repo.path)) == before
  assert repo.fsck().ok


def test_what_comes_back_wrong_is_not_kept(repo, monkeypatch):
  two_roots(repo)
  before = snapshot(repo)
  read = payloads.Payload.read

  def damaged(self, key, region=None, out=None):
    found = read(self, key, region, out)
    if region is None and out is None and len(key) == 64:
      found.reshape(-1).view(np.uint8)[0] ^= 1
    return found

  # A disk that does not keep what it was given.
  monkeypatch.setattr(payloads.Payload, "read", damaged)
  with pytest.raises(errors.IntegrityError, match="not stored as it was"):
    repo.repack()
  monkeypatch.undo()
  assert snapshot(Repo(repo.path)) == before
  assert Repo(repo.path).repack().recoded == 2


_KILLED = """
import os, signal, sys
from patchjax.history import Repo
from patchjax.history.arrays import index, payloads
at = sys.argv[2]
if at == "before":
  payloads.save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
elif at == "written":
  index.write = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
else:
  write = index.write
  def last(*args, **kwargs):
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
  index.write = last
Repo(sys.argv[1]).repack()
"""


@pytest.mark.parametrize("at", ["before", "written", "indexed"])
def test_a_killed_repack_does_no_harm(repo, at):
  two_roots(repo)
  before = snapshot(repo)
  command = [sys.executable, "-c", _KILLED, repo.path, at]
  done = subprocess.run(command, capture_output=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr
  opened = Repo(repo.path)
  assert snapshot(opened) == before
  assert opened.fsck().ok
  assert opened.repack().recoded == 2
  opened.gc(grace=0)
  assert snapshot(Repo(repo.path)) == before
  assert opened.fsck().leftovers == ()


def test_a_damaged_leaf_is_named_and_nothing_changes(repo):
  two_roots(repo)
  pack = place(repo, "other", "a").pack
  for folder, _, names in os.walk(repo.files.path(pack)):
    for name in names:
      path = os.path.join(folder, name)
      if os.path.getsize(path) > 100_000:
        with open(path, "r+b") as file:
          file.seek(50_000)
          file.write(bytes(20_000))
  packs = repo.index.packs()
  with pytest.raises(errors.IntegrityError):
    Repo(repo.path).repack()
  assert repo.index.packs() == packs


def test_a_base_may_go_deeper_while_a_commit_is_written(repo, monkeypatch):
  _, value = two_roots(repo)
  repo.repack()
  value["a"] = value["a"].copy()
  value["a"][0, :5] += 1
  writer = repo.writer
  store = writer._store

  def collect_first(*arguments):
    assert Repo(repo.path).gc().removed
    return store(*arguments)

  monkeypatch.setattr(writer, "_store", collect_first)
  repo.commit(value, message="on what goes", branch="other")
  opened = Repo(repo.path)
  np.testing.assert_array_equal(opened.checkout("other")["a"], value["a"])
  np.testing.assert_array_equal(opened.open("other")["a"][:1], value["a"][:1])
  assert opened.fsck().ok


def test_the_command_says_what_it_did(repo):
  from click.testing import CliRunner

  from patchjax.cli.app import patchjax

  two_roots(repo)
  run = CliRunner().invoke
  text = run(patchjax, ["-C", repo.path, "repack", "--dry-run"])
  assert text.exit_code == 0 and "would rewrite 2 of 4" in text.output
  spelled = run(patchjax, ["-C", repo.path, "repack", "--json"])
  assert json.loads(spelled.stdout)["recoded"] == 2
