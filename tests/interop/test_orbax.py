"""Orbax checkpoints of both its APIs, and directories of their steps."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchjax import interop, trees
from patchjax.cli.app import patchjax
from patchjax.history import Record, Repo
from patchjax.history.arrays.state import arrays
from patchjax.trees import dtypes
from patchjax.trees.errors import FormatError

# Orbax warns of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


def tree(step=0):
  params = {"a": jnp.full((2, 3), step, jnp.bfloat16), "b": [np.arange(2.0)]}
  return {
    "params": params,
    "opt": optax.adam(1e-3).init({"a": params["a"]}),
    "wide": np.arange(2) + 2**40,
    "key": jax.random.key(step),
    "rbg": jax.random.key(1, impl="rbg"),
    "step": step,
    "rate": 0.5,
    "on": True,
  }


def ids(value):
  return trees.tree_id(arrays(trees.named_leaves(value)))


def v0_manager(path, steps, **options):
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(**options)
  with ocp.CheckpointManager(path, options=options) as manager:
    for step in steps:
      manager.save(step, args=ocp.args.StandardSave(tree(step)))


def v0_items(path, steps):
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    step_prefix="ckpt",
    step_format_fixed_length=6,
    best_fn=lambda metrics: metrics["loss"],
  )
  with ocp.CheckpointManager(path, options=options) as manager:
    for step in steps:
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(tree(step)),
        data=ocp.args.JsonSave({"at": step}),
      )
      manager.save(step, args=items, metrics={"loss": step / 2})


def v1_manager(path, steps):
  from orbax.checkpoint import v1 as ocp

  with ocp.training.Checkpointer(path) as saver:
    for step in steps:
      saver.save(step, tree(step), metrics={"loss": step / 2})


def v0_pytree(path):
  import orbax.checkpoint as ocp

  ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, {**tree(7), "name": "x"})


def v0_standard(path):
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as saver:
    saver.save(path, tree(7))


def v1_save(path):
  from orbax.checkpoint import v1 as ocp

  ocp.save(path, {**tree(7), "name": "x"})


@pytest.mark.parametrize("save", [v0_pytree, v0_standard, v1_save])
def test_checkpoints_come_back_whole(tmp_path, save, monkeypatch):
  save(tmp_path / "c")
  expected = tree(7)
  if save is not v0_standard:  # which takes no texts
    expected["name"] = Record("x")
  monkeypatch.chdir(tmp_path)
  found = interop.read("c")
  assert ids(found) == ids(expected)
  assert found["on"] is True and found.get("name") == expected.get("name")
  assert type(found["step"]) is int
  assert found["key"].dtype == expected["key"].dtype


@pytest.mark.parametrize(
  "save, place, items",
  [
    (v0_manager, "1", False),
    (v0_manager, "1/default", False),
    (v1_manager, "1", False),
    (v1_manager, "1/state", False),
    (v0_items, "ckpt_000001", True),
    (v0_items, "ckpt_000001/state", False),
  ],
)
def test_one_step_of_a_run_is_a_checkpoint(tmp_path, save, place, items):
  save(tmp_path / "run", [1])
  expected = tree(1)
  if items:
    expected = {"state": expected, "data": Record({"at": 1})}
  assert ids(interop.read(tmp_path / "run" / place)) == ids(expected)


@pytest.mark.parametrize("save", [v0_manager, v0_items, v1_manager])
def test_a_run_becomes_a_history(tmp_path, save):
  run = tmp_path / "run"
  before = datetime.datetime.now(datetime.UTC)
  save(run, [0, 5])
  (run / "7.orbax-checkpoint-tmp-12").mkdir()  # not finished
  (run / "notes").mkdir()
  repo = Repo.init(tmp_path / "repo")
  made = interop.import_(repo, run, message="baseline", author="Me")
  assert [repo.show(commit).title for commit in made] == [
    "baseline: step 0",
    "baseline: step 5",
  ]
  first, last = (repo.show(commit) for commit in made)
  assert last.parents == (first.id,) and last.author == "Me"
  assert before < first.when < last.when < datetime.datetime.now(datetime.UTC)
  assert last.recipe["step"] == 5
  with_metrics = save is not v0_manager
  assert last.recipe["metrics"] == ({"loss": 2.5} if with_metrics else {})
  expected = tree(5)
  if save is v0_items:
    expected = {"state": expected, "data": Record({"at": 5})}
  assert ids(repo.checkout(made[1], like=expected)) == ids(expected)
  # What did not change is stored once.
  leaf = "state/wide" if save is v0_items else "wide"
  assert repo.tree(made[0])[leaf] == repo.tree(made[1])[leaf]
  # Run again, it takes what is new.
  assert interop.import_(repo, run) == []
  save(run, [9])
  (added,) = interop.import_(repo, run)
  assert repo.show(added).title == "step 9"
  assert len(repo.log()) == 3 and repo.fsck().ok


def test_an_import_that_was_interrupted_goes_on(tmp_path):
  v1_manager(tmp_path / "run", [1, 2, 3])
  repo = Repo.init(tmp_path / "repo")
  seen = []

  def stop(what, done, total):
    seen.append((what, done, total))
    if done == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interop.import_(repo, tmp_path / "run", progress=stop)
  assert seen == [("step 1", 0, 3), ("step 2", 1, 3), ("step 3", 2, 3)]
  interop.import_(repo, tmp_path / "run")
  assert [c.recipe["step"] for c in repo.log()] == [3, 2, 1]


def test_a_directory_of_steps_is_no_tree(tmp_path):
  v0_manager(tmp_path / "run", [1, 5])
  with pytest.raises(FormatError, match=r"the 2 steps '1', '5' .*import all"):
    interop.read(tmp_path / "run")


def test_one_step_twice_is_refused(tmp_path):
  v1_manager(tmp_path / "run", [1])
  (tmp_path / "run" / "1").rename(tmp_path / "run" / "old_1")
  v1_manager(tmp_path / "run", [1])
  with pytest.raises(
    FormatError, match="step 1 is there twice, as 1 and old_1"
  ):
    interop.import_(Repo.init(tmp_path / "repo"), tmp_path / "run")


def some(name):
  kind = dtypes.KINDS[name]
  shape = (3, 2) if kind.words == 2 else (3,)
  words = np.random.default_rng(0).integers(
    0, 2**kind.bits - 1, shape, np.uint64
  )
  return dtypes.from_words(words.astype(kind.word), name)


def test_an_export_comes_back_with_every_dtype_there_is(tmp_path):
  value = {name: some(name) for name in dtypes.KINDS}
  value |= {"empty": np.zeros((0, 3), "int8"), "key": jax.random.key(3)}
  value |= {"nested": {"a/b": np.float32(1), "c~": np.float32([2])}}
  for name, more in {"plain": {}, "flat": {"x.y": some("int8")}}.items():
    value |= more | ({"x": {"y": some("int8")}} if more else {})
    with Repo.temporary() as repo:
      repo.commit(value, message="all")
      interop.export(repo, "main", tmp_path / name)
      assert trees.tree_id(interop.read(tmp_path / name)) == repo.show().tree


@pytest.mark.parametrize(
  "damage, error",
  [
    (lambda c: (c / "state" / "_METADATA").write_text("{"), "not a readable"),
    (lambda c: (c / "state" / "_METADATA").unlink(), "neither a pytree nor"),
    (lambda c: (c / "state" / "manifest.ocdbt").unlink(), "not a readable"),
  ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, error):
  v1_save(tmp_path / "c")
  damage(tmp_path / "c")
  with pytest.raises(FormatError, match=error):
    interop.read(tmp_path / "c")


def test_the_command_imports_runs_and_exports_versions(tmp_path, monkeypatch):
  from click.testing import CliRunner

  def command(*arguments):
    done = CliRunner().invoke(patchjax, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout

  monkeypatch.chdir(tmp_path)
  command("init", ".")
  v1_manager(tmp_path / "run", [1, 2])
  interop.write("a.npz", {"w": np.ones(2)})
  text = command("import", "run", "a.npz", "-m", "old", "-b", "runs/1")
  lines = text.splitlines()
  assert [line.split("] ")[1] for line in lines] == [
    "old: step 1",
    "old: step 2",
    "old",
  ]
  assert "runs/1 has all of it already" in command(
    "import", "run", "-b", "runs/1"
  )
  text = command("export", "runs/1", "b.npz")
  assert text == "wrote b.npz\n"
  assert trees.tree_id(interop.read("b.npz")) == Repo(".").show("runs/1").tree
  command("export", "runs/1~1", "c", "--only", "params/.*")
  assert set(interop.read("c")) == {"params"}
  command("export", "runs/1", "d.v1", "--format", "safetensors")
  assert interop.read("d.v1")["w"].tolist() == [1, 1]
