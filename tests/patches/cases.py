"""One small patch of every law and code, beside what numpy says it does."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from patchjax.patches import (
  Delta,
  Dense,
  LowRank,
  Patch,
  Quantized,
  Sparse,
  structure_of,
)

SHAPE = (16, 8)


def random(seed: int, shape=SHAPE, dtype=np.float32) -> np.ndarray:
  """Normal numbers with full mantissas (jax.random's are coarse near 0)."""
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def dense(seed: int) -> tuple[Dense, np.ndarray, np.ndarray]:
  values = random(seed)
  return Dense(values), values, np.ones(SHAPE, bool)


def axis(seed: int) -> tuple[Dense, np.ndarray, np.ndarray]:
  values = random(seed, (SHAPE[0], 1))
  return Dense(values), np.repeat(values, SHAPE[1], 1), np.ones(SHAPE, bool)


def _where(seed: int, nnz: int = 11) -> np.ndarray:
  rng = np.random.default_rng(seed)
  size = int(np.prod(SHAPE))
  return np.sort(rng.choice(size, nnz, replace=False)).astype(np.int32)


def sparse(seed: int) -> tuple[Sparse, np.ndarray, np.ndarray]:
  indices = _where(seed)
  values = random(seed, indices.shape)
  # Two entries of padding, as `stack` makes it.
  padded = np.concatenate([indices, np.int32([128, 129])])
  code = Sparse(np.concatenate([values, np.zeros(2, "f4")]), padded, SHAPE)
  full, held = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
  full.reshape(-1)[indices], held.reshape(-1)[indices] = values, True
  return code, full, held


def low_rank(seed: int) -> tuple[LowRank, np.ndarray, np.ndarray]:
  a, b = random(seed, (SHAPE[0], 3)), random(seed + 1, (3, SHAPE[1]))
  full = 0.5 * (a.astype("f8") @ b.astype("f8"))
  return (
    LowRank(a, b, np.float32(0.5)),
    full.astype("f4"),
    np.ones(SHAPE, bool),
  )


def quantized(seed: int) -> tuple[Quantized, np.ndarray, np.ndarray]:
  words = np.random.default_rng(seed).integers(-4, 4, SHAPE).astype(np.int8)
  scales = np.abs(random(seed, (4, SHAPE[1])))
  full = words * np.repeat(scales, 4, axis=0)
  return Quantized(words, scales, 3, (4, 1)), full, np.ones(SHAPE, bool)


def sparse_quantized(seed: int) -> tuple[Sparse, np.ndarray, np.ndarray]:
  indices = _where(seed)
  signs = np.where(random(seed, indices.shape) > 0, 1, -1).astype(np.int8)
  values = Quantized(signs, np.float32([0.25]), 1, (len(indices),))
  full, held = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
  full.reshape(-1)[indices] = 0.25 * signs
  held.reshape(-1)[indices] = True
  return Sparse(values, indices, SHAPE), full, held


CODES: dict[str, Callable[[int], Any]] = {
  f.__name__: f
  for f in (dense, axis, sparse, low_rank, quantized, sparse_quantized)
}

# Integers of the law `bits` are held whole or sparse; other codes hold
# floating point numbers.
LAW_CODES = [(law, code) for law in ("add", "mul", "set") for code in CODES] + [
  ("bits", "dense"),
  ("bits", "sparse"),
]


@dataclasses.dataclass(frozen=True)
class Case:
  """A patch on the leaf `w` of `base`, and the result numpy expects."""

  base: dict[str, Any]
  patch: Patch
  expected: np.ndarray
  tolerance: float


def make(law: str, code: str, dtype: Any = np.float32, seed: int = 0) -> Case:
  """Returns the case of one law and code on a base of one dtype."""
  dtype = np.dtype(dtype)
  leaf = random(seed + 10, dtype=dtype)
  base = {"w": leaf, "other": random(seed + 11, (3,), dtype)}
  held, numbers, touched = CODES[code](seed)
  if law == "bits":
    word = np.dtype(f"uint{8 * dtype.itemsize}")
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 8 * dtype.itemsize, SHAPE).astype(word)
    words[~touched] = 0
    if code == "sparse":
      inside = held.indices[held.indices < held.end]
      values = np.zeros(len(held.indices), word)
      values[: len(inside)] = words.reshape(-1)[inside]
      held = Sparse(values, held.indices, SHAPE)
    else:
      held = Dense(words)
    expected = (leaf.view(word) + words).view(dtype)
  else:
    wide, numbers = leaf.astype("f4"), numbers.astype("f4")
    done = {"add": wide + numbers, "mul": wide * numbers, "set": numbers}[law]
    expected = np.where(touched, done.astype(dtype), leaf)
  patch = Patch({"w": Delta(held, law)}, structure_of(base))
  eps = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[dtype.name]
  exact = code in ("dense", "axis", "sparse") or law == "bits"
  return Case(base, patch, expected, 0 if exact else eps)


def check(found: Any, case: Case) -> None:
  """Asserts that an applied patch is what numpy expects."""
  w = np.asarray(found["w"])
  assert w.dtype == case.expected.dtype
  if case.tolerance == 0:
    bits = f"u{w.dtype.itemsize}"
    np.testing.assert_array_equal(w.view(bits), case.expected.view(bits))
  else:
    np.testing.assert_allclose(
      w.astype("f4"), case.expected.astype("f4"), case.tolerance, 1e-6
    )
  np.testing.assert_array_equal(
    np.asarray(found["other"]), np.asarray(case.base["other"])
  )


DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def place(tree: Any, sharding: Any) -> Any:
  """Puts the leaf `w` on a mesh; the others are replicated there."""
  whole = jax.sharding.NamedSharding(sharding.mesh, jax.P())
  return {
    name: jax.device_put(leaf, sharding if name == "w" else whole)
    for name, leaf in tree.items()
  }
