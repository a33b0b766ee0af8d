"""Cutting: the part of a delta that concerns a region of its leaf.

Whatever acts entry by entry acts on a region as on the whole, so a region of
a changed leaf is that region of the leaf, changed by its part of the delta.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from patchjax.patches.codes import (
  Dense,
  LowRank,
  Quantized,
  Sparse,
  spread,
  unravel,
)
from patchjax.patches.deltas import Delta
from patchjax.trees.tiles import Region, shape_of


def cut(delta: Delta, shape: tuple[int, ...], region: Region) -> Delta:
  """Returns the delta of a region of a leaf.

  Args:
    delta: a numeric delta of the whole leaf.
    shape: shape of the leaf.
    region: with all its bounds spelled out.

  Example:
    >>> delta = Delta(Dense(np.float32([1, 2, 3])), "add")
    >>> cut(delta, (3,), (slice(1, 3),)).code.values.tolist()
    [2.0, 3.0]
  """
  code: Any = delta.code
  match code:
    case Dense(values=values):
      # An axis of one number stands for equal numbers along the leaf's.
      part = tuple(
        s if n > 1 else slice(None) for s, n in zip(region, values.shape)
      )
      code = Dense(values[part])
    case LowRank(a=a, b=b, batch=batch):
      inner = a.ndim - 1
      rank = (slice(None),)
      code = dataclasses.replace(
        code,
        a=a[region[:inner] + rank],
        b=b[region[:batch] + rank + region[inner:]],
      )
    case Quantized(words=words):
      scales = np.asarray(code.scales)
      for axis, (s, step) in enumerate(zip(region, code.block)):
        if scales.shape[axis] > 1:
          index = np.arange(s.start, s.stop) // step
          scales = np.take(scales, index, axis=axis)
      block = (1,) * len(shape)
      code = Quantized(np.asarray(words)[region], scales, code.bits, block)
    case _:
      code = _cut_sparse(code, shape, region)
  return dataclasses.replace(delta, code=code)


def _cut_sparse(code: Any, shape: tuple[int, ...], region: Region) -> Any:
  # A leaf without axes counts as one of shape [1].
  region = region or (slice(0, 1),)
  axes = unravel(np.asarray(code.indices), shape or (1,))
  inside = np.ones(len(axes[0]), bool)
  for axis, s in zip(axes, region):
    inside &= (axis >= s.start) & (axis < s.stop)
  small = shape_of(region)
  places = [axis[inside] - s.start for axis, s in zip(axes, region)]
  flat = np.ravel_multi_index(places, small).astype(np.int32)
  values = code.values
  if isinstance(values, Quantized):
    scales = spread(np.asarray(values.scales), values.block, values.shape)
    scales = np.broadcast_to(scales, values.shape)[inside]
    words = np.asarray(values.words)[inside]
    values = Quantized(words, scales, values.bits, (1,))
  else:
    values = np.asarray(values)[inside]
  return Sparse(values, flat, small if shape else ())
