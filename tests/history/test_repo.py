"""The everyday verbs: commit, checkout, branch, tag, log, diff."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.trees import errors


def bits(x):
  return np.asarray(x).tobytes()


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    "dense": {
      "kernel": rng.standard_normal((7, 5)).astype(np.float32),
      "bias": np.zeros(5, np.float32),
    },
    "scale": np.float32(3),
  }


def test_round_trip(repo, params):
  commit = repo.commit(params, message="start\n\nmore", author="A", time=0.0)
  found = repo.checkout("main", like=params)
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert isinstance(found["dense"]["kernel"], np.ndarray)
  assert jax.tree.map(bits, found) == jax.tree.map(bits, params)
  shown = repo.show("main")
  assert (shown.id, shown.author, shown.title) == (commit, "A", "start")
  assert shown.time == "1970-01-01T00:00:00.000000+00:00"
  assert shown.tree == pj.trees.tree_id(params)


def test_checkout_without_like_is_nested_and_on_device(repo, params):
  repo.commit(params, message="start")
  found = repo.checkout()
  assert isinstance(found["dense"]["kernel"], jax.Array)
  assert jax.tree.map(bits, found) == jax.tree.map(bits, params)


def test_ids_do_not_depend_on_containers_or_encodings(params):
  ids = set()
  for value in (params, jax.tree.map(jnp.asarray, params)):
    with Repo.temporary() as repo:
      ids.add(repo.commit(value, message="m", author="a", time=1.0))
  assert len(ids) == 1


def test_only_reads_what_is_asked_for(repo, params):
  repo.commit(params, message="start")
  assert set(repo.checkout(only="dense/.*")) == {"dense"}
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params
  )
  found = repo.checkout(like=abstract, only="dense/kernel")
  assert bits(found["dense"]["kernel"]) == bits(params["dense"]["kernel"])
  assert isinstance(found["scale"], jax.ShapeDtypeStruct)
  with pytest.raises(errors.SelectionError, match="kernel"):
    repo.checkout(only="kernel")


def test_like_lists_every_bad_leaf(repo, params):
  repo.commit(params, message="start")
  like = {
    "dense": {
      "kernel": np.zeros((5, 7), np.float32),
      "bias": np.zeros(5, np.float16),
    },
    "extra": np.zeros(1),
  }
  with pytest.raises(errors.MismatchError) as info:
    repo.checkout(like=like)
  for part in ("kernel", "[5,7]", "[7,5]", "bias", "float16", "extra", "scale"):
    assert part in str(info.value)


def test_like_keeps_shardings(repo, mesh_explicit):
  sharding = jax.sharding.NamedSharding(
    mesh_explicit, jax.sharding.PartitionSpec("x", "y")
  )
  x = jax.device_put(np.arange(32, dtype=np.float32).reshape(8, 4), sharding)
  repo.commit({"x": x}, message="sharded")
  assert repo.show().tree == pj.trees.tree_id({"x": np.asarray(x)})
  for like in (x, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)):
    found = repo.checkout(like={"x": like})["x"]
    assert found.sharding == sharding
    assert bits(found) == bits(x)


def test_branches_tags_and_revisions(repo, params):
  first = repo.commit(params, message="one")
  second = repo.commit(params, message="two")
  assert repo.branch("topic/a", at="main~1") == first
  assert repo.tag("v1.0.0") == second
  third = repo.commit(params, message="three", branch="topic/a")
  assert repo.branches() == {"main": second, "topic/a": third}
  assert repo.tags() == {"v1.0.0": second}
  for text, expected in {
    "main": second,
    "heads/main": second,
    "tags/v1.0.0": second,
    "v1.0.0~1": first,
    "main^": first,
    "main~0": second,
    third[:10]: third,
    third: third,
    "topic/a~": first,
  }.items():
    assert repo.resolve(text) == expected, text
  assert [c.message for c in repo.log("topic/a")] == ["three", "one"]
  assert [c.message for c in repo.log(limit=1)] == ["two"]
  for text in ("nothing", "main~9", "main^2", "", "~1", first[:3], "00000"):
    with pytest.raises(errors.RefNotFoundError):
      repo.resolve(text)


def test_tags_never_move_and_names_are_checked(repo, params):
  repo.commit(params, message="one")
  repo.tag("v1")
  with pytest.raises(errors.ConflictError, match="exists already"):
    repo.tag("v1")
  with pytest.raises(errors.ConflictError, match="ambiguous"):
    repo.branch("v1")
  with pytest.raises(errors.ConflictError):
    repo.branch("main")
  for name in ("", "a b", "../x", "a..b", "/a", "a/", "-a", "a~1", "x.lock"):
    with pytest.raises(errors.RepositoryError):
      repo.branch(name)
  with pytest.raises(errors.RepositoryError, match="folder of the other"):
    repo.branch("main/sub")


def test_unknown_branch_is_refused(repo, params):
  repo.commit(params, message="one")
  with pytest.raises(errors.RefNotFoundError, match=r"repo\.branch\('topic'\)"):
    repo.commit(params, message="two", branch="topic")
  root = repo.commit(params, message="other", branch="topic", parents=[])
  assert repo.show(root).parents == ()


def test_parents_guard_against_building_on_an_old_tip(repo, params):
  first = repo.commit(params, message="one")
  second = repo.commit(params, message="two", author="Ada")
  with pytest.raises(errors.ConflictError, match=second[:12]):
    repo.commit(params, message="late", parents=[first])
  assert repo.resolve("main") == second


def test_a_moved_ref_is_a_conflict_that_says_who(repo, params, monkeypatch):
  first = repo.commit(params, message="one")
  move = repo.refs.move

  def late(space, name, *, old, new):
    monkeypatch.setattr(repo.refs, "move", move)
    repo.commit(params, message="theirs", author="Ada")
    move(space, name, old=old, new=new)

  monkeypatch.setattr(repo.refs, "move", late)
  with pytest.raises(errors.ConflictError, match="Ada.*theirs") as info:
    repo.commit({"w": np.ones(2)}, message="mine")
  assert first[:12] in str(info.value)
  assert repo.show().message == "theirs"


def test_unchanged_leaves_are_stored_once(repo):
  rng = np.random.default_rng(1)
  x = rng.standard_normal(100_000).astype(np.float32)
  repo.commit({"a": x, "b": x[:10]}, message="one")
  packs = repo.index.packs()
  repo.commit({"a": x.copy(), "b": x[:10]}, message="same")
  repo.commit({"moved": {"a": jnp.asarray(x)}}, message="renamed")
  assert repo.index.packs() == packs


def test_diff_counts_entries(repo, params):
  repo.commit(params, message="one")
  changed = jax.tree.map(np.array, params)
  changed["dense"]["kernel"][2, 3] += 2
  del changed["scale"]
  changed["new"] = np.ones(4, np.int8)
  changed["dense"]["bias"] = np.zeros(5, np.float16)
  repo.commit(changed, message="two")
  found = repo.diff("main~1", "main")
  assert found.added == ("new",)
  assert found.removed == ("scale",)
  assert found.changed == ("dense/bias", "dense/kernel")
  kernel = found.leaves[1]
  assert (kernel.count, kernel.largest) == (1, pytest.approx(2))
  assert "dense/kernel" in str(found)
  assert max(map(len, str(found).splitlines())) <= 100
  assert not repo.diff("main", "main")


def test_annotations(repo, params):
  commit = repo.commit(params, message="one")
  repo.annotate("main", "verdict", {"accepted": True}, author="A", time=1)
  repo.annotate(commit, "release", {"version": "1.0.0"})
  assert repo.resolve("main") == commit
  kinds = [note["kind"] for note in repo.annotations("main")]
  assert kinds == ["verdict", "release"]
  [note] = repo.annotations(commit, kind="verdict")
  assert note["payload"] == {"accepted": True}
  assert note["author"] == "A"


def test_what_is_no_json_is_refused(repo, params):
  for bad in (float("nan"), {1, 2}, np.float32(1)):
    with pytest.raises(errors.RepositoryError, match="stored as JSON"):
      repo.commit(params, message="one", recipe={"x": bad})
  assert repo.branches() == {}
  repo.commit(params, message="one", recipe={"x": 1.5})
  assert repo.show().recipe == {"x": 1.5}
  with pytest.raises(errors.RepositoryError, match="stored as JSON"):
    repo.annotate("main", "verdict", {"p": float("inf")})


def test_init_open_and_wrong_folders(tmp_path, params):
  path = tmp_path / "deep" / "repo"
  Repo.init(path).commit(params, message="one")
  assert len(Repo.init(path).log()) == 1  # as in git: not emptied
  assert Repo(path).show().message == "one"
  for wrong in (tmp_path, tmp_path / "absent", path / "patchjax.json"):
    with pytest.raises(errors.NotARepositoryError, match="patchjax init"):
      Repo(wrong)
  with pytest.raises(errors.RepositoryError, match="not empty"):
    Repo.init(tmp_path)
  with pytest.raises(errors.RepositoryError, match="URL"):
    Repo.init("gs://bucket/repo")
  (path / "patchjax.json").write_text('{"version": 99}')
  with pytest.raises(errors.FormatError, match="newer"):
    Repo(path)
  (path / "patchjax.json").write_text("not json")
  with pytest.raises(errors.FormatError, match="damaged"):
    Repo(path)


def test_log_imports_nothing_heavy(repo, params):
  repo.commit(params, message="one")
  program = (
    "import sys; from patchjax.history import Repo;"
    f"repo = Repo({repo.path!r});"
    "print(len(repo.log()), sorted(repo.branches()), repo.tags());"
    "heavy = {'jax', 'orbax', 'tensorstore', 'numpy'} & set(sys.modules);"
    "assert not heavy, heavy"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "1 ['main'] {}\n"


@pytest.mark.parametrize(
  "name", ["../../patchjax.json", "./main", "a\0b", "x" * 300, "x\udcff", ""]
)
def test_no_ref_has_a_name_that_is_none(name):
  with Repo.temporary() as repo:
    repo.commit({"w": np.zeros(1)}, message="start")
    with pytest.raises(errors.RepositoryError):
      repo.branch(name)
    with pytest.raises(errors.RefNotFoundError):
      repo.resolve(name)
    with pytest.raises(errors.RepositoryError):
      repo.commit({"w": np.ones(1)}, message="more", branch=name)
    assert list(repo.branches()) == ["main"]


@pytest.mark.parametrize("name", ["x.__lock/y", "x.__lock", "a.lock"])
def test_no_branch_looks_like_a_lock(name):
  with Repo.temporary() as repo:
    repo.commit({"w": np.zeros(1)}, message="start")
    with pytest.raises(errors.RepositoryError, match="cannot name a branch"):
      repo.branch(name)
