"""The models that the battery of merge methods merges."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tests.merging.battery_case import SHAPE

P = jax.sharding.PartitionSpec

DTYPES = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}

SPEC = P("x", "y")


def model(seed: int, dtype: str, spread: float = 1.0) -> Any:
  """A tree of random leaves of one shape, and an integer."""
  rng = np.random.default_rng(seed)

  def draw():
    return (spread * rng.standard_normal(SHAPE)).astype(DTYPES[dtype])

  layers = {str(i): {"kernel": draw()} for i in range(2)}
  return {"layers": layers, "step": np.int32(7)}


def models(count: int, dtype: str = "float32") -> tuple[Any, list[Any]]:
  """A base, and contributors around it.

  Args:
    count: how many contributors.
    dtype: of the leaves.
  """
  base = model(0, dtype)

  def add(x, d):
    if x.dtype == np.int32:
      return x
    return (np.float32(x) + np.float32(d)).astype(x.dtype)

  near = [model(i + 1, dtype, spread=0.1) for i in range(count)]
  return base, [jax.tree.map(add, base, d) for d in near]


def named(tree: Any) -> dict[str, np.ndarray]:
  """The floating point leaves by text name, wide enough to hold them."""
  return {
    f"layers/{i}/kernel": np.asarray(layer["kernel"]).astype(np.float32)
    for i, layer in sorted(tree["layers"].items())
  }


def put(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The tree on a mesh with axes x (4) and y (2)."""

  def place(x):
    spec = SPEC if x.ndim == 2 else P()
    return jax.device_put(
      jnp.asarray(x), jax.sharding.NamedSharding(mesh, spec)
    )

  return jax.tree.map(place, tree)
