"""The training hook: what is kept, what goes, and what survives a kill."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.history import Checkpointer, Record, Repo
from patchjax.trees import errors
from tests.history import trainer

SIZE = 40_000  # bytes of a leaf that is stored in a blob of its own


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def state(step):
  rng = np.random.default_rng(step)
  return {
    "params": {"w": jnp.asarray(rng.standard_normal(SIZE // 4, np.float32))},
    "step": step,
    "data": Record({"at": step}),
  }


def same(a, b):
  return trainer.digest(a) == trainer.digest(b)


def run(repo, steps, losses=None, **options):
  with Checkpointer(repo, grace=0, **options) as saver:
    for step in steps:
      loss = None if losses is None else {"loss": losses[step]}
      saver.save(step, state(step), metrics=loss)
  return saver


def stored(repo):
  """Titles of all commits that lie in a repository."""
  titles = []
  for key in repo.files.walk("objects"):
    name = key.removeprefix("objects/").replace("/", "")
    try:
      titles.append(repo.objects.commit(name).title)
    except errors.IntegrityError:
      pass
  return sorted(titles)


def test_without_rules_every_step_is_a_version_of_one_chain(repo):
  saver = run(repo, range(1, 21), every=5)
  assert saver.all_steps == (5, 10, 15, 20)
  assert [c.title for c in repo.log()] == [
    "step 20",
    "step 15",
    "step 10",
    "step 5",
  ]
  assert repo.tags().keys() == {f"steps/main/{n}" for n in (5, 10, 15, 20)}
  assert repo.diff("steps/main/5", "steps/main/20").changed
  for step in saver.all_steps:
    back = saver.restore(state(0), step=step)
    assert same(back, state(step)) and type(back["step"]) is int
  assert repo.fsck().ok


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_not_kept_is_gone_to_the_last_byte(repo, asynchronous):
  losses = {step: abs(step - 7) for step in range(1, 15)}
  saver = run(
    repo,
    range(1, 15),
    losses,
    keep_last=2,
    keep_every=6,
    keep_best=("loss", "min"),
    asynchronous=asynchronous,
  )
  assert saver.all_steps == (6, 7, 12, 13, 14)
  assert saver.best_step == 7 and saver.latest_step == 14
  assert saver.metrics(7) == {"loss": 0}
  titles = [f"step {n}: loss {losses[n]}" for n in saver.all_steps]
  assert stored(repo) == sorted(titles)
  blobs = [repo.files.path(key) for key in repo.files.walk("blobs")]
  assert sum(map(os.path.getsize, blobs)) < 5 * SIZE * 1.05
  assert same(saver.restore(state(0), step="best"), state(7))
  # The chain of what stays for good, with the newest step at its end.
  assert [c.title for c in repo.log()] == [titles[4], titles[2], titles[0]]
  assert [c.title for c in repo.log("steps/main/7")] == [titles[1], titles[0]]
  assert repo.blame()["params/w"].title == titles[4]
  assert repo.fsck().ok


def test_ids_of_kept_steps_never_change(repo):
  seen = {}
  with Checkpointer(repo, keep_last=2, keep_every=3, grace=0) as saver:
    for step in range(1, 10):
      saver.save(step, state(step))
      saver.wait()
      for name, commit in repo.tags().items():
        assert seen.setdefault(name, commit) == commit


def test_the_newest_step_is_kept_whatever_the_rules_say(repo):
  assert run(repo, range(1, 6), keep_every=10).all_steps == (5,)


def test_another_process_goes_on_with_the_run(repo):
  run(repo, range(1, 5), keep_last=2)
  again = Checkpointer(Repo(repo.path), keep_last=2, grace=0)
  assert again.latest_step == 4
  assert again.save(5, state(5))
  assert again.all_steps == (4, 5)
  again.close()


def test_a_run_starts_from_what_its_branch_is_at(repo):
  repo.commit(state(0), message="pretrained")
  run(repo, range(1, 4), keep_last=1)
  assert [c.title for c in repo.log()] == ["step 3", "pretrained"]
  # Runs side by side have a branch each; one may start from a step.
  repo.branch("retry", at="steps/main/3")
  saver = run(repo, range(2, 5), branch="retry", keep_last=1)
  assert saver.all_steps == (4,)
  assert [c.title for c in repo.log("retry")] == [
    "step 4",
    "step 3",
    "pretrained",
  ]
  assert run(repo, (), keep_last=1).all_steps == (3,)


def test_work_of_others_on_the_branch_is_followed(repo):
  run(repo, range(1, 4), keep_last=1)
  repo.commit(state(99), message="mended by hand")
  run(repo, range(4, 6), keep_last=1)
  titles = [c.title for c in repo.log()]
  assert titles == ["step 5", "mended by hand", "step 3"]


def test_steps_only_go_up(repo):
  run(repo, (1, 2), keep_last=2)
  with Checkpointer(repo) as saver:
    for step in (1, 2):
      with pytest.raises(errors.ConflictError, match="a branch of its own"):
        saver.save(step, state(step))
    assert saver.all_steps == (1, 2)


def test_force_stores_the_last_step(repo):
  with Checkpointer(repo, every=10) as saver:
    assert [saver.save(step, state(step)) for step in (9, 10, 11)] == [
      False,
      True,
      False,
    ]
    assert saver.save(np.int32(12), state(12), force=True)
    assert saver.all_steps == (10, 12)


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(repo):
  repo.commit(state(0), message="start")
  repo.tag("steps/main/2/mine")  # where the tag of step 2 would have to be
  saver = Checkpointer(repo)
  saver.save(1, state(1))
  assert saver.save(2, state(2))
  with pytest.raises(errors.RepositoryError, match="steps/main/2/mine"):
    saver.save(3, state(3))
  assert saver.save(3, state(3)) and saver.all_steps == (1, 3)
  saver.save(4, state(4))
  repo.refs.move(
    "refs/tags", "steps/main/5/mine", old=None, new=repo.resolve("main")
  )
  saver.save(5, state(5))
  with pytest.raises(errors.RepositoryError, match="steps/main/5/mine"):
    saver.close()
  assert Checkpointer(repo).all_steps == (1, 3, 4)


def test_values_may_be_donated_at_once(repo):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros(SIZE)
  with Checkpointer(repo) as saver:
    for number in range(4):
      saver.save(number, {"x": x})
      x = step(x)
  for number in saver.all_steps:
    assert saver.restore(step=number)["x"].tolist() == [number] * SIZE


def script(path, *lines):
  """Runs a program that leaves a checkpointer without closing it."""
  start = f"""
