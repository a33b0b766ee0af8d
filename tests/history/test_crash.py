"""Nothing half-written: a death at every storage operation of Python's.

`test_faults` kills real processes, before operations of native code too.
"""

import os
import types

import numpy as np

from patchjax.history import Repo
from patchjax.history.arrays import payloads
from patchjax.history.storage import local
from patchjax.trees import errors


def value_of(name, step):
  """Returns the value of a step: now all new, now nearly the same."""
  rng = np.random.default_rng([sum(name.encode()), step])
  large = np.arange(60_000, dtype=np.float32).reshape(200, 300)
  large[0] = rng.standard_normal(300)
  if step % 3 == 0:  # incompressible: goes into a checkpoint
    large = rng.standard_normal((200, 300)).astype(np.float32)
  return {
    "large": large,
    "bias": rng.standard_normal(8).astype(np.float32),
    "step": np.int32(step),
  }


def check(repo, name):
  """Every version is what its message says, whoever died when."""
  repo = Repo(repo.path)
  like = value_of(name, 0)
  history = repo.log("main")
  for commit in history[:-1]:
    step, mark = map(int, commit.message.split())
    found = repo.checkout(commit.id, like=like)
    expected = value_of(commit.author, step)
    assert found["step"] == mark
    assert np.array_equal(found["bias"], expected["bias"])
    if mark >= 0:
      assert np.array_equal(found["large"], expected["large"])
  report = repo.fsck()
  assert report.ok, str(report)
  return history, report


class Died(BaseException):
  """Stands for the end of the process: nothing may catch it and go on."""


def test_death_at_every_storage_operation(monkeypatch):
  """Whatever operation is the last one, the history is as before."""
  # The storage module's own view of `os`: Orbax, inside `payloads.save`, hangs
  # for minutes where a call of its threads does not return as it should.
  disk = types.SimpleNamespace(**vars(os))
  monkeypatch.setattr(local, "os", disk)
  operations = [(disk, name) for name in ("makedirs", "fsync", "replace")]
  operations += [(local.LocalFiles, "swap"), (payloads, "save")]
  for step in (3, 4):  # a checkpoint, a blob
    with Repo.temporary() as repo:
      first = repo.commit(value_of("a", 0), message="first")
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
              value_of("a", step), message=f"{step} {step}", author="a"
            )
            break
          except Died:
            deaths += 1
        assert Repo(repo.path).resolve("main") == first
        assert Repo(repo.path).fsck().ok
      assert deaths > 4
      history, report = check(repo, "a")
      assert len(history) == 2
      # Payloads whose index was never written.
      assert all(key.startswith("payloads/") for key in report.leftovers)
      Repo(repo.path).gc(grace=0, expire=0)
      assert check(repo, "a")[1].leftovers == ()


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
