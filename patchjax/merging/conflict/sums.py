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


def totals(terms: Sequence[Array], *, local: bool) -> Array:
  """Returns the sum of each term, `[len(terms)]` of their dtype.

  Args:
    terms: floating point arrays of one shape.
    local: whether they lie on one device, and so reshape freely.
  """
  if not local:
    return jnp.stack([_by_axes(term) for term in terms])
  found = []
  for i in range(0, len(terms), _TERMS):
    found += _blocked(tuple(terms[i : i + _TERMS]))
  return jnp.stack(found)


def _blocked(terms: tuple[Array, ...]) -> tuple[Array, ...]:
  size = math.prod(terms[0].shape)
  terms = tuple(term.reshape(-1) for term in terms)
  # One operand alone would take a slower path of XLA's CPU compiler.
  held = terms if len(terms) > 1 else (*terms, *terms)
  while size > 1:
    rows = min(_BLOCK, size)
    columns = -(-size // rows)
    pad = rows * columns - size
    if pad:
      held = tuple(jnp.pad(x, (0, pad)) for x in held)
    held = tuple(x.reshape(rows, columns) for x in held)
    zero = jnp.zeros((), held[0].dtype)
    # Along the major axis: neighbours are added side by side, in vectors.
    held = lax.reduce(
      held,
      (zero,) * len(held),
      lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
      (0,),
    )
    held = lax.optimization_barrier(tuple(held))
    size = columns
  if not size:
    return tuple(jnp.zeros((), term.dtype) for term in terms)
  return tuple(x.reshape(()) for x in held[: len(terms)])


def _by_axes(term: Array) -> Array:
  while term.ndim:
    term = lax.optimization_barrier(jnp.sum(term, axis=-1))
  return term
