"""Peak memory of committing and checking out a sharded tree.

Each verb runs in a fresh process with eight simulated devices, on a tree whose
leaves are spread over all of them. Printed is the peak of the resident memory
over the bytes of the tree, with and without what the interpreter and the
libraries take before there is a tree.

Run as:
  python -m experiments.bench.memory --gib=4 --folder=/tmp
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

_GIB = flags.DEFINE_float("gib", 4.0, "size of the tree")
_FOLDER = flags.DEFINE_string("folder", None, "where the repository may lie")
_CHILD = flags.DEFINE_string("child", None, "internal: verb and repository")

_SHAPE = (2048, 8192)  # 64 MiB in float32
_VERBS = ("commit", "tune", "checkout", "checkout tuned")


def _resident(field):
  """Returns a field of /proc/self/status in bytes."""
  with open("/proc/self/status") as file:
    [line] = [line for line in file if line.startswith(f"{field}:")]
  return int(line.split()[1]) * 1024


def _measured(function):
  """Returns the peak of resident memory while a function runs."""
  # What making the tree left behind in the allocator is not what we measure.
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
  function()
  return _resident("VmHWM")


def _child(verb, path, count):
  import jax
  import numpy as np
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  jax.config.update("jax_num_cpu_devices", 8)
  from patchjax.history import Repo

  repo = Repo.init(path)
  mesh = jax.make_mesh((4, 2), ("x", "y"))
  sharding = NamedSharding(mesh, P("x", "y"))
  _ = repo.writer, repo.reader  # what they import is no part of the tree
  start = _resident("VmRSS")

  def leaf(i, scale):
    rng = np.random.default_rng(i)
    return jax.make_array_from_callback(
      _SHAPE,
      sharding,
      lambda index: (
        scale
        * rng.standard_normal(
          [len(range(*s.indices(n))) for s, n in zip(index, _SHAPE)],
          dtype=np.float32,
        )
      ),
    )

  if verb in ("commit", "tune"):
    scale = np.float32(1 if verb == "commit" else 1 + 1e-4)
    value = {f"layer{i}": leaf(i, scale) for i in range(count)}
    jax.block_until_ready(value)
    peak = _measured(lambda: repo.commit(value, message=verb))
  else:
    spec = jax.ShapeDtypeStruct(_SHAPE, np.float32, sharding=sharding)
    like = {f"layer{i}": spec for i in range(count)}
    ref = "main" if verb.endswith("tuned") else "main~1"
    found = []
    peak = _measured(
      lambda: found.append(jax.block_until_ready(repo.checkout(ref, like=like)))
    )
    assert len(found[0]) == count
  print(json.dumps({"start": start, "peak": peak}))


def main(argv):
  del argv
  count = max(1, round(_GIB.value * (1 << 30) / (4 * _SHAPE[0] * _SHAPE[1])))
  if _CHILD.value is not None:
    verb, path = _CHILD.value.split(":", 1)
    _child(verb, path, count)
    return
  size = count * 4 * _SHAPE[0] * _SHAPE[1]
  print(f"a tree of {size / (1 << 30):.2f} GiB on 8 devices")
  print(f"{'':16}{'peak / tree':>12}{'without start':>15}")
  folder = tempfile.mkdtemp(prefix="memory-", dir=_FOLDER.value)
  try:
    for verb in _VERBS:
      path = os.path.join(folder, "repo")
      command = [sys.executable, "-m", "experiments.bench.memory"]
      command += [f"--gib={_GIB.value}", f"--child={verb}:{path}"]
      said = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
      ).stdout
      found = json.loads(said.splitlines()[-1])
      peak, start = found["peak"], found["start"]
      print(f"{verb:16}{peak / size:12.2f}{(peak - start) / size:15.2f}")
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  app.run(main)
