"""Integers that order floats: by magnitude, or with their sign.

The bit pattern of a float without its sign is an unsigned integer that orders
magnitudes; turned about below zero it orders all floats. What is selected by
comparing such keys is exact, with NaN, infinities, zeros and denormals among
them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.trees.errors import DtypeError

Array = Any

_WORDS = {4: ("uint32", 31), 2: ("uint16", 15)}


def bits_of(dtype: Any) -> int:
  """Returns how many bits `magnitude_bits` has of a dtype.

  Args:
    dtype: of floats.

  Raises:
    DtypeError: if it is not float32, bfloat16 or float16.
  """
  dtype = np.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in _WORDS:
    raise DtypeError(
      f"magnitudes are selected in float32, bfloat16 or float16, got "
      f"{dtype}; cast first, e.g. x.astype('float32')"
    )
  return _WORDS[dtype.itemsize][1]


def magnitude_bits(x: Array) -> Array:
  """Returns unsigned integers that order the magnitudes of `x`.

  Both zeros are 0, denormals keep their order, and NaN comes above infinity.

  Args:
    x: float32, bfloat16 or float16 array.

  Raises:
    DtypeError: for other dtypes.

  Example:
    >>> import jax.numpy as jnp
    >>> magnitude_bits(jnp.float16([-0.0, 2.0, -2.0, jnp.inf])).tolist()
    [0, 16384, 16384, 31744]
  """
  bits = bits_of(x.dtype)
  word, _ = _WORDS[np.dtype(x.dtype).itemsize]
  pattern = lax.bitcast_convert_type(x, jnp.dtype(word))
  return pattern & jnp.asarray((1 << bits) - 1, word)


def magnitude_keys(x: Array) -> Array:
  """Returns the magnitudes of floats as `uint32` keys of 31 bits.

  64-bit floats are ranked as float32: rounding keeps the order, and what it
  makes equal is kept together. Derivatives stop here.

  Args:
    x: array of floats.

  Example:
    >>> import jax.numpy as jnp
    >>> key = magnitude_keys(jnp.float32([-2.0]))
    >>> magnitude_of(key).tolist()
    [2.0]
  """
  return magnitude_bits(lax.stop_gradient(x).astype(jnp.float32))


def magnitude_of(key: Array) -> Array:
  """Returns the float32 magnitude of a key from `magnitude_keys`."""
  return lax.bitcast_convert_type(jnp.asarray(key), jnp.float32)


def ordered_bits(x: Array) -> Array:
  """Returns `uint32` keys that order floats with their sign.

  -0.0 comes just below 0.0; NaN comes above all, or below all if its sign
  bit is set. Derivatives stop here.

  Args:
    x: array of floats; 64-bit floats are ranked as float32.

  Example:
    >>> import jax.numpy as jnp
    >>> keys = ordered_bits(jnp.float32([-1.5, -0.0, 0.0, 2.0]))
    >>> bool((keys[:-1] < keys[1:]).all()), value_of(keys).tolist()
    (True, [-1.5, -0.0, 0.0, 2.0])
  """
  x = lax.stop_gradient(x).astype(jnp.float32)
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(pattern >= sign, ~pattern, pattern | sign)


def value_of(key: Array) -> Array:
  """Returns the float32 of a key from `ordered_bits`."""
  key = jnp.asarray(key)
  sign = jnp.uint32(1 << 31)
  pattern = jnp.where(key >= sign, key ^ sign, ~key)
  return lax.bitcast_convert_type(pattern, jnp.float32)