import numpy as np
from patchjax.history import Checkpointer, Repo
repo = Repo({str(path)!r})
saver = Checkpointer(repo)
"""
  code = start + "\n".join(lines)
  return subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stderr


# Whether Python still lets a thread work once the program has ended is a
# matter of timing: these programs live until it is clear how it went, and
# never ask.
UNTIL_CLEAR = "saver.all_steps"


def test_who_does_not_wait_is_told(tmp_path):
  repo = Repo.init(tmp_path)
  Checkpointer(repo, asynchronous=False).save(1, state(1))
  tip = repo.resolve("main")
  repo.refs.move("refs/tags", "steps/main/2/x", old=None, new=tip)
  told = script(tmp_path, 'saver.save(2, {"w": np.ones(2)})', UNTIL_CLEAR)
  assert "last step of a Checkpointer was not stored" in told
  assert "steps/main/2/x" in told
  assert Checkpointer(repo).all_steps == (1,)


def test_what_went_well_needs_no_waiting(tmp_path):
  repo = Repo.init(tmp_path)
  told = script(tmp_path, 'saver.save(1, {"w": np.ones(2)})', UNTIL_CLEAR)
  assert told == "" and Checkpointer(repo).all_steps == (1,)


def test_a_program_that_ends_at_once_stores_the_step_or_says_so(tmp_path):
  repo = Repo.init(tmp_path)
  told = script(tmp_path, 'saver.save(1, {"w": np.ones(2)})')
  stored = Checkpointer(repo).all_steps == (1,)
  assert stored == ("not stored" not in told), told


def test_metrics_that_are_no_numbers_do_not_stop_a_run(repo):
  losses = {1: float("nan"), 2: jnp.float32(3), 3: float("inf"), 4: np.int8(5)}
  saver = run(repo, losses, losses, keep_best=("loss", "min"))
  assert saver.all_steps == (2, 4) and saver.best_step == 2
  assert repo.show().title == "step 4: loss 5"
  with pytest.raises(errors.RepositoryError, match="metric 'loss': expected"):
    saver.save(5, state(5), metrics={"loss": "high"})


def test_what_is_not_there_is_said(repo):
  saver = Checkpointer(repo, keep_last=1, keep_best=("loss", "max"))
  assert saver.latest_step is None and saver.best_step is None
  with pytest.raises(errors.RefNotFoundError, match="nothing was saved yet"):
    saver.restore(state(0))
  saver.save(1, state(1))
  with pytest.raises(errors.RefNotFoundError, match="kept are: 1"):
    saver.restore(state(0), step=7)
  with pytest.raises(errors.RefNotFoundError, match="with that metric"):
    saver.restore(state(0), step="best")
  with pytest.raises(ValueError, match="expected a number"):
    saver.restore(state(0), step="first")
  saver.close()
  with pytest.raises(ValueError, match="which step is best"):
    _ = Checkpointer(repo).best_step
  for wrong in ({"every": 0}, {"keep_last": -1}, {"keep_every": 1.5}):
    with pytest.raises(ValueError, match="at least 1"):
      Checkpointer(repo, **wrong)
  with pytest.raises(ValueError, match="expected .metric"):
    Checkpointer(repo, keep_best=("loss", "least"))


def test_only_reads_the_parameters(repo):
  saver = run(repo, [1])
  assert set(saver.restore(only="params/.*")) == {"params"}


@pytest.mark.parametrize("at", range(1, 5))
def test_a_death_between_any_two_moves_loses_nothing(repo, monkeypatch, at):
  rules = {"keep_last": 2, "keep_every": 4, "grace": 0}
  with Checkpointer(repo, **rules) as saver:
    for step in range(1, 4):
      saver.save(step, state(step))
  # A save moves a tag and the branch, and removes a tag; then gc.
  moves = []

  def swap(*arguments, **options):
    moves.append(arguments)
    if len(moves) == at:
      raise SystemExit("killed")
    return real(*arguments, **options)

  real = repo.files.swap
  with monkeypatch.context() as patched, pytest.raises(SystemExit):
    patched.setattr(repo.files, "swap", swap)
    with Checkpointer(repo, **rules) as saver:
      saver.save(4, state(4))
      saver.save(5, state(5))
  again = Checkpointer(Repo(repo.path), **rules)
  latest = again.latest_step
  assert latest == (3 if at == 1 else 4)
  for step in again.all_steps:
    assert same(again.restore(state(0), step=step), state(step))
  for step in range(latest + 1, 8):
    again.save(step, state(step))
  again.close()
  assert again.all_steps == (4, 6, 7)
  assert stored(repo) == ["step 4", "step 6", "step 7"]
  assert repo.fsck().ok


def test_killed_at_any_moment_it_goes_on_as_if_nothing_happened(
  tmp_path, tmp_path_factory
):
  shared = tmp_path_factory.getbasetemp()
  rng = random.Random(0)
  path, steps = tmp_path / "repo", 24
  for kill_at in (3, 12):
    process = trainer.begin(shared, "loop", path, steps)
    for line in process.stdout:
      if line.startswith("step") and int(line.split()[1]) >= kill_at:
        time.sleep(rng.random() / 20)
        process.kill()
        break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert Repo(path).fsck().ok
    with Checkpointer(Repo(path), keep_last=2) as saver:
      assert kill_at - 2 <= saver.latest_step
  first, *_, ended = trainer.process(shared, "loop", path, steps)
  assert int(first.removeprefix("from ")) >= 10
  assert ended == trainer.process(shared, "run", tmp_path / "whole", steps)[-1]


def test_two_processes_keep_one_run(repo, tmp_path_factory):
  repo.commit({"w": np.zeros(8, np.float32)}, message="start")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  shared = tmp_path_factory.getbasetemp()
  pair = [
    trainer.begin(shared, "pair", repo.path, port, process)
    for process in range(2)
  ]
  said = [process.communicate(timeout=120)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0]
  for text in said:
    seen = ["RepositoryError", (3, 4), (4, 6, 7)]
    assert text.splitlines()[-1] == str(seen)
  assert repo.fsck().ok
