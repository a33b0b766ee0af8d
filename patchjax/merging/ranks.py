"""Arithmetic on ranks: limbs `int32[2]` of counts beyond 32 bits.

See `patches.counting`. Ranks of steps that make several cuts are sums and
differences of shares, or a share of a count that is only known later.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import counting

Array = Any


def plus(a: Array, b: Array) -> Array:
  """Returns the sum of two counts."""
  return counting.carried(a + b)


def minus(a: Array, b: Array) -> Array:
  """Returns `max(a - b, 0)`."""
  difference = counting.carried(a - b)
  where = jnp.where if isinstance(difference, jax.Array) else np.where
  return where(difference[0] < np.int32(0), np.int32(0), difference)


def at_most(a: Array, b: Array) -> Array:
  """Returns the smaller of two counts."""
  larger = counting.at_least(a, b)
  where = jnp.where if isinstance(larger, jax.Array) else np.where
  return where(larger, b, a)


def part(share: Any, count: Array) -> Array:
  """Returns `floor(share * count)` of a count that is known when it runs.

  A share is read as `patches.shares.entries_of` reads traced ones: as the
  decimal of up to six digits that it rounds, where there is one.

  Args:
    share: in [0, 1]; a number, traced or not.
    count: limbs.

  Example:
    >>> part(0.7, counting.limbs(10)).tolist()
    [0, 7]
  """
  share = jnp.asarray(share).astype(jnp.float32)
  scaled = share * jnp.float32(1e6)
  decimal = jnp.round(scaled)
  is_decimal = jnp.abs(scaled - decimal) <= scaled * jnp.float32(2.0**-23)
  binary = (share * jnp.float32(2.0**30)).astype(jnp.uint32)
  of = jnp.where(is_decimal, jnp.uint32(10**6), jnp.uint32(1 << 30))
  parts = jnp.where(is_decimal, decimal.astype(jnp.uint32), binary)
  high, low = jnp.asarray(count).astype(jnp.uint32)
  one, limb = jnp.uint32(1), jnp.uint32(counting.LIMB)
  mask = jnp.uint32((1 << counting.LIMB) - 1)

  def digit(i, carry):
    """Long division of `parts * count` by `of`, a bit of the count a turn."""
    above, below, rest = carry
    at = jnp.uint32(counting.LIMB + 29) - i.astype(jnp.uint32)
    bit = jnp.where(
      at >= limb,
      high >> (jnp.maximum(at, limb) - limb),
      low >> jnp.minimum(at, limb),
    )
    rest = rest * jnp.uint32(2) + (bit & one) * parts
    below = below * jnp.uint32(2) + rest // of
    above = above * jnp.uint32(2) + (below >> limb)
    return above, below & mask, rest % of

  zero = jnp.zeros_like(parts)
  turns = counting.LIMB + 30
  above, below, _ = lax.fori_loop(0, turns, digit, (zero, zero, zero))
  return jnp.stack([above, below]).astype(jnp.int32)
