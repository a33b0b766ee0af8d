"""One of two processes with four devices each; run by `test_processes`."""

import contextlib
import fcntl
import json
import os
import resource
import struct
import sys
import time
import traceback

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax.history import Repo
from patchjax.trees.errors import (
  ConflictError,
  DtypeError,
  RepositoryError,
  StructureError,
)
from tests.history import layouts


def main(port, process, path):
  process = int(process)
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_enable_x64", True)
  jax.distributed.initialize(
    f"localhost:{port}", num_processes=2, process_id=process
  )
  assert jax.process_count() == 2 and len(jax.devices()) == 8
  repo = Repo(path)
  report = {}
  start = repo.resolve("main")
  for number, layout in enumerate(layouts.LAYOUTS):
    host = layouts.host_value(number)
    keys = layouts.keys(number)
    value = layouts.place(layout, host) | layouts.place_keys(layout, keys)
    commit = repo.commit(
      value,
      message=layout,
      branch=layout,
      parents=[start],
      time=number,
      author="both",
    )
    report[layout] = commit
    found = repo.checkout(commit, like=value)
    layouts.check_local(found, host | keys)
    for name, x in found.items():
      assert getattr(x, "sharding", None) == getattr(
        value[name], "sharding", None
      )
  report["same"] = unchanged(repo)
  report["deltas"] = deltas(repo)
  report["restored"] = restored(repo)
  errors(repo, process)
  in_background(repo, process, start)
  report["background"] = one_after_the_other(repo)
  overtaken(repo, process)
  cannot_write(repo, process)
  print(json.dumps(report), flush=True)
  jax.distributed.shutdown()


def unchanged(repo):
  """The same value in another sharding stores nothing."""
  host = layouts.host_value(1)
  packs = repo.index.packs()
  for layout in ("crossed", "numpy"):
    repo.commit(layouts.place(layout, host), message="same", branch="auto")
  assert repo.index.packs() == packs
  return repo.show("auto").tree


def deltas(repo):
  """Differences are made shard by shard, from memory or from the files."""
  names = []
  for step in range(3):
    host = layouts.host_value(1)
    x = host["large"] * np.float32(1 + 1e-4 * (step + 1))
    layout = ("rows", "explicit", "auto")[step]
    value = layouts.place(layout, host | {"large": x})
    repo.commit(value, message=f"tuned {step}", branch="auto")
    digest = repo.tree("auto")["large"].digest
    repo.index.refresh()
    names.append(repo.index.find([digest])[digest][0].encoding)
  return names


def restored(repo):
  """What one process committed is read by two, each its own shards."""
  want = layouts.host_value(100)
  for layout in ("explicit", "crossed", "replicated", "partial"):
    like = {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=layouts.sharding_of(layout, x.shape)
      )
      for name, x in want.items()
    }
    layouts.check_local(repo.checkout("main", like=like), want)
  return len(want)


def errors(repo, process):
  """What goes wrong in one process is raised in both, and nobody waits."""
  fine = {"x": np.arange(4.0)}

  def refuses(kind, text, value, **options):
    tip = repo.resolve("numpy")
    try:
      repo.commit(value, message="wrong", branch="numpy", **options)
    except kind as error:
      assert text in str(error), error
    else:
      raise AssertionError(f"{text}: was committed")
    assert repo.resolve("numpy") == tip

  refuses(StructureError, "other values", {"x": np.arange(4.0) + process})
  refuses(StructureError, "other names", {f"x{process}": np.arange(4.0)})
  bad = {"x": np.array(["text"])} if process else fine
  refuses(DtypeError, "cannot be committed", bad)
  refuses(ConflictError, "is at", fine, parents=["main"])
  mesh = layouts.meshes()["auto"]
  x = jax.make_array_from_callback(
    (8,), NamedSharding(mesh, P("x")), lambda index: np.arange(8.0)[index]
  )
  if process:
    jax.tree.map(lambda x: x.delete(), x)
  refuses(DtypeError, "deleted", {"x": x})
  repo.commit(fine, message="fine again", branch="numpy")


