"""Small models for the merging tests, made by numpy."""

import jax
import jax.numpy as jnp
import numpy as np

P = jax.sharding.PartitionSpec

SPECS = {
  "block": {"kernel": P("x", "y")},
  "heads": [P(None, ("x", "y"), None)],
  "step": P(),
}

DTYPES = {
  "float32": np.float32,
  "bfloat16": jnp.bfloat16,
  "float16": np.float16,
}


def model(seed, dtype="float32", spread=1.0):
  """A tree of three leaves; `seed` 0 is the base."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return (spread * rng.standard_normal(shape)).astype(DTYPES[dtype])

  return {
    "block": {"kernel": draw(32, 16)},
    "heads": [draw(4, 16, 2)],
    "step": np.int32(7),
  }


def models(count=3, dtype="float32"):
  """A base, and contributors around it."""
  base = model(0, dtype)
  near = [model(i + 1, dtype, 0.1) for i in range(count)]

  def add(x, d):
    if x.dtype == np.int32:
      return x
    return (np.float32(x) + np.float32(d)).astype(x.dtype)

  return base, [jax.tree.map(add, base, d) for d in near]


def floats(tree):
  """The floating point leaves as float32 arrays, in tree order."""
  return [
    np.asarray(x).astype(np.float32)
    for x in jax.tree.leaves(tree)
    if x.dtype != np.int32
  ]


def put(tree, mesh):
  """The tree, sharded over a mesh with axes x (4) and y (2)."""
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)),
    tree,
    SPECS,
  )


def same_bits(a, b):
  """Whether two trees hold the same numbers in the same dtypes."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in pairs
  )
