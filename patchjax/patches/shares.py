"""How many entries a density stands for: `floor(density * size)`, exactly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.patches import perleaf
from patchjax.patches.counting import LIMB, carried, limbs
from patchjax.trees.errors import SelectionError

Array = Any


def entries_of(
  density: Any, size: int, *, more: int = 0, zero: bool = False
) -> Array:
  """Returns `k = floor(density * size) + more` as limbs `int32[2, ...]`.

  A Python number gives `int(density * size)`. An array (a traced density, a
  grid under `vmap`) is taken as the decimal of up to six digits that it
  rounds, or else with a tolerance of about half a unit in its last place:
  `float32(0.7) * 10` is 7, although float32(0.7) lies below 0.7.

  Args:
    density: share of entries, in (0, 1]; a number or an array.
    size: the number of entries; k is at most that.
    more: entries beyond the share.
    zero: whether the share may be 0 too.

  Raises:
    SelectionError: if a density that can be seen is outside (0, 1], or if a
      derivative with respect to it is taken.

  Example:
    >>> import jax.numpy as jnp
    >>> entries_of(0.5, 10).tolist(), entries_of(jnp.float32(0.7), 10).tolist()
    ([0, 5], [0, 7])
  """
  perleaf.refuse(density)
  if isinstance(density, int | float):
    check_density(density, zero=zero)
    return limbs(min(int(density * size) + more, size))
  if not isinstance(density, Tracer):
    check_density(density, zero=zero)
  if size >= 1 << (LIMB + 30):
    raise SelectionError(f"cannot count {size} entries: at most 2**42 - 1")
  k = _entries(size, jnp.asarray(density).astype(jnp.float32))
  if not more:
    return k
  low = k[1] + jnp.int32(more)
  high, low = k[0] + (low >> LIMB), low & ((1 << LIMB) - 1)
  most_high, most_low = limbs(size)
  full = (high > most_high) | ((high == most_high) & (low > most_low))
  return jnp.where(full, k, jnp.stack([high, low]))


def check_density(
  density: Any, *, zero: bool = False, name: str = "density"
) -> None:
  """Raises SelectionError unless a share lies in (0, 1].

  Args:
    density: the share, or several.
    zero: whether it may be 0 too.
    name: what it is called.
  """
  value = np.asarray(density, np.float64)
  if not (((value > 0) | (zero & (value == 0))) & (value <= 1)).all():
    raise SelectionError(
      f"{name} must be in {'[' if zero else '('}0, 1], got {density}: it is a "
      "share of the entries"
    )


@jax.custom_jvp
def selecting(share: Array) -> Array:
  """Returns a share that entries are compared with: it has no derivative.

  Args:
    share: a float array.

  Raises:
    SelectionError: if a derivative with respect to it is taken.
  """
  return share


def _selecting_jvp(primals, tangents):
  _refuse_tangents(tangents)
  return primals[0], tangents[0]


selecting.defjvp(_selecting_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entries(size: int, density: Array) -> Array:
  scaled = density * jnp.float32(1e6)
  decimal = jnp.round(scaled)
  is_decimal = jnp.abs(scaled - decimal) <= scaled * jnp.float32(2.0**-23)
  binary = (density * jnp.float32(2.0**30)).astype(jnp.uint32)
  binary = jnp.minimum(binary + (binary >> jnp.uint32(24)), jnp.uint32(1 << 30))
  return jnp.where(
    is_decimal,
    _scaled_floor(decimal.astype(jnp.uint32), size, 10**6),
    _scaled_floor(binary, size, 1 << 30),
  )


def _refuse_tangents(tangents):
  if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
    raise SelectionError(
      "a density has no derivative: it selects entries by rank or at random. "
      "Differentiate the smooth numbers (weights, scale, t) and hold the "
      "density fixed (close over it), or vmap over a grid of densities"
    )


def _entries_jvp(size, primals, tangents):
  _refuse_tangents(tangents)
  out = _entries(size, *primals)
  return out, np.zeros(out.shape, jax.dtypes.float0)


_entries.defjvp(_entries_jvp, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(1, 2))  # or each call traces it
def _scaled_floor(numerator: Array, size: int, denominator: int) -> Array:
  """Returns `floor(numerator * size / denominator)` as limbs.

  `numerator <= denominator <= 2**30`, so that no step leaves uint32.
  """
  whole, rest = divmod(size, denominator)

  def divide(i, carry):
    quotient, remainder = carry
    bit = (numerator >> (jnp.uint32(30) - i.astype(jnp.uint32))) & jnp.uint32(1)
    remainder = remainder * jnp.uint32(2) + bit * jnp.uint32(rest)
    digit = remainder // jnp.uint32(denominator)
    remainder = remainder - digit * jnp.uint32(denominator)
    return quotient * jnp.uint32(2) + digit, remainder

  zero = jnp.zeros_like(numerator)
  small, _ = lax.fori_loop(0, 31, divide, (zero, zero))
  mask = jnp.uint32((1 << LIMB) - 1)
  low = (numerator & mask) * jnp.uint32(whole)
  high = (numerator >> jnp.uint32(LIMB)) * jnp.uint32(whole)
  high = high + (low >> jnp.uint32(LIMB)) + (small >> jnp.uint32(LIMB))
  low = (low & mask) + (small & mask)
  return carried(jnp.stack([high, low]).astype(jnp.int32))
