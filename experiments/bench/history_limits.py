"""How few bytes a version can take: the entropy of what changed.

A difference of bit patterns is split into byte planes; the entropy of each
plane's histogram is what a perfect coder of single bytes would need. Scattered
changes need their positions (log2 of the number of subsets) and the entropy of
the changed words' differences. A patch of low rank needs its factors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import patchjax as pj
from experiments.bench import workload

_BLOCK = 1 << 20


def version_limit(new: workload.Version, old: workload.Version | None) -> float:
  """Returns the bytes that a version takes at the least, beside the one before.

  The cheapest of the three ways, leaf by leaf (of two for a patch: its factors
  or the values).

  Args:
    new: the version.
    old: the one before; None for the first.
  """
  before = {} if old is None else workload.flat(old.value)
  after = workload.flat(new.value)
  factors = {} if new.patch is None else _factors(new.patch)
  return sum(
    min(leaf_limit(x, before.get(name)), factors.get(name, math.inf))
    for name, x in after.items()
  )


def index_and_value(new: Any, old: Any) -> int:
  """Returns the bytes of changed entries as 32-bit positions and values.

  Args:
    new: the numbers of a version.
    old: those of the one before, of the same structure.
  """
  before = workload.flat(old)
  return sum(
    (4 + x.itemsize) * int(np.count_nonzero(_words(x) != _words(before[name])))
    for name, x in workload.flat(new).items()
  )


def leaf_limit(new: np.ndarray, old: np.ndarray | None) -> float:
  """Returns the bytes that a leaf takes at the least.

  Args:
    new: its numbers.
    old: those before, of the same shape and dtype.
  """
  words = _words(new)
  if old is None:
    return plane_entropy(words)
  before = _words(old)
  differs = words != before
  count = int(np.count_nonzero(differs))
  if not count:
    return 0.0
  zigzag = _zigzag(words, before)
  scattered = _positions(words.size, count) + plane_entropy(zigzag[differs])
  return min(plane_entropy(words), plane_entropy(zigzag), scattered)


def plane_entropy(words: np.ndarray) -> float:
  """Returns the entropy in bytes of the byte planes of words.

  Args:
    words: unsigned integers.

  Example:
    >>> plane_entropy(np.uint16([0, 1, 2, 3]))
    1.0
  """
  octets = words.reshape(-1).view(np.uint8).reshape(-1, words.itemsize)
  total = 0.0
  for plane in range(words.itemsize):
    counts = np.zeros(256, np.int64)
    # Counting turns bytes into words of eight: not all of them at once.
    for start in range(0, len(octets), _BLOCK):
      block = octets[start : start + _BLOCK, plane]
      counts += np.bincount(block, minlength=256)
    total += _entropy(counts)
  return total / 8


def _entropy(counts: np.ndarray) -> float:
  """Bits that symbols of these counts take."""
  seen = counts[counts > 0]
  return float(-(seen * np.log2(seen / counts.sum())).sum())


def _positions(size: int, count: int) -> float:
  """Bytes that say which `count` of `size` entries are meant."""
  log = math.lgamma(size + 1) - math.lgamma(count + 1)
  return (log - math.lgamma(size - count + 1)) / math.log(2) / 8


def _words(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.itemsize}")


def _zigzag(new: np.ndarray, old: np.ndarray) -> np.ndarray:
  bits = 8 * new.itemsize
  difference = (new - old).view(f"int{bits}")
  return ((difference << 1) ^ (difference >> (bits - 1))).view(new.dtype)


def _factors(patch: pj.Patch) -> dict[str, float]:
  """Bytes of a patch's factors, by leaf."""
  held, _ = pj.trainable(patch)
  return {
    name: sum(plane_entropy(_words(np.asarray(x))) for x in fields.values())
    for name, fields in held.items()
  }
