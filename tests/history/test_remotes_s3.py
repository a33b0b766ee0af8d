"""Remotes on S3, against a fake server on loopback."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.history.storage.files import open_files
from patchjax.trees.errors import ConflictError, RepositoryError
from tests.history.remote_cases import (
  bytes_of,
  equal,
  history,
  s3_server,
  same,
  tuned,
  value,
)


@pytest.fixture(scope="module")
def endpoint():
  with s3_server() as found:
    yield found


@pytest.fixture(autouse=True)
def environment(endpoint, tmp_path, monkeypatch):
  """Where the server is and who we are, as a user would say it."""
  monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
  return history(tmp_path_factory.mktemp("made") / "repo")


@pytest.fixture
def url(request):
  return f"s3://bucket/{request.node.name}/model"


def test_push_and_clone(repo, url, tmp_path):
  pushed = repo.push(url, ["main", "dev"], tags=True)
  assert abs(pushed.copied.bytes - bytes_of(repo)) < 300  # the note
  assert repo.push(url, ["main", "dev"], tags=True).copied.bytes == 0
  ours = Repo.clone(url, tmp_path / "ours")
  assert same(repo, ours) and same(repo, ours, "dev", "origin/dev")
  assert ours.tags() == repo.tags()
  assert ours.annotations("main") == repo.annotations("main")
  assert ours.fsck().ok and bytes_of(ours) == bytes_of(repo)
  ours.commit(tuned(ours.checkout(), "layer2"), message="more")
  assert ours.push().copied.packs == 1
  # The bucket can be looked at as it is, and verified.
  there = Repo(url, remote=True)
  assert [c.title for c in there.log(limit=1)] == ["more"]
  assert equal(
    there.checkout(only="layer1/.*"), ours.checkout(only="layer1/.*")
  )
  assert there.fsck().ok
  assert os.path.isdir(tmp_path / "cache" / "patchjax")  # its index
  with pytest.raises(RepositoryError, match="S3 remote"):
    Repo(url)
  with pytest.raises(RepositoryError, match="Orbax cannot write"):
    there.commit(value(3), message="new arrays")


def test_partial_and_shallow(repo, url, tmp_path):
  repo.push(url, ["main", "dev"])
  ours = Repo.clone(url, tmp_path / "ours", only="layer1/.*")
  assert bytes_of(ours) < 0.5 * bytes_of(repo) and ours.fsck().ok
  ours.fetch(complete=True)
  assert same(repo, ours) and ours.fsck().ok
  cut = Repo.clone(url, tmp_path / "cut", depth=1)
  cut.commit(value(8), message="more")
  cut.push()
  assert same(cut, Repo(url, remote=True))


def test_from_bucket_to_bucket(repo, url, tmp_path):
  repo.push(url)
  there = Repo(url, remote=True)
  there.push(f"{url}-copy")
  assert same(repo, Repo(f"{url}-copy", remote=True))


def test_the_second_push_is_refused(repo, url, tmp_path):
  repo.push(url)
  one, two = (Repo.clone(url, tmp_path / name) for name in ("one", "two"))
  one.commit(value(7), message="one", author="Duck")
  two.commit(value(8), message="two", author="Fid")
  one.push()
  with pytest.raises(ConflictError, match="Duck.*Fid"):
    two.push()
  two.pull(method=pj.merging.linear())
  two.push()
  assert one.pull() == two.resolve("main") and same(one, two)


def test_a_ref_has_one_winner(url):
  """Conditional requests decide on the server: no swap is lost."""
  stores = [open_files(url) for _ in range(4)]
  stores[0].write("refs/heads/main", b"0 -")

  def count(number):
    store, tries = stores[number], 0
    for _ in range(10):
      while True:
        tries += 1
        seen = store.read("refs/heads/main")
        new = f"{int(seen.split()[0]) + 1} {number}.{tries}".encode()
        if store.swap("refs/heads/main", old=seen, new=new):
          break
    return tries

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    tries = sum(pool.map(count, range(4)))
  assert stores[0].read("refs/heads/main").split()[0] == b"40"
  assert tries > 40  # some lost a race, and knew it


_PUSHER = """
import sys
import numpy as np
import patchjax as pj
from patchjax.history import Repo
from patchjax.trees.errors import ConflictError

