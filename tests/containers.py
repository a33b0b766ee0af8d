"""One small model in every container that JAX users keep weights in.

Each builder returns a pytree whose leaves are NAMES (or, where the framework
dictates names, its own), filled from the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NAMES = ("blocks/0/bias", "blocks/0/kernel", "blocks/1/bias", "blocks/1/kernel")
SHAPES = {"bias": (3,), "kernel": (3, 3)}


def leaf(name: str, start: float = 0.0) -> jax.Array:
  shape = SHAPES[name.rsplit("/")[-1]]
  size = 9 if len(shape) == 2 else 3
  offset = start + 100.0 * NAMES.index(name) if name in NAMES else start
  return (jnp.arange(size, dtype=jnp.float32) + offset).reshape(shape)


def pure_dict(start: float = 0.0) -> Any:
  return {
    "blocks": {
      i: {part: leaf(f"blocks/{i}/{part}", start) for part in SHAPES}
      for i in range(2)
    }
  }


def text_dict(start: float = 0.0) -> Any:
  return {"blocks": {str(i): b for i, b in pure_dict(start)["blocks"].items()}}


def nested_list(start: float = 0.0) -> Any:
  return {"blocks": [pure_dict(start)["blocks"][i] for i in range(2)]}


def nested_tuple(start: float = 0.0) -> Any:
  return {"blocks": tuple(nested_list(start)["blocks"])}


def nnx_module(start: float = 0.0) -> Any:
  from flax import nnx

  class Block(nnx.Module):
    def __init__(self, i):
      self.kernel = nnx.Param(leaf(f"blocks/{i}/kernel", start))
      self.bias = nnx.Param(leaf(f"blocks/{i}/bias", start))

  class Model(nnx.Module):
    def __init__(self):
      self.blocks = nnx.List([Block(0), Block(1)])

  return Model()


def nnx_state(start: float = 0.0) -> Any:
  from flax import nnx

  return nnx.state(nnx_module(start), nnx.Param)


def nnx_pure(start: float = 0.0) -> Any:
  from flax import nnx

  return nnx.to_pure_dict(nnx_state(start))


def linen_boxed(start: float = 0.0) -> Any:
  from flax import linen as nn

  def block(i):
    def init(part, axes):
      return nn.with_partitioning(
        lambda key: leaf(f"blocks/{i}/{part}", start), axes
      )(jax.random.key(0))

    return {
      "kernel": init("kernel", (None, "model")),
      "bias": init("bias", ("model",)),
    }

  return {"blocks": {str(i): block(i) for i in range(2)}}


def equinox_module(start: float = 0.0) -> Any:
  import equinox as eqx

  class Block(eqx.Module):
    kernel: jax.Array
    bias: jax.Array

  class Model(eqx.Module):
    blocks: list

  return Model(
    [
      Block(leaf(f"blocks/{i}/kernel", start), leaf(f"blocks/{i}/bias", start))
      for i in range(2)
    ]
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Holder:
  blocks: Any


def dataclass_holder(start: float = 0.0) -> Any:
  return _Holder(nested_list(start)["blocks"])


SHARED: dict[str, Callable[..., Any]] = {
  f.__name__: f
  for f in (
    pure_dict,
    text_dict,
    nested_list,
    nested_tuple,
    nnx_module,
    nnx_state,
    nnx_pure,
    linen_boxed,
    equinox_module,
    dataclass_holder,
  )
}
"""Builders whose trees all have the leaves NAMES."""
