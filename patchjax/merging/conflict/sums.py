"""Exact counts and accurate sums over one leaf, wherever it lies.

Counts are integers (`patches.counting`). Sums of floating point numbers are
added in blocks of blocks: each number passes through few additions, of which
none is much longer than the others, so that the relative error of a sum of
squares stays near 1e-7 for leaves of any size, where a running sum in float32
stops growing at 2**24 entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from patchjax.patches import counting

Array = Any

_BLOCK = 8
"""Numbers that are added one after the other."""

_MASKS = 12
_TERMS = 8
"""How many share one reduction: more would not fit into registers."""


def counts(masks: Sequence[Array], *, local: bool) -> Array:
  """Returns how often each mask is true: limbs `int32[2, len(masks)]`.

  Args:
    masks: boolean arrays of one shape.
    local: whether they lie on one device.
  """
  parts = [
    counting.count_true(tuple(masks[i : i + _MASKS]), local=local)
    for i in range(0, len(masks), _MASKS)
  ]
  return jnp.concatenate(parts, axis=1)


def totals(
  terms: Sequence[Array], *, local: bool, together: int = _TERMS
) -> Array:
  """Returns the sum of each term, `[len(terms)]` of their dtype.

  Args:
    terms: floating point arrays of one shape.
    local: whether they lie on one device, and so reshape freely.
    together: how many share one read of what they are computed from: fewer,
      where they are dear to compute. Of more than two that draw random bits
      or the like, the compiler on a CPU computes all in full first, for six
      times as long.
  """
  if not local:
    return jnp.stack([_by_axes(term) for term in terms])
  size = math.prod(terms[0].shape)
  if not size:
    return jnp.zeros((len(terms),), terms[0].dtype)
  held = tuple(term.reshape(-1) for term in terms)
  while size > 1:
    held = tuple(
      part
      for i in range(0, len(held), together)
      for part in _blocks(held[i : i + together], size)
    )
    size = held[0].size
    together = _TERMS
  return jnp.stack([x.reshape(()) for x in held])


def _blocks(terms: tuple[Array, ...], size: int) -> tuple[Array, ...]:
  """Returns the sums of blocks of each term."""
  rows = min(_BLOCK, size)
  columns = -(-size // rows)
  # One operand alone would take a slower path of XLA's CPU compiler.
  held = terms if len(terms) > 1 else (*terms, *terms)
  if pad := rows * columns - size:
    held = tuple(jnp.pad(x, (0, pad)) for x in held)
  found = lax.reduce(
    # Along the major axis: neighbours are added side by side, in vectors.
    tuple(x.reshape(rows, columns) for x in held),
    (jnp.zeros((), held[0].dtype),) * len(held),
    lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
    (0,),
  )
  return tuple(lax.optimization_barrier(tuple(found)))[: len(terms)]


def _by_axes(term: Array) -> Array:
  while term.ndim:
    term = lax.optimization_barrier(jnp.sum(term, axis=-1))
  return term
