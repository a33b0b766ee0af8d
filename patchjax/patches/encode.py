"""Choosing codes: the same numbers held in fewer bytes, nothing lost.

An encoder looks at a dense array on the host and returns the code that takes
the fewest bytes in a patch file and gives the array back bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from patchjax.patches import codes
from patchjax.patches.codes import Code, Dense, Quantized, Sparse


def indices_of(mask: np.ndarray) -> np.ndarray:
  """Returns the sorted row-major positions of the true entries of a mask.

  Args:
    mask: boolean array of the leaf's shape.

  Returns:
    int32 `[nnz]`, or `[nnz, 2]` for a leaf too large for one int32 (see
    `codes.split_axis`).

  Example:
    >>> indices_of(np.array([[False, True], [True, False]])).tolist()
    [1, 2]
  """
  flat = np.flatnonzero(mask)
  axis = codes.split_axis(mask.shape)
  if not axis:
    return flat.astype(np.int32)
  rest = math.prod(mask.shape[axis:])
  return np.stack([flat // rest, flat % rest], axis=1).astype(np.int32)


def sparse(values: np.ndarray, fill: float = 0) -> Sparse:
  """Returns the entries of an array that are not `fill`, as a sparse code.

  Args:
    values: the array. Entries equal to `fill` (either zero) are left out.
    fill: the law's identity.
  """
  mask = values != values.dtype.type(fill)
  return Sparse(values[mask], indices_of(mask), values.shape)


def ternary(code: Sparse) -> Sparse | None:
  """Returns a sparse code whose values are all +s or -s, with a bit each.

  Args:
    code: a sparse code with plain values.

  Returns:
    The code with 1-bit `Quantized` values, or None if magnitudes differ.
  """
  values = np.asarray(code.values)
  if not values.size or not (np.abs(values) == np.abs(values[0])).all():
    return None
  words = np.where(values > 0, 1, -1).astype(np.int8)
  scales = np.abs(values[:1])
  block = (values.size,)
  return Sparse(Quantized(words, scales, 1, block), code.indices, code.shape)


def smallest(values: np.ndarray, fill: float = 0) -> Code:
  """Returns the code of fewest bytes that gives an array back bit for bit.

  Args:
    values: the array.
    fill: the law's identity: what a sparse code leaves out.

  Example:
    >>> type(smallest(np.float32([0, 0, 0, 0, 2.5, 0, 0, 0]))).__name__
    'Sparse'
  """
  options: list[Code] = [Dense(values)]
  some = sparse(values, fill)
  options.append(some)
  two_valued = ternary(some)
  if two_valued is not None:
    options.append(two_valued)
  return min(options, key=lambda code: code.nbytes)


def smallest_quantized(code: Quantized) -> Code:
  """Returns a quantized code, or its words that are not 0 as a sparse one.

  Args:
    code: a code; only one with a single scale can be made sparse.
  """
  words, scales = np.asarray(code.words), np.asarray(code.scales)
  if scales.size != 1 or code.bits == 1:
    return code
  mask = words != 0
  kept = words[mask]
  values = Quantized(kept, scales.reshape(1), code.bits, (max(kept.size, 1),))
  some = Sparse(values, indices_of(mask), words.shape)
  return min([code, some], key=lambda c: c.nbytes)
