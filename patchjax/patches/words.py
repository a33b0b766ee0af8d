"""Bit patterns inside `jit`: arrays as unsigned words and back.

The same words as `trees.dtypes.to_words` gives on the host: a complex number
is two words on a last axis, a number of less than a byte takes a byte, PRNG
keys are their key data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from patchjax.trees.dtypes import KINDS, dtype_name, is_key


def to_words(x: Any) -> jax.Array:
  """Returns the bit patterns of an array as unsigned integers.

  Args:
    x: array of any dtype JAX holds, PRNG keys included.

  Example:
    >>> to_words(jnp.float32(1)).item() == 0x3F800000
    True
  """
  if is_key(x):
    return jax.random.key_data(x)
  kind = KINDS[dtype_name(x)]
  x = jnp.asarray(x)
  if kind.words == 2:
    parts = [lax.bitcast_convert_type(p, kind.word) for p in (x.real, x.imag)]
    return jnp.stack(parts, axis=-1)
  if kind.name == "bool":
    return x.astype(jnp.uint8)
  if kind.bits < 8:
    return lax.bitcast_convert_type(x, f"uint{kind.bits}").astype(jnp.uint8)
  return lax.bitcast_convert_type(x, kind.word)


def from_words(words: jax.Array, like: Any) -> jax.Array:
  """Returns the array with these bit patterns; the inverse of `to_words`.

  Args:
    words: unsigned integers; bits beyond those of the dtype are ignored.
    like: an array of the wanted dtype (and PRNG implementation).

  Example:
    >>> from_words(jnp.uint32(0x3F800000), jnp.float32(0)).item()
    1.0
  """
  if is_key(like):
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))
  kind = KINDS[dtype_name(like)]
  if kind.words == 2:
    parts = lax.bitcast_convert_type(words, jnp.real(like).dtype)
    return lax.complex(parts[..., 0], parts[..., 1])
  if kind.name == "bool":
    return (words & jnp.uint8(1)).astype(jnp.bool_)
  if kind.bits < 8:
    low = words & jnp.uint8((1 << kind.bits) - 1)
    return lax.bitcast_convert_type(low.astype(f"uint{kind.bits}"), kind.dtype)
  return lax.bitcast_convert_type(words, kind.dtype)
