"""Repositories and remotes on Google's storage, against an emulator."""

import concurrent.futures

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.storage.files import open_files
from patchjax.trees.errors import (
  ConflictError,
  IntegrityError,
  NotARepositoryError,
  RepositoryError,
)
from tests.history.remote_cases import (
  bytes_of,
  equal,
  gcs_server,
  history,
  same,
  tuned,
  value,
)

# Orbax writes gs:// through Google's client, which warns of this Python.
pytestmark = pytest.mark.filterwarnings("ignore:::google")


@pytest.fixture(scope="module")
def endpoint():
  with gcs_server() as found:
    yield found


@pytest.fixture(autouse=True)
def environment(endpoint, tmp_path, monkeypatch):
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", endpoint)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)  # Orbax's way there
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["gs", "memory"])
def url(request):
  return f"{request.param}://bucket/{request.node.originalname}"


def test_files_in_a_bucket(url):
  files = open_files(url)
  other = open_files(f"{url}-other")
  other.write("a", b"another repository's")
  assert not files.exists("a") and not files.names(".")
  files.write_all({"a/b": b"12345", "a/c/d": b"", ".tmp-1": b"0"})
  assert files.read("a/b") == b"12345" and files.read("a/c/d") == b""
  assert files.read_range("a/b", 1, 3) == b"23"
  assert files.read_range("a/b", 3, 30) == b"45"
  assert b"".join(files.pieces("a/b")) == b"12345"
  assert files.exists("a") and files.exists("a/b") and not files.exists("b")
  assert files.freshen("a/b") and not files.freshen("b")
  assert files.names(".") == ["a"] and files.leftovers() == [".tmp-1"]
  assert files.names("a") == ["b", "c"] and not files.names("nothing")
  assert list(files.walk("a")) == ["a/b", "a/c/d"]
  assert files.holding("a", "d") == ["c"]
  assert files.read_all(["a/b", "nothing"]) == {"a/b": b"12345"}
  with pytest.raises(FileNotFoundError):
    files.read("nothing")
  assert not files.swap("ref", old=b"0", new=b"1")
  assert files.swap("ref", old=None, new=b"1")
  assert not files.swap("ref", old=None, new=b"2")
  assert files.swap("ref", old=b"1", new=b"2") and files.read("ref") == b"2"
  assert not files.swap("ref", old=b"1", new=None)
  assert files.swap("ref", old=b"2", new=None) and not files.exists("ref")
  files.delete("a")
  assert not files.names("a") and other.read("a")


def test_a_ref_has_one_winner(url):
  stores = [open_files(url) for _ in range(4)]
  stores[0].write("ref", b"0 -")

  def count(number):
    for tries in range(1000):
      seen = stores[number].read("ref")
      if seen.startswith(b"40 "):
        return
      new = f"{int(seen.split()[0]) + 1} {number}.{tries}".encode()
      if stores[number].swap("ref", old=seen, new=new):
        won.append(new)

  won = []
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(count, range(4)))
  assert sorted(int(new.split()[0]) for new in won) == list(range(1, 41))


def test_push_and_clone(url, tmp_path):
  repo = history(tmp_path / "repo", commits=3)
  repo.push(url, ["main", "dev"], tags=True)
  assert repo.push(url, ["main", "dev"], tags=True).copied.bytes == 0
  ours = Repo.clone(url, tmp_path / "ours")
  assert same(repo, ours) and same(repo, ours, "dev", "origin/dev")
  assert bytes_of(ours) == bytes_of(repo) and ours.fsck().ok
  ours.commit(value(5), message="more")
  ours.push()
  assert repo.pull(url) == ours.resolve("main")
  assert Repo(url).fsck().ok


def test_small_commits_in_a_bucket(url):
  """Blobs, objects, refs, notes: all but Orbax's part."""
  with pytest.raises(NotARepositoryError):
    Repo(url)
  repo = Repo.init(url)
  assert repo.path == url
  first = repo.commit({"w": np.arange(3.0)}, message="first")
  repo.branch("dev")
  second = repo.commit({"w": np.arange(4.0)}, message="second")
  repo.tag("v1", first)
  repo.annotate(first, "verdict", {"ok": True})
  again = Repo(url)
  assert [c.id for c in again.log()] == [second, first]
  assert equal(again.checkout("v1"), {"w": np.arange(3.0)})
  assert again.annotations(first)[0]["payload"] == {"ok": True}
  with pytest.raises(ConflictError):
    Repo(url).commit(
      {"w": np.zeros(2)}, message="late", parents=[first], branch="main"
    )
  again.branch("dev", delete=True)
  assert list(repo.branches()) == ["main"]
  assert repo.reflog()[0].why == "commit: second"
  assert repo.gc().removed == ()  # what could go is written down first
  assert repo.gc(grace=0).removed == ()  # the reflog still holds `dev`
  assert repo.fsck().ok


@pytest.mark.parametrize("url", ["gs"], indirect=True)
def test_payloads_in_a_bucket(url, tmp_path):
  """Orbax's part: written by it, read by region, and copied."""
  repo = Repo.init(url)
  x = value()
  repo.commit(x, message="a payload")
  y = tuned(x, "layer0")
  repo.commit(y, message="a difference")
  again = Repo(url)
  assert equal(again.checkout("main~1"), x) and equal(again.checkout(), y)
  assert equal(again.checkout(only="layer1/.*"), {"layer1": x["layer1"]})
  report = again.fsck()
  assert report.ok and not report.leftovers, str(report)
  ours = Repo.clone(url, tmp_path / "ours")
  assert same(again, ours) and ours.fsck().ok
  part = Repo.clone(url, tmp_path / "part", only="layer2/.*")
  assert part.fsck().ok
  pack = next(key for key in again.files.walk("payloads") if "/d/" in key)
  data = bytearray(again.files.read(pack))
  data[len(data) // 2] ^= 1
  again.files.write(pack, bytes(data))
  with pytest.raises(IntegrityError):
    Repo(url).checkout("main~1")


def test_what_cannot_be_a_place():
  with pytest.raises(RepositoryError, match="no place"):
    Repo("gs://")
  with pytest.raises(RepositoryError, match="takes for a pattern"):
    Repo("gs://bucket/models[1]")