url, folder, name = sys.argv[1:]
repo = Repo.clone(url, folder)
for i in range(2):
  x = repo.checkout()
  x[name] = {"mine": np.float32([i])}
  print(repo.commit(x, message=f"{name} {i}"), flush=True)
  while True:
    try:
      repo.push()
      break
    except ConflictError:
      repo.fetch()
      tip = repo.resolve("main")
      theirs = repo.checkout("origin/main")
      repo.commit(
        {**theirs, name: x[name]},
        message="merged",
        parents=[tip, "origin/main"],
      )
"""


def test_no_pusher_loses_a_commit(repo, url, tmp_path):
  repo.push(url)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PUSHER, url, str(tmp_path / name), name],
      stdout=subprocess.PIPE,
      text=True,
    )
    for name in ("a", "b")
  ]
  said = [line for each in processes for line in each.communicate()[0].split()]
  assert [each.returncode for each in processes] == [0, 0]
  ours = Repo.clone(url, tmp_path / "all")
  assert len(said) == 4 and set(said) <= {c.id for c in ours.log()}
  assert all(float(ours.checkout()[n]["mine"][0]) == 1 for n in "ab")
  assert ours.fsck().ok


_KILLED = """
import os, sys
from patchjax.history import Repo

def progress(what, done, total):
  if what == "bytes" and done >= int(sys.argv[3]):
    os.kill(os.getpid(), 9)

if sys.argv[4] == "push":
  Repo(sys.argv[1]).push(sys.argv[2], ["main", "dev"], progress=progress)
else:
  Repo.clone(sys.argv[1], sys.argv[2], progress=progress)
"""


def killed(source, target, most, verb):
  arguments = [source, target, str(int(most)), verb]
  done = subprocess.run([sys.executable, "-c", _KILLED, *arguments])
  assert done.returncode == -signal.SIGKILL


def test_a_killed_push_is_resumed(repo, url):
  total = bytes_of(repo)
  killed(repo.path, url, 0.5 * total, "push")
  there = Repo(url, remote=True)
  assert there.fsck().ok and not there.branches()
  before = sum(len(there.files.read(key)) for key in copied_files(there))
  assert before > 0.3 * total
  copied = repo.push(url, ["main", "dev"]).copied
  assert same(repo, there) and there.fsck().ok
  assert before + copied.bytes < 1.1 * total


def copied_files(repo):
  return [
    k for f in ("payloads", "blobs", "objects") for k in repo.files.walk(f)
  ]


def test_a_killed_clone_is_resumed(repo, url, tmp_path):
  repo.push(url, ["main", "dev"])
  there, total = str(tmp_path / "there"), bytes_of(repo)
  killed(url, there, 0.5 * total, "clone")
  assert Repo(there).fsck().ok and not Repo(there).branches()
  before = bytes_of(Repo(there))
  assert before > 0.3 * total
  seen = []
  Repo.clone(url, there, progress=lambda *a: seen.append(a))
  copied = max((done for what, done, _ in seen if what == "bytes"), default=0)
  assert same(repo, Repo(there)) and Repo(there).fsck().ok
  assert before + copied < 1.1 * total


def test_a_store_without_conditions_is_refused(repo, url, monkeypatch):
  with s3_server("careless") as careless:
    monkeypatch.setenv("AWS_ENDPOINT_URL", careless)
    with pytest.raises(RepositoryError, match="If-None-Match"):
      repo.push(url)
    assert not Repo(url, remote=True).branches()


def test_what_cannot_be_reached_is_said_soon(repo, url, monkeypatch):
  with pytest.raises(RepositoryError, match="NoSuchBucket"):
    repo.push("s3://no-such-bucket/model")
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
  begin = time.monotonic()
  with pytest.raises(RepositoryError, match="AWS_ENDPOINT_URL"):
    repo.push(url)
  assert time.monotonic() - begin < 30
