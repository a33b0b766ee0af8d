"""Lengths of vectors, from inner products; their derivatives stay finite."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any

RESOLVED = 5e-4
"""Angles, and sums of unit vectors, that float32 products tell from zero."""


def like(number: Any, array: Array) -> Array:
  """Returns a number in the dtype of an array."""
  return jnp.asarray(number).astype(array.dtype)


def root(square: Array) -> Array:
  """Returns the square root, with a derivative of 0 where it is 0.

  Args:
    square: floating point array; what is negative, by rounding, counts as 0.
  """
  some = square > like(0, square)
  found = jnp.sqrt(jnp.where(some, square, jnp.ones_like(square)))
  return jnp.where(some, found, jnp.zeros_like(found))


def of(dots: Array) -> Array:
  """Returns the lengths of vectors, from their Gram matrix."""
  return root(jnp.diagonal(dots))


def of_sum(coefficients: Array, dots: Array) -> Array:
  """Returns the length of `sum_i c_i x_i`, from the Gram matrix of x."""
  c = coefficients
  return root(jnp.sum(c[:, None] * dots * c[None, :]))
