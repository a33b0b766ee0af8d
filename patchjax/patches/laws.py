"""Laws: how the numbers of a delta act on those of a leaf.

Sums and products are computed in float32 for leaves of up to 32 bits, in
float64 for wider ones, and rounded once, to the dtype of the leaf. The law
`bits` adds integers modulo the word and never rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_alike import shard_alike

from patchjax.patches import words
from patchjax.patches.codes import GATHER, SCATTER, Sparse
from patchjax.patches.deltas import Delta
from patchjax.trees.dtypes import KINDS, dtype_name, is_key, widened
from patchjax.trees.errors import LawError

Array = Any


@dataclasses.dataclass(frozen=True)
class Law:
  """What a law means; each function works on jax and numpy arrays alike.

  Attributes:
    act: `(x, d) -> y`.
    undo: `(y, d) -> x`, or None where the old number is lost.
    join: `(first, second) -> d`, one delta that does both.
    identity: the number that changes nothing; None if there is none.
  """

  act: Callable[[Array, Array], Array]
  undo: Callable[[Array, Array], Array] | None
  join: Callable[[Array, Array], Array]
  identity: float | None


LAWS: dict[str, Law] = {
  "add": Law(
    act=lambda x, d: x + d,
    undo=lambda y, d: y - d,
    join=lambda p, q: p + q,
    identity=0,
  ),
  "mul": Law(
    act=lambda x, d: x * d,
    undo=lambda y, d: y / d,
    join=lambda p, q: p * q,
    identity=1,
  ),
  "set": Law(
    act=lambda x, d: d,
    undo=None,
    join=lambda p, q: q,
    identity=None,
  ),
  # On words: unsigned integers wrap around.
  "bits": Law(
    act=lambda x, d: x + d,
    undo=lambda y, d: y - d,
    join=lambda p, q: p + q,
    identity=0,
  ),
}


def compute_dtype(leaf: Any) -> np.dtype:
  """Returns the dtype in which arithmetic on a leaf is done.

  Args:
    leaf: an array of floating point or complex numbers.

  Raises:
    LawError: if there is no arithmetic on the leaf's dtype.

  Example:
    >>> compute_dtype(jnp.zeros(2, jnp.bfloat16)).name
    'float32'
  """
  name = dtype_name(leaf)
  if is_key(leaf) or not KINDS[name].floating:
    raise LawError(
      f"there is no arithmetic on {name} leaves; use the laws 'set' or "
      "'bits' (`diff(..., exact=True)` makes the latter)"
    )
  return widened(KINDS[name].dtype)


def act(leaf: Array, delta: Delta, dtype: Any = None) -> jax.Array:
  """Returns one leaf with a delta applied.

  Args:
    leaf: the base leaf, or its tracer.
    delta: the change.
    dtype: dtype of the result, by default that of the leaf.

  Returns:
    An array of the leaf's shape; entries a sparse delta does not hold are
    copied.

  Raises:
    LawError: if the law cannot act on the leaf's dtype.
  """
  return _act(leaf, delta, LAWS[delta.law].act, dtype)


def undo(leaf: Array, delta: Delta) -> jax.Array:
  """Returns the leaf to which `delta` was applied; the inverse of `act`.

  Args:
    leaf: the changed leaf.
    delta: the change.

  Returns:
    The old leaf: exactly for `bits`, up to rounding for `add` and `mul`.

  Raises:
    LawError: if the law is `set`, which forgets the old numbers.
  """
  function = LAWS[delta.law].undo
  if function is None:
    raise LawError(
      f"a delta of law {delta.law!r} cannot be reverted: the old numbers "
      "are not in it; make the patch with `diff(old, new, exact=True)`"
    )
  return _act(leaf, delta, function, None)


def _act(leaf: Array, delta: Delta, function: Any, dtype: Any) -> jax.Array:
  """`function` between the leaf's numbers and the delta's."""
  if delta.law == "bits":
    if dtype is not None and jnp.dtype(dtype) != leaf.dtype:
      raise LawError(
        f"a delta of law 'bits' gives back the leaf's own {leaf.dtype}; "
        f"dtype={jnp.dtype(dtype).name} cannot be had"
      )
    changed = _combine(words.to_words(leaf), delta.code, function, None)
    return words.from_words(changed, leaf)
  if delta.law == "set":
    if is_key(leaf):
      return delta.code.dense()
    out = jnp.dtype(dtype or leaf.dtype)
    return _combine(_as(leaf, out), delta.code, function, out)
  compute = compute_dtype(leaf)
  out = jnp.dtype(dtype or leaf.dtype)
  if isinstance(delta.code, Sparse):
    # Entries that are not touched must not pass through the arithmetic.
    return _combine(
      _as(leaf, out),
      delta.code,
      lambda x, d: function(_as(x, compute), d),
      compute,
      old=leaf,
    )
  return _combine(_as(leaf, compute), delta.code, function, compute).astype(out)


def _combine(
  x: Array, code: Any, function: Any, dtype: Any, old: Array | None = None
) -> jax.Array:
  """`function(x, numbers of code)`, only at its entries if it is sparse."""
  if not isinstance(code, Sparse):
    full = code.dense(dtype)
    # Spread what Dense holds along some axes only.
    full = jnp.broadcast_to(full, x.shape)
    # The result of `set` does not depend on x, whose sharding it must keep:
    # on Auto meshes only the compiler knows that.
    return function(*shard_alike(x, full))
  at = code.positions()
  source = x if old is None else old
  if not code.shape:
    x, source = x[None], source[None]
  entries = function(source.at[at].get(**GATHER), code.entries(dtype))
  changed = x.at[at].set(entries.astype(x.dtype), **SCATTER)
  return changed if code.shape else changed[0]


def _as(x: Array, dtype: Any) -> jax.Array:
  return jnp.asarray(x).astype(dtype)
