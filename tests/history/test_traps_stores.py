"""Traps of stores and disks: lost swaps, dropped writes, no room."""

import ast
import pathlib
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.storage import files
from patchjax.trees import errors

HISTORY = pathlib.Path(files.__file__).parent
RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_a_lost_swap_is_noticed(repo):
  repo.commit({"x": LARGE}, message="start")
  old = repo.files.read("refs/heads/main")
  assert repo.files.swap("refs/heads/main", old=old, new=b"1\n")
  assert not repo.files.swap("refs/heads/main", old=old, new=b"2\n")
  assert not repo.files.swap("refs/heads/main", old=None, new=b"2\n")
  assert not repo.files.swap("refs/heads/other", old=old, new=b"2\n")
  assert repo.files.read("refs/heads/main") == b"1\n"


def test_a_lock_that_a_killed_writer_left_is_no_obstacle(repo):
  repo.commit({"x": LARGE}, message="start")
  for name in ("main", "other"):
    open(repo.files.path(f"refs/heads/{name}.__lock"), "w").close()
  assert list(repo.branches()) == ["main"]
  repo.commit({"x": LARGE}, message="next")
  repo.branch("other")
  assert repo.fsck().ok


def test_unwritable_paths(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError):
    Repo.init(tmp_path / "file" / "repo")


def test_a_folder_that_cannot_be_created_is_told_at_once(repo):
  first = repo.commit({"x": LARGE[0]}, message="a blob")
  repo.files.write("payloads", b"")
  with pytest.raises(errors.RepositoryError, match="make the path writable"):
    repo.commit({"x": LARGE}, message="a checkpoint")
  assert repo.resolve("main") == first


@pytest.mark.parametrize("limit", [100, 3_000, 150_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, limit):
  """Files larger than `limit` cannot be written, as on a disk that fills up."""
  path = tmp_path / "repo"
  repo = Repo.init(path)
  first = repo.commit({"x": LARGE}, message="start")
  program = (
    "import resource, signal, sys, numpy as np;"
    "from patchjax.history import Repo;"
    "from patchjax.trees.errors import PatchjaxError;"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    f"repo = Repo({str(path)!r}); repo.checkout();"
    "import orbax.checkpoint.v1;"
    f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
    "x = np.random.default_rng(5).standard_normal((200, 300));"
    "\ntry: repo.commit({'x': x}, message='too large')"
    "\nexcept (PatchjaxError, OSError) as error: print(error); sys.exit(7)"
  )
  program = program.replace(
    "import orbax.checkpoint.v1", "from orbax.checkpoint import v1"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=False
  )
  assert done.returncode == 7, done.stderr
  assert Repo(path).resolve("main") == first
  report = Repo(path).fsck()
  assert report.ok, str(report)
  assert report.leftovers == ()
  Repo(path).commit({"x": LARGE + 1}, message="room again")
  assert Repo(path).fsck().ok
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_no_promise_of_a_store_is_dropped():
  """A write whose future nobody waits for may be lost, and its error is."""
  dropped = []
  for path in sorted(HISTORY.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        continue
      text = ast.unparse(node.value.func)
      if re.search(r"(store|kvstore|array\(.*\))\.(write|read|copy)$", text):
        dropped.append(f"{path.name}: {ast.unparse(node)}")
  assert dropped == []


def test_nothing_relies_on_transactions_over_several_stores():
  """Without one shared context, TensorStore's atomic ones are not."""
  texts = [path.read_text() for path in HISTORY.rglob("*.py")]
  assert not any("Transaction(" in text for text in texts)
