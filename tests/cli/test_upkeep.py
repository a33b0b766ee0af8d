"""The verbs gc and fsck."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from patchjax.cli.app import patchjax
from patchjax.history import Repo


@pytest.fixture
def repo(tmp_path):
  """A repository with a branch that was removed."""
  repo = Repo.init(tmp_path / "repo")
  repo.commit({"w": np.float32([1, 2])}, message="start")
  repo.branch("lost")
  repo.commit({"w": np.float32([3])}, message="lost", branch="lost")
  repo.branch("lost", delete=True, force=True)
  return repo


def call(repo, *arguments):
  return CliRunner().invoke(patchjax, ["-C", repo.path, *arguments])


def test_gc_says_what_would_go_and_removes_it(repo):
  assert "removed nothing" in call(repo, "gc").output
  # Its reflog still holds the branch.
  assert "removed nothing" in call(repo, "gc", "--grace", "0").output
  now = ["gc", "--grace", "0", "--expire", "0"]
  found = call(repo, *now, "--dry-run")
  assert "would remove 1 blob, 1 commit, 4 reflog, 1 tree" in found.output
  done = json.loads(call(repo, *now, "--json").output)
  assert not done["dry_run"]
  assert sorted({item["kind"] for item in done["removed"]}) == [
    "blob",
    "commit",
    "reflog",
    "tree",
  ]
  assert "removed nothing" in call(repo, *now).output
  assert np.array_equal(repo.checkout()["w"], [1, 2])


@pytest.mark.parametrize("age", ["-1d", "soon", "3", "14 d"])
def test_ages_that_are_none_are_refused(repo, age):
  found = call(repo, "gc", f"--grace={age}")
  assert found.exit_code == 2
  assert "such as 14d" in found.output


def test_ages_have_units(repo):
  for age in ("0", "1.5s", "90m", "1h", "14d", "2w"):
    assert call(repo, "gc", "--grace", age).exit_code == 0


def test_quick_fsck_leaves_the_leaves_unread(repo):
  path = repo.files.path(repo.index.packs()[0])
  with open(path, "r+b") as file:
    file.truncate(200)
  assert call(repo, "fsck").exit_code == 1
  found = call(repo, "fsck", "--quick", "--json")
  assert json.loads(found.output)["quick"]
