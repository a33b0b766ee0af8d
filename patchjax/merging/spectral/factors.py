"""Factors of low rank, leaf by leaf: bases, and what lies between them.

Inside, factors are `[batch, inputs, rank]` and `[batch, rank, outputs]`. Every
function is compiled once for all leaves of a shape.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from patchjax.merging.spectral import matrices as mats
from patchjax.patches import engine, meshes
from patchjax.patches.codes import LowRank

Array = Any


def wide(code: LowRank) -> tuple[Array, Array]:
  """Returns the factors, in float32 at least, the scale in the first."""
  dtype = jnp.promote_types(code.a.dtype, jnp.float32)
  a, b = jnp.asarray(code.a).astype(dtype), jnp.asarray(code.b).astype(dtype)
  scale = jnp.asarray(code.scale).astype(dtype)
  batch = math.prod(code.a.shape[: code.batch])
  rank = code.rank
  a = a.reshape(batch, -1, rank) * scale
  return a, b.reshape(batch, rank, -1)


def inputs_basis(held):
  """Returns orthonormal inputs that span those of some codes."""
  u, _, _ = mats.svd(jnp.concatenate([wide(code)[0] for code in held], -1))
  return u.reshape(*held[0].a.shape[:-1], u.shape[-1])


def outputs_basis(held):
  """Returns orthonormal outputs that span those of some codes."""
  _, _, vt = mats.svd(jnp.concatenate([wide(code)[1] for code in held], -2))
  return outputs_like(held[0], vt)


def outputs_like(code, vt):
  """Returns `[batch, rank, outputs]` with the axes of a code's factor b."""
  shape = code.b.shape
  return vt.reshape(
    *shape[: code.batch], vt.shape[-2], *shape[code.batch + 1 :]
  )


def core(code, left, right):
  """Returns a code between two bases, `[*batch, p, q]`."""
  a, b = wide(code)
  p = left.reshape(a.shape[0], -1, left.shape[-1])
  q = right.reshape(a.shape[0], right.shape[code.batch], -1)
  small = mats.dot(
    mats.dot(mats.transposed(p), a), mats.dot(b, mats.transposed(q))
  )
  return small.reshape(*code.a.shape[: code.batch], *small.shape[1:])


def directions(held, threshold):
  """Returns the output directions of codes, and how many there are."""
  # The rows of R_i b_i below each other have the singular values of the
  # products a_i b_i below each other, a_i = Q_i R_i.
  rows = []
  for code in held:
    a, b = wide(code)
    rows.append(mats.dot(jnp.linalg.qr(a, mode="r"), b))
  _, s, vt = mats.svd(jnp.concatenate(rows, -2))
  ins = math.prod(held[0].a.shape[held[0].batch : -1])
  least = mats.floor_of(s, (ins, vt.shape[-1]))
  there = s > jnp.maximum(least, threshold.astype(s.dtype))
  vt = jnp.where(there[..., None], vt, jnp.zeros_like(vt))
  return vt, jnp.max(jnp.sum(there, -1, dtype=jnp.int32))


def part(code, vt):
  """Returns what of a code lies along output directions."""
  a, b = wide(code)
  small = mats.dot(a, mats.dot(b, mats.transposed(vt)))
  return small.reshape(*code.a.shape[:-1], small.shape[-1])


def product_before(left, middle):
  """Returns `left @ middle`, with the axes of `left`."""
  batch = math.prod(middle.shape[:-2])
  p = left.reshape(batch, -1, left.shape[-1])
  out = mats.dot(p, middle.reshape(batch, *middle.shape[-2:]))
  return out.reshape(*left.shape[:-1], middle.shape[-1])


def product_after(middle, right):
  """Returns `middle @ right`, with the axes of `right`."""
  axes = middle.ndim - 2
  batch = math.prod(middle.shape[:-2])
  q = right.reshape(batch, right.shape[axes], -1)
  out = mats.dot(middle.reshape(batch, *middle.shape[-2:]), q)
  return out.reshape(
    *right.shape[:axes], middle.shape[-2], *right.shape[axes + 1 :]
  )


def same(x):
  """Returns an array as it is."""
  return x


def placed(function: Any, like: Array, *args: Any) -> Array:
  """One array, laid out as a factor is."""
  like = jnp.asarray(like)
  out = None
  if not engine.is_traced(like) and len(like.sharding.device_set) > 1:
    out = like.sharding
  return _placed_jit(function, out)(like, *args)


@functools.lru_cache(maxsize=512)
def _placed_jit(function: Any, sharding: Any) -> Any:
  return jax.jit(
    lambda like, *args: meshes.on_leaf_mesh(function, like, *args),
    out_shardings=sharding,
  )


def whole(function: Any, *args: Any) -> Any:
  """Small arrays, whole on every device."""
  return _whole_jit(function)(*args)


@functools.lru_cache(maxsize=512)
def _whole_jit(function: Any) -> Any:
  return jax.jit(lambda *args: meshes.number_on_mesh(function, *args))
