"""Zigzag codes of differences: small changes of either sign, small numbers.

The integer difference of two bit patterns, modulo the word, is exact for every
dtype. Its zigzag code (0, -1, 1, -2, 2 become 0, 1, 2, 3, 4) keeps the high
bits of small differences zero, whatever their sign.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 1 << 15  # words at a time: the temporaries stay in cache


def zigzag(
  new: np.ndarray, old: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns the zigzag codes of `new - old`, modulo the word.

  Args:
    new: unsigned integers [n].
    old: unsigned integers [n].
    out: where to put them; by default a new array.

  Example:
    >>> zigzag(np.uint8([7, 1, 0]), np.uint8([8, 0, 255])).tolist()
    [1, 2, 2]
  """
  out = np.empty(new.shape, new.dtype) if out is None else out
  signed = np.dtype(f"int{8 * new.itemsize}")
  top = signed.type(8 * new.itemsize - 1)
  signs = np.empty(min(new.size, _BLOCK), signed)
  for start in range(0, new.size, _BLOCK):
    block = slice(start, start + _BLOCK)
    codes = np.subtract(new[block], old[block], out=out[block]).view(signed)
    sign = np.right_shift(codes, top, out=signs[: codes.size])
    np.left_shift(codes, signed.type(1), out=codes)
    np.bitwise_xor(codes, sign, out=codes)
  return out


def unzigzag(codes: np.ndarray) -> np.ndarray:
  """Turns zigzag codes into differences, modulo the word, in place.

  Args:
    codes: unsigned integers [n]; written over.

  Example:
    >>> unzigzag(np.uint8([1, 2, 4])).tolist()
    [255, 1, 2]
  """
  one = codes.dtype.type(1)
  signs = codes & one
  np.negative(signs, out=signs)
  np.right_shift(codes, one, out=codes)
  return np.bitwise_xor(codes, signs, out=codes)


def add_zigzag(codes: np.ndarray, old: np.ndarray) -> np.ndarray:
  """Turns zigzag codes of `new - old` into `new`, in place; the inverse.

  Args:
    codes: unsigned integers [n]; written over.
    old: unsigned integers [n].

  Example:
    >>> add_zigzag(np.uint8([1, 2, 2]), np.uint8([8, 0, 255])).tolist()
    [7, 1, 0]
  """
  for start in range(0, codes.size, _BLOCK):
    block = unzigzag(codes[start : start + _BLOCK])
    np.add(block, old[start : start + _BLOCK], out=block)
  return codes
