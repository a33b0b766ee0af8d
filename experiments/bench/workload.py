"""What the benchmarks work on: trees, and the versions of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import patchjax as pj
from patchjax.patches import pinned
from patchjax.trees.names import nested

Tree = dict[str, Any]

_VOCABULARY = 65  # times the width, as in GPT-2's smallest
_LAYERS = 12


def count(text: str) -> float:
  """Returns a number that may end in k, M or G.

  Args:
    text: such as `125M`.

  Example:
    >>> count("5M")
    5000000.0
  """
  units = {"k": 1e3, "M": 1e6, "G": 1e9}
  return float(text.rstrip("kMG")) * units.get(text[-1], 1)


def tree(seed: int, width: int = 384, layers: int = 6) -> Tree:
  """Random parameters with the shapes of MiniLM."""
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)

  return {
    "embed": normal(30522, width),
    "layers": {
      str(i): {
        "attention": [normal(width, width) for _ in range(4)],
        "mlp": [normal(width, 4 * width), normal(4 * width, width)],
        "vectors": [normal(width) for _ in range(9)] + [normal(4 * width)],
      }
      for i in range(layers)
    },
  }


def decoder(params: float, *, seed: int = 0) -> Tree:
  """Random float32 parameters of 63 leaves, shaped like GPT-2's smallest.

  Args:
    params: about how many numbers; 125e6 gives a width of 768.
    seed: of the numbers.
  """
  # 12 layers of 12 w^2 numbers, and an embedding of 65 w^2.
  width = (params / (12 * _LAYERS + _VOCABULARY)) ** 0.5
  width = max(16, 16 * round(width / 16))
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)

  layers = {
    str(i): {
      "attention": {
        "qkv": normal(width, 3 * width),
        "out": normal(width, width),
      },
      "mlp": {"up": normal(width, 4 * width), "down": normal(4 * width, width)},
      "norms": 1 + normal(4, width),
    }
    for i in range(_LAYERS)
  }
  embed = {
    "tokens": normal(_VOCABULARY * width, width),
    "positions": normal(1024, width),
  }
  return {"embed": embed, "layers": layers, "norm": 1 + normal(2, width)}


def encoder(scale: float = 1, *, seed: int = 0) -> Tree:
  """A tree of 51 tensors and, at scale 1, of 98.7 MB in float32.

  Args:
    scale: of the width of 512.
    seed: of the numbers.
  """
  width = max(16, 16 * round(32 * scale))
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)

  layers = {
    str(i): {
      "qkv": normal(width, 3 * width),
      "out": normal(width, width),
      "up": normal(width, 4 * width),
      "down": normal(4 * width, width),
      "norms": {str(k): 1 + normal(width) for k in range(4)},
    }
    for i in range(6)
  }
  return {
    "layers": layers,
    "tokens": normal(20 * width, width),
    "positions": normal(2 * width, width),
    "norm": 1 + normal(width),
  }


@dataclasses.dataclass(frozen=True)
class Version:
  """One version of a model.

  Attributes:
    name: what was done.
    value: nested dicts of host arrays.
    patch: the patch that made it of the version before, if one did.
  """

  name: str
  value: Tree
  patch: pj.Patch | None = None


def versions(params: float, dtype: Any, *, seed: int = 0) -> list[Version]:
  """The versions that are stored one after the other.

  Those of bfloat16 are the float32 ones rounded, as in training with float32
  master weights: a small step then changes a share of the entries by one.

  Args:
    params: see `decoder`.
    dtype: float32 or bfloat16.
    seed: of all numbers.
  """
  rng = np.random.default_rng(seed)
  first = decoder(params, seed=seed)
  all_moved = tuned(first, 1e-3, rng)
  name = f"layers/{_LAYERS // 2}/mlp/up"
  moved = relative(flat(all_moved)[name], 1e-3, rng)
  one = unflat(flat(all_moved) | {name: moved})
  some = cast(sparse(one, 0.005, rng), dtype)
  patch = low_rank(some, 8, rng)
  return [
    Version("first", cast(first, dtype)),
    Version("all leaves, relative 1e-3", cast(all_moved, dtype)),
    Version("one leaf", cast(one, dtype)),
    Version("0.5 % of the entries", some),
    Version("LoRA of rank 8", patched(some, patch), patch),
  ]


def tuned(value: Tree, scale: float, rng: np.random.Generator) -> Tree:
  """Returns a value of which every number moved; see `relative`."""
  return _map(value, lambda x: relative(x, scale, rng))


def sparse(value: Tree, share: float, rng: np.random.Generator) -> Tree:
  """Returns a value of which a share of every leaf moved; see `scattered`."""
  return _map(value, lambda x: scattered(x, share, rng))


def relative(x: Any, scale: float, rng: np.random.Generator) -> Any:
  """Returns numbers times one plus noise, as a fine-tune leaves them."""
  noise = rng.standard_normal(x.shape, dtype=np.float32)
  return (x * (1 + np.float32(scale) * noise)).astype(x.dtype)


def scattered(x: Any, share: float, rng: np.random.Generator) -> Any:
  """Returns numbers of which a share is shifted by about their own size."""
  count = round(share * x.size)
  at = rng.choice(x.size, count, replace=False, shuffle=False)
  flat = x.reshape(-1).copy()
  shift = 0.01 * rng.standard_normal(count, dtype=np.float32)
  flat[at] = flat[at] + shift.astype(x.dtype)
  return flat.reshape(x.shape)


def low_rank(value: Tree, rank: int, rng: np.random.Generator) -> pj.Patch:
  """Returns a trained LoRA patch of all matrices of the layers.

  Args:
    value: what it is made for.
    rank: of each product.
    rng: gives the factors.
  """
  zero = pj.tuning.lora(
    jax.random.key(0), value, rank=rank, only="layers/.*(qkv|out|up|down)"
  )
  held, rebuild = pj.trainable(zero)
  return rebuild(
    _map(
      held,
      lambda x: 0.01 * rng.standard_normal(x.shape, dtype=np.float32),
    )
  )


def patched(value: Tree, patch: pj.Patch) -> Tree:
  """Returns a patched value, to the bit what a commit of the patch stores."""
  changed = pinned.apply_named(pj.trees.named_leaves(value), patch)
  return unflat({name: np.asarray(x) for name, x in changed.items()})


def cast(value: Tree, dtype: Any) -> Tree:
  """Returns the numbers rounded to a dtype."""
  return _map(value, lambda x: x.astype(dtype, copy=False))


def abstract(value: Tree) -> Tree:
  """Returns what a value looks like on one device."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return _map(
    value, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  )


def flat(value: Tree) -> dict[str, np.ndarray]:
  """Returns the leaves by text name."""
  return pj.trees.named_leaves(value)


def unflat(named: Mapping[str, np.ndarray]) -> Tree:
  """Returns nested dicts of named leaves."""
  return nested(named)


def nbytes(value: Tree) -> int:
  """Bytes of all leaves."""
  return sum(x.nbytes for x in flat(value).values())


def _map(value: Tree, function: Callable[[Any], Any]) -> Tree:
  return jax.tree.map(function, value)
