"""Copies of what is damaged: nothing counts as copied, and later it is."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import index
from patchjax.trees.errors import IntegrityError
from tests.history.accidents import flip
from tests.history.remote_cases import LARGE, equal, tuned, value

ONLY = "layer1/.*"


@pytest.fixture
def repo(tmp_path):
  """A chain of differences, with leaves nobody asks for beside each."""
  rng = np.random.default_rng(0)
  repo = Repo.init(tmp_path / "repo")
  x = value()
  for i in range(4):
    # Large enough that no difference fits into a blob.
    kernel = rng.standard_normal((300, 400)).astype(np.float32)
    if i:
      kernel = x["layer1"]["kernel"] * (1 + np.float32(1e-3) * kernel)
    x = tuned({**x, "layer1": {**x["layer1"], "kernel": kernel}}, "layer2", i)
    repo.commit(x, message=f"step {i}")
  shutil.copytree(repo.path, tmp_path / "spare")
  return repo


def data_files(repo, pack):
  found = pathlib.Path(repo.path, pack).glob("state/**/d/*")
  return sorted(found, key=os.path.getsize)


def place(repo, ref="main", name="layer1/kernel"):
  repo.index.refresh()
  digest = repo.tree(ref)[name].digest
  return repo.index.find([digest])[digest][0]


def missing(repo, pack):
  data_files(repo, pack)[-1].unlink()


def truncated(repo, pack):
  path = data_files(repo, pack)[-1]
  os.truncate(path, path.stat().st_size // 2)


def flipped(repo, pack):
  # Anywhere in the bits of the leaf asked for; all leaves are noise.
  for path in data_files(repo, pack):
    for position in range(50, path.stat().st_size, 20_000):
      flip(path, position)


def without_an_array(repo, pack):
  """The index names an array that nobody wrote."""
  entries = json.loads(repo.files.read(f"{pack}/{index.INDEX}"))["entries"]
  for item in entries.values():
    item["key"] = "nothing"
  index.write(repo.files, pack, entries)


def swapped(repo, pack):
  """The index names the array of another leaf."""
  entries = json.loads(repo.files.read(f"{pack}/{index.INDEX}"))["entries"]
  keys = [item["key"] for item in entries.values()]
  for item, key in zip(entries.values(), [*keys[1:], keys[0]]):
    item["key"] = key
  index.write(repo.files, pack, entries)


@pytest.mark.parametrize(
  ("damage", "ref"),
  [
    (missing, "main~3"),
    (truncated, "main"),
    (without_an_array, "main~3"),
    (swapped, "main"),
  ],
)
def test_a_part_of_a_damaged_payload_is_not_fetched(
  repo, tmp_path, damage, ref
):
  pack = place(repo, ref).pack
  damage(repo, pack)
  repo.index.forget()
  ours = Repo.init(tmp_path / "ours")
  ours.add_remote("origin", repo.path)
  with pytest.raises(IntegrityError) as said:
    ours.fetch(only=ONLY)
  assert "layer1/kernel" in str(said.value) or pack in str(said.value)
  assert ours.refs.all("refs/remotes") == {}
  # Not what is damaged, nor what differs from it, counts as being here.
  ours.index.refresh()
  digest = repo.tree(ref)["layer1/kernel"].digest
  assert ours.index.find([digest])[digest] == []
  # The source is mended, and the next fetch brings it.
  shutil.rmtree(repo.path)
  shutil.copytree(tmp_path / "spare", repo.path)
  ours = Repo(ours.path)
  ours.fetch(only=ONLY)
  mended = Repo(repo.path)
  for at in ("main", "main~1", "main~2", "main~3"):
    assert equal(
      ours.checkout(at.replace("main", "origin/main"), only=ONLY),
      mended.checkout(at, only=ONLY),
    )
  assert ours.fsck().ok, str(ours.fsck())


@pytest.mark.parametrize("verb", ["push", "fetch"])
def test_what_is_found_damaged_is_copied_again(repo, tmp_path, verb):
  """Verified as a whole: what failed must not count as being there."""
  flipped(repo, place(repo, "main~3").pack)

  def copy(source):
    if verb == "push":
      source.push(tmp_path / "there", verify=True)
      return Repo(tmp_path / "there"), "main"
    there = Repo.init(tmp_path / "there")
    there.fetch(source.path, verify=True)
    there.branch("copy", at=source.resolve("main"))
    return there, "copy"

  with pytest.raises(IntegrityError):
    copy(repo)
  there, ref = copy(Repo(tmp_path / "spare"))
  assert equal(there.checkout(ref), Repo(tmp_path / "spare").checkout("main"))
  assert there.fsck().ok, str(there.fsck())


def test_a_partial_clone_shares_no_leaf_that_nobody_asked_for(tmp_path):
  """Small commits of several leaves lie in one blob."""
  repo = Repo.init(tmp_path / "repo")
  x = value()
  repo.commit(x, message="start")
  for step in range(3):
    x = {k: {**v, "bias": np.float32([step, ord(k[-1])])} for k, v in x.items()}
    repo.commit(x, message="biases")
  x = tuned(x, "layer1")
  repo.commit(x, message="more")
  ours = Repo.clone(repo.path, tmp_path / "ours", only=ONLY)
  assert equal(ours.checkout(only=ONLY), repo.checkout(only=ONLY))
  ours.index.refresh()
  for ref in ("main", "main~1", "main~2", "main~4"):
    for name, entry in repo.tree(ref).items():
      held = ours.index.find([entry.digest])[entry.digest]
      assert bool(held) == name.startswith("layer1/"), (ref, name)
  ours.fetch(complete=True)
  assert equal(ours.checkout(), x) and ours.fsck().ok


def test_an_object_that_was_cut_short_is_copied_again(tmp_path):
  """A power failure, or a disk: the file is there, and too short."""
  repo = Repo.init(tmp_path / "repo")
  repo.commit({"w": np.zeros(LARGE, np.float32)}, message="start")
  there = Repo.init(tmp_path / "there")
  for key in repo.files.walk("objects"):
    there.files.write(key, repo.files.read(key)[:-1])
  repo.push(there.path)
  assert there.fsck().ok, str(there.fsck())
