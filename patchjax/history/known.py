"""Arrays whose digest is known: what has not changed is not hashed again.

A `jax.Array` never changes, so its digest holds as long as the object lives.
Weak references only: knowing an array does not keep it in memory. Numpy arrays
can be written to at any time and are never remembered.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from patchjax.trees import dtypes
from patchjax.trees.digest import Entry, words_digest

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


def words_of(digest: str) -> np.ndarray | None:
  """Returns the bits of a leaf if some array that holds them is alive.

  Args:
    digest: digest of the leaf.
  """
  x = _by_digest.get(digest)
  if x is None or x.is_deleted() or not x.is_fully_addressable:
    return None
  return dtypes.host(x)[0]


def entry_of(x: Any, parent: Entry | None) -> Entry:
  """Returns the entry of a leaf by the cheapest proof there is.

  Identity, then bit equality with the parent's array if it is in memory (a
  comparison runs several times as fast as SHA-256), then the digest.

  Args:
    x: the leaf.
    parent: entry of the leaf of this name in the parent version.

  Raises:
    DtypeError: if it is no array of a known dtype.
  """
  entry = recall(x)
  if entry is not None:
    return entry
  words, dtype = dtypes.host(x)
  shape = tuple(np.shape(x))
  if (
    parent is not None
    and (parent.dtype, parent.shape) == (dtype, shape)
    and (old := words_of(parent.digest)) is not None
    and _equal(words, old)
  ):
    entry = parent
  else:
    entry = Entry(words_digest(words, dtype, shape), dtype, shape)
  remember(x, entry)
  return entry


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  if a.shape != b.shape:
    return False
  a, b = a.reshape(-1), b.reshape(-1)
  step = _BLOCK // a.itemsize
  return all(
    np.array_equal(a[start : start + step], b[start : start + step])
    for start in range(0, a.size, step)
  )
