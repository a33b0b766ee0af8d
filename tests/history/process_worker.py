"""One of two processes with four devices each; run by `test_processes`."""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax.history import Repo
from patchjax.trees.errors import ConflictError, DtypeError, StructureError
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


if __name__ == "__main__":
  main(*sys.argv[1:])