@contextlib.contextmanager
def held(repo, branch, process):
  """Holds the lock that a branch is moved under: a move has to wait."""
  if process:
    yield
    return
  with open(repo.files.path(f"refs/heads/{branch}.__lock"), "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
    yield


def in_background(repo, process, start):
  """Nothing is recorded when `commit_async` returns, and all is captured."""
  host = layouts.host_value(20) | {"mine": np.arange(300_000.0)}
  value = layouts.place("explicit", host) | {"mine": host["mine"].copy()}
  facts = {"message": "one", "parents": [start], "time": 20, "author": "both"}
  with held(repo, "async", process):
    pending = repo.commit_async(value, branch="async", **facts)
    try:
      pending.result(timeout=0.1)
    except TimeoutError:
      pass
    else:
      raise AssertionError("it did not wait for the lock")
    assert not pending.done() or process
    assert "async" not in repo.branches()
    value["mine"][:] = 0
    donate = jax.jit(lambda x: x * 0, donate_argnums=0)
    donate(value["large"]).block_until_ready()
    for x in value.values():
      if isinstance(x, jax.Array):
        x.delete()
  commit = pending.result()
  assert pending.done() and commit == pending.result() == repo.resolve("async")
  like = {
    name: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=layouts.sharding_of("rows", x.shape)
    )
    for name, x in host.items()
    if name != "mine"
  } | {"mine": host["mine"]}
  layouts.check_local(repo.checkout(commit, like=like), host)
  # Chunks and compression are those of any commit.
  again = layouts.place("rows", host)
  assert repo.commit(again, branch="again", **facts) == commit


def one_after_the_other(repo):
  """Differences of commits that were not recorded when the next began."""
  start = repo.resolve("async")
  large = layouts.host_value(20)["large"]
  pending = []
  for step in range(3):
    x = large * np.float32(1 + 1e-4 * (step + 1))
    value = layouts.place("auto", {"large": x, "step": np.float32(step)})
    pending.append(
      repo.commit_async(value, message=f"step {step}", branch="async")
    )
  with pending[0] as last:
    pass
  ids = [each.result() for each in pending]
  assert ids[0] == last.result()
  assert [c.id for c in repo.log("async")][:4] == [*ids[::-1], start]
  digest = repo.tree("async")["large"].digest
  repo.index.refresh()
  return repo.index.find([digest])[digest][0].encoding


def overtaken(repo, process):
  """Whose branch was moved meanwhile is told so, in both processes."""
  value = layouts.place("auto", {"large": layouts.host_value(21)["large"]})
  with held(repo, "async", process):
    pending = repo.commit_async(value, message="late", branch="async")
    if not process:
      path = repo.files.path("refs/heads/async")
      with open(f"{path}.new", "w") as file:
        file.write(repo.resolve("main") + "\n")
      os.replace(f"{path}.new", path)
  for _ in range(2):
    try:
      pending.result()
    except ConflictError as error:
      assert "async" in str(error), error
    else:
      raise AssertionError("it was committed")
  assert repo.resolve("async") == repo.resolve("main")


def cannot_write(repo, process):
  """What one process cannot write is recorded by none, and all are told."""
  free = resource.getrlimit(resource.RLIMIT_FSIZE)
  tip = repo.resolve("numpy")
  for seed in (22, 23):
    host = {"large": layouts.host_value(seed)["large"]}
    if process:
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, free[1]))
    pending = repo.commit_async(
      layouts.place("explicit", host), message="too large", branch="numpy"
    )
    if seed == 22:  # else the next commit finds out
      try:
        pending.result()
      except RepositoryError as error:
        assert "OUT_OF_RANGE: Error writing" in str(error), error
      else:
        raise AssertionError("it was committed")
    while process and not pending.done():
      time.sleep(0.01)  # this one fails first; the other waits for it
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    value = layouts.place("explicit", host)
    after = repo.commit_async(value, message="it fits", branch="numpy")
    assert repo.show(after.result()).parents == (tip,)
    tip = after.result()
    layouts.check_local(repo.checkout("numpy", like=value), host)


if __name__ == "__main__":
  try:
    main(*sys.argv[1:])
  except BaseException:
    # An orderly end would wait for the other process.
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
