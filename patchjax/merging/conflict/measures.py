"""What is counted and summed in one leaf: levels two and three of `conflicts`.

One read of the contributors' task vectors gives the support overlap as exact
integers, and the inner products and magnitudes of which cosines, norms and
sign disagreements are made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.merging.conflict import sums
from patchjax.patches import leafwise, placement
from patchjax.patches.counting import LIMB

Array = Any


@dataclasses.dataclass(frozen=True)
class Tally:
  """Counts and sums of one leaf, or of several added up.

  Attributes:
    both: `[k, k]` Python integers: entries that i and j change; on the
      diagonal those that i changes.
    opposite: `[k, k]`: entries that i and j change with opposite signs.
    some: entries that anybody changes.
    several: entries that at least two change.
    disputed: entries that somebody raises and somebody lowers.
    bad: `[k]`: entries of i that are not finite; they count as unchanged.
    products: `[k, k]` float64 inner products.
    against: `[k, k]`: sum of the smaller of two magnitudes of opposite sign.
    beside: `[k, k]`: sum of both magnitudes where both change.
    minority: over entries that several change, the magnitude against the sign
      of the entry's sum.
    magnitude: over the same entries, all magnitude.
  """

  both: np.ndarray
  opposite: np.ndarray
  some: int
  several: int
  disputed: int
  bad: np.ndarray
  products: np.ndarray
  against: np.ndarray
  beside: np.ndarray
  minority: float
  magnitude: float

  def __add__(self, other: Tally) -> Tally:
    fields = [field.name for field in dataclasses.fields(self)]
    return Tally(
      *(getattr(self, name) + getattr(other, name) for name in fields)
    )

  @classmethod
  def zero(cls, k: int) -> Tally:
    """Returns the tally of nothing.

    Args:
      k: number of contributors.
    """
    return unpacked(_integers(k), np.zeros(_sums_of(k)), k)


def _integers(k: int) -> np.ndarray:
  return np.zeros(2 * k + k * (k - 1) + 3, object)


def _sums_of(k: int) -> int:
  return k + 3 * (k * (k - 1) // 2) + 2


@jax.jit
def measure(
  leaf: placement.Leaf, base: Array, sources: tuple[Any, ...]
) -> tuple[Array, Array]:
  """Returns counts (limbs) and sums of one leaf, for `unpacked`.

  Args:
    leaf: where the leaf is.
    base: the base's leaf.
    sources: one a contributor, as in `leafwise.Work`.
  """
  deltas = leafwise.task_vectors(base, sources, leaf.shape)
  return placement.sum_over_shards(_measure, deltas, leaf)


def _measure(deltas, leaf):
  zero = jnp.zeros_like(deltas[0])
  bad = [~jnp.isfinite(d) for d in deltas]
  deltas = [jnp.where(b, zero, d) for b, d in zip(bad, deltas, strict=True)]
  up = [d > zero for d in deltas]
  down = [d < zero for d in deltas]
  changed = [u | d for u, d in zip(up, down, strict=True)]
  pairs = list(itertools.combinations(range(len(deltas)), 2))
  both = [changed[i] & changed[j] for i, j in pairs]
  opposite = [(up[i] & down[j]) | (down[i] & up[j]) for i, j in pairs]
  several = functools.reduce(jnp.logical_or, both, jnp.zeros_like(changed[0]))
  raised, lowered, some = (
    functools.reduce(jnp.logical_or, masks) for masks in (up, down, changed)
  )
  masks = [*changed, *bad, *both, *opposite]
  masks += [some, several, raised & lowered]
  return (
    sums.counts(masks, local=leaf.local),
    sums.totals(_terms(deltas, pairs), local=leaf.local),
  )


def _terms(deltas, pairs):
  """Returns what is summed, in the order of `unpacked`.

  Factors of 0 and 1, made of the bits, stand where masks would: a mask is
  compiled to branches, and five times as slow on a CPU. None is needed for
  what cancels, `(|a| + |b| - |a + b|) / 2`: it is exactly zero where one of
  the two is, or where signs agree.
  """
  wide = deltas[0].dtype
  half = jnp.asarray(0.5).astype(wide)
  sizes = [jnp.abs(d) for d in deltas]
  ones = [_one(size) for size in sizes]
  magnitude = functools.reduce(jnp.add, sizes)
  balance = functools.reduce(jnp.add, deltas)
  terms = [d * d for d in deltas]
  terms += [deltas[i] * deltas[j] for i, j in pairs]
  terms += [
    (sizes[i] + sizes[j] - jnp.abs(deltas[i] + deltas[j])) * half
    for i, j in pairs
  ]
  terms += [ones[j] * sizes[i] + ones[i] * sizes[j] for i, j in pairs]
  terms.append((magnitude - jnp.abs(balance)) * half)
  one = jnp.ones_like(half)
  several = jnp.clip(functools.reduce(jnp.add, ones) - one, one - one, one)
  terms.append(several * magnitude)
  return terms


def _one(size):
  """Returns 1 where a magnitude is not zero, else 0, without a comparison."""
  bits = jnp.uint64 if size.dtype.itemsize == 8 else jnp.uint32
  words = lax.bitcast_convert_type(size, bits)
  one = jnp.ones((), bits)
  return jnp.minimum(words, one).astype(jnp.int32).astype(size.dtype)


def unlimbed(limbs: np.ndarray) -> np.ndarray:
  """Returns counts as Python integers.

  Args:
    limbs: `int32[2, n]`, as `sums.counts` gives them.
  """
  return np.array(
    [(int(high) << LIMB) + int(low) for high, low in limbs.T], object
  )


def unpacked(counts: np.ndarray, totals: np.ndarray, k: int) -> Tally:
  """Returns the tally that flat counts and sums stand for.

  Args:
    counts: Python integers, in the order of `measure`.
    totals: sums, in the order of `measure`.
    k: number of contributors.
  """
  p = k * (k - 1) // 2
  changed, bad, both, opposite, rest = np.split(counts, np.cumsum([k, k, p, p]))
  totals = np.asarray(totals, np.float64)
  squares, products, against, beside, ends = np.split(
    totals, np.cumsum([k, p, p, p])
  )
  return Tally(
    both=_square(changed, both),
    opposite=_square(0 * changed, opposite),
    some=int(rest[0]),
    several=int(rest[1]),
    disputed=int(rest[2]),
    bad=bad,
    products=_square(squares, products),
    against=_square(0 * squares, against),
    beside=_square(0 * squares, beside),
    minority=float(ends[0]),
    magnitude=float(ends[1]),
  )


def _square(diagonal: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Returns the symmetric matrix of a diagonal and the pairs above it."""
  k = len(diagonal)
  out = np.zeros((k, k), diagonal.dtype)
  out[np.diag_indices(k)] = diagonal
  for value, (i, j) in zip(
    pairs, itertools.combinations(range(k), 2), strict=True
  ):
    out[i, j] = out[j, i] = value
  return out
