"""Two processes of `jax.distributed`, with four devices each, act as one."""

import json

import jax
import numpy as np
import pytest

from patchjax import trees
from patchjax.history import Repo
from tests.history import layouts
from tests.processes import run_pair


@pytest.fixture(scope="module")
def shared():
  """The repository that two processes worked on, and what they report."""
  with Repo.temporary() as repo:
    repo.commit(layouts.host_value(100), message="by one process")
    said = run_pair("tests.history.process_worker", repo.path)
    reports = [json.loads(text.splitlines()[-1]) for text in said]
    assert reports[0] == reports[1]
    yield repo, reports[0]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_ids_are_those_of_one_process(shared, layout):
  repo, report = shared
  number = list(layouts.LAYOUTS).index(layout)
  host = layouts.host_value(number) | layouts.keys(number)
  assert repo.show(report[layout]).tree == trees.tree_id(host)
  with Repo.temporary() as other:
    # The commit id, too: the same parents, author, time and message.
    start = repo.show("main")
    mine = other.commit(
      layouts.host_value(100),
      message=start.message,
      author=start.author,
      time=start.when,
    )
    assert mine == start.id
    commit = other.commit(
      host,
      message=layout,
      branch=layout,
      parents=[mine],
      time=number,
      author="both",
    )
    assert commit == report[layout]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_what_two_processes_committed_is_restored_by_one(shared, layout):
  repo, report = shared
  number = list(layouts.LAYOUTS).index(layout)
  host = layouts.host_value(number) | layouts.keys(number)
  repo = Repo(repo.path)
  layouts.check_local(repo.checkout(report[layout], like=host), host)
  narrow = {
    name: x
    for name, x in host.items()
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    and not trees.dtypes.is_wide(x)
  }
  for other in ("explicit", "crossed"):
    like = {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=layouts.sharding_of(other, x.shape)
      )
      for name, x in narrow.items()
    }
    found = repo.checkout(report[layout], like=like, only=list(narrow))
    layouts.check_local(found, narrow)


def test_unchanged_and_slightly_changed_leaves(shared):
  repo, report = shared
  assert report["same"] == trees.tree_id(layouts.host_value(1))
  from patchjax.history.arrays import encodings

  assert all(encodings.ENCODINGS[name].delta for name in report["deltas"])
  for step in range(3):
    want = layouts.host_value(1)["large"] * np.float32(1 + 1e-4 * (step + 1))
    found = repo.open(f"auto~{2 - step}")["large"].read()
    assert np.array_equal(found, want)


def test_commits_in_the_background_follow_each_other(shared):
  _, report = shared
  from patchjax.history.arrays import encodings

  assert encodings.ENCODINGS[report["background"]].delta


def test_what_was_not_recorded_is_nowhere(shared):
  repo, _ = shared
  titles = {commit.title for commit in Repo(repo.path).log("numpy")}
  assert "it fits" in titles and not titles & {"too large", "late", "wrong"}


def test_all_is_well_afterwards(shared):
  repo, _ = shared
  report = Repo(repo.path).fsck()
  assert report.ok, report
