"""One of two processes with four devices each; run by `test_processes`."""

import hashlib
import json
import os
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import patchjax as pj

MERGES = {"eager": pj.merge, "jit": jax.jit(pj.merge)}
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}
SHAPE = (64, 32)
# Rows and columns are cut; of the last every device has all.
SPECS = {"a": P("x", "y"), "b": P("x", "y"), "whole": P()}


def methods():
  """By name; made once there are devices to put numbers on."""
  return {
    "ties": pj.merging.ties(density=0.2),
    "ties_exact": pj.merging.ties(
      density=[0.2, 0.35], flavour="mergekit", scope="tree"
    ),
    "dare_ties": pj.merging.dare_ties(density=0.6, key=3),
    "breadcrumbs": pj.merging.breadcrumbs(density=0.3, gamma=0.1, scope="tree"),
  }


# (method, dtype, mesh, how, leaves): eager merges count on the host, and leaves
# that are alike share a program; under jit each has its own.
CASES = (
  ("ties", "float32", "rows", "eager", "a b whole"),
  ("ties", "bfloat16", "columns", "jit", "a whole"),
  ("ties_exact", "float32", "columns", "eager", "a b"),
  ("dare_ties", "float32", "rows", "jit", "a"),
  ("breadcrumbs", "bfloat16", "columns", "jit", "a"),
)


def models(dtype, leaves):
  """A base and two contributors: few values, so that most magnitudes tie.

  Sums of both contributors are often zero, so that the majority sign counts.

  Args:
    dtype: of the leaves.
    leaves: their names.
  """

  def model(seed, most):
    rng = np.random.default_rng(seed)
    return {
      name: rng.integers(-most, most + 1, SHAPE).astype(np.float32) / 16
      for name in leaves.split()
    }

  base = model(0, 64)
  others = [
    jax.tree.map(np.add, base, model(seed, 6 + seed)) for seed in (1, 2)
  ]
  exact = DTYPES[dtype]
  return jax.tree.map(lambda x: x.astype(exact), (base, others))


def mesh_of(axis):
  """Eight devices of Explicit axes, or of Auto axes.

  Args:
    axis: along which the two processes are: "rows" (Explicit), or "columns".
  """
  devices = np.array(jax.devices())
  if axis == "rows":
    return Mesh(devices.reshape(4, 2), ("x", "y"), (AxisType.Explicit,) * 2)
  return Mesh(devices.reshape(2, 4).T, ("x", "y"), (AxisType.Auto,) * 2)


def put(tree, mesh):
  """Each process makes its own shards."""

  def place(x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return {name: place(x, SPECS[name]) for name, x in tree.items()}


def digest(x):
  """Of the bits of an array."""
  return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def shards(tree):
  """Of each leaf what the devices of this process hold: index and digest."""
  return {
    name: [
      ([i.indices(n)[:2] for i, n in zip(s.index, x.shape)], digest(s.data))
      for s in x.addressable_shards
    ]
    for name, x in tree.items()
  }


def main(port, process):
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.distributed.initialize(
    f"localhost:{port}", num_processes=2, process_id=int(process)
  )
  assert jax.process_count() == 2 and len(jax.devices()) == 8
  found = []
  for name, dtype, axis, how, leaves in CASES:
    mesh = mesh_of(axis)
    base, others = models(dtype, leaves)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
    merged = MERGES[how](base, others, methods()[name])
    for leaf, x in merged.items():
      assert x.sharding.is_equivalent_to(base[leaf].sharding, x.ndim)
      assert x.dtype == base[leaf].dtype
    found.append(shards(merged))
  print(json.dumps(found), flush=True)
  jax.distributed.shutdown()


if __name__ == "__main__":
  try:
    main(*sys.argv[1:])
  except BaseException:
    # An orderly end would wait for the other process.
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
