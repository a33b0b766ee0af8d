"""Arrays whose digest is known: what has not changed is not hashed again.

A `jax.Array` never changes, so its digest holds as long as the object lives.
Weak references only: knowing an array does not keep it in memory. Numpy arrays
can be written to at any time and are never remembered. A `jax.Array` made by
`jax.device_put` may share the memory of the numpy array it was made of: who
writes to that afterwards changes what JAX, and we, take to be constant.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from patchjax.history.arrays import parts
from patchjax.history.arrays.parts import Parts
from patchjax.trees.digest import Entry

_BLOCK = 1 << 20  # bytes compared at a time: a change is found early

_by_identity: dict[int, tuple[weakref.ref[Any], Entry]] = {}
_by_digest: weakref.WeakValueDictionary[str, Any] = (
  weakref.WeakValueDictionary()
)


def remember(x: Any, entry: Entry) -> None:
  """Notes the digest of an array, if it is one that cannot change.

  Args:
    x: a leaf.
    entry: its digest, dtype and shape.
  """
  import jax

  if not isinstance(x, jax.Array):
    return
  identity = id(x)

  def forget(reference: weakref.ref[Any]) -> None:
    # The id may belong to another array by now.
    found = _by_identity.get(identity)
    if found is not None and found[0] is reference:
      del _by_identity[identity]

  _by_identity[identity] = (weakref.ref(x, forget), entry)
  _by_digest[entry.digest] = x


def recall(x: Any) -> Entry | None:
  """Returns the entry of this very array, or None if it is not known.

  Args:
    x: a leaf.
  """
  found = _by_identity.get(id(x))
  return found[1] if found is not None and found[0]() is x else None


def parts_of(digest: str) -> Parts | None:
  """Returns what this process holds of a leaf, if an array of it is alive.

  Args:
    digest: digest of the leaf.
  """
  x = _by_digest.get(digest)
  return None if x is None or x.is_deleted() else parts.parts_of(x)


def equal(held: Parts, parent: Entry | None) -> Entry | None:
  """Returns the parent's entry if an array of it is alive, and has these bits.

  A comparison runs several times as fast as SHA-256.

  Args:
    held: what this process holds of a leaf: the answer is about that.
    parent: entry of the leaf of this name in the parent version.
  """
  if parent is None or (parent.dtype, parent.shape) != (held.dtype, held.shape):
    return None
  old = parts_of(parent.digest)
  if old is None:
    return None
  for part in held.parts:
    try:
      before = old.read(part.region)
    except ValueError:
      return None  # it lies in other processes
    if not _equal(part.fetch(), before):
      return None
  return parent


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  a, b = a.reshape(-1), b.reshape(-1)
  step = _BLOCK // a.itemsize
  return all(
    np.array_equal(a[start : start + step], b[start : start + step])
    for start in range(0, a.size, step)
  )
