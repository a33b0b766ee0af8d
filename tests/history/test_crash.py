"""Nothing half-written: killed writers, racing writers."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np

from patchjax.history import Repo, files, payloads
from patchjax.trees import errors
from tests.history import writer

PROGRAM = pathlib.Path(writer.__file__)
KILLS = 6


def start(repo, name, first, count):
  process = subprocess.Popen(
    [sys.executable, str(PROGRAM), repo.path, name, str(first), str(count)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n", process.stderr.read()
  return process


def check(repo, name):
  """Every version is what its message says, whoever died when."""
  repo = Repo(repo.path)
  like = writer.value_of(name, 0)
  history = repo.log("main")
  for commit in history[:-1]:
    step, mark = map(int, commit.message.split())
    found = repo.checkout(commit.id, like=like)
    expected = writer.value_of(commit.author, step)
    assert found["step"] == mark
    assert np.array_equal(found["bias"], expected["bias"])
    if mark >= 0:
      assert np.array_equal(found["large"], expected["large"])
  report = repo.fsck()
  assert report.ok, str(report)
  return history, report


def test_kill_at_random_moments():
  """Kill -9 at any moment leaves every ref readable and exact."""
  rng = random.Random(0)
  leftovers = dangling = 0
  with Repo.temporary() as repo:
    first = repo.commit(writer.value_of("a", 0), message="first")
    for trial in range(KILLS):
      process = start(repo, "a", 300 * (trial + 1), 300)
      # The first commit writes a checkpoint, so all is imported after it.
      assert process.stdout.readline()
      time.sleep(rng.uniform(0.0, 0.8))
      process.send_signal(signal.SIGKILL)
      said = process.communicate()[0].split()
      history, report = check(repo, "a")
      # What was answered was in the history for good.
      assert set(said) <= {commit.id for commit in history}
      dangling += len(report.dangling)
      repo.commit(writer.value_of("a", 7), message="7 7", author="a")
      leftovers += len(report.leftovers)
    assert history[-1].id == first
  print(f"{len(history)} commits, {leftovers} leftovers, {dangling} dangling")


class Died(BaseException):
  """Stands for the end of the process: nothing may catch it and go on."""


def test_death_at_every_storage_operation(monkeypatch):
  """Whatever operation is the last one, the history is as before."""
  # The storage module's own view of `os`: Orbax, inside `payloads.save`, hangs
  # for minutes where a call of its threads does not return as it should.
  disk = types.SimpleNamespace(**vars(os))
  monkeypatch.setattr(files, "os", disk)
  operations = [(disk, name) for name in ("makedirs", "fsync", "replace")]
  operations += [(files.LocalFiles, "swap"), (payloads, "save")]
  for step in (3, 4):  # a checkpoint, a blob
    with Repo.temporary() as repo:
      first = repo.commit(writer.value_of("a", 0), message="first")
      deaths = 0
      while True:
        lives = iter(range(deaths))

        def dying(real, lives=lives):
          def call(*args, **kwargs):
            if next(lives, None) is None:
              raise Died
            return real(*args, **kwargs)

          return call

        fresh = Repo(repo.path)
        with monkeypatch.context() as patched:
          for owner, name in operations:
            patched.setattr(owner, name, dying(getattr(owner, name)))
          try:
            fresh.commit(
              writer.value_of("a", step), message=f"{step} {step}", author="a"
            )
            break
          except Died:
            deaths += 1
        assert Repo(repo.path).resolve("main") == first
        assert Repo(repo.path).fsck().ok
      assert deaths > 4
      history, report = check(repo, "a")
      assert len(history) == 2
      assert not report.leftovers


def test_two_writers_never_lose_a_commit():
  """Each of two processes commits 10 times; the loser of a race tries again."""
  with Repo.temporary() as repo:
    repo.commit(writer.value_of("a", 0), message="first")
    processes = [start(repo, name, 0, 10) for name in ("a", "b")]
    said = []
    for process in processes:
      out, err = process.communicate(timeout=120)
      assert process.returncode == 0, err
      said += out.split()
    history, _ = check(repo, "a")
    assert len(history) == 21
    assert {commit.id for commit in history[:-1]} == set(said)


def test_the_loser_is_told():
  with Repo.temporary() as repo:
    first = repo.commit({"x": np.zeros(3)}, message="first")
    theirs, mine = Repo(repo.path), Repo(repo.path)
    theirs.commit({"x": np.ones(3)}, message="theirs", parents=[first])
    try:
      mine.commit({"x": np.full(3, 2.0)}, message="mine", parents=[first])
    except errors.ConflictError as error:
      assert "main" in str(error)
    else:
      raise AssertionError("a commit was lost")
