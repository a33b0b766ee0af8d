"""Restoring: from stored leaves to the tree that the user asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.history import known, state
from patchjax.trees import dtypes
from patchjax.trees.check import check_named
from patchjax.trees.digest import Entry
from patchjax.trees.names import flatten, nested
from patchjax.trees.selectors import select_named


def pick(
  entries: Mapping[str, Entry], like: Any, only: Any, what: str
) -> dict[str, Entry]:
  """Returns the entries to read, once `like` is known to fit.

  Args:
    entries: the leaves of the version.
    like: see `Repo.checkout`.
    only: see `Repo.checkout`.
    what: what the version is called, for messages.

  Raises:
    MismatchError: if `like` expects other leaves; lists every one.
    SelectionError: if `only` picks nothing.
  """
  if like is not None:
    expected = state.expected(flatten(like)[0], entries)
    if only is not None:
      # Only what is asked for has to fit: the rest stays as it is.
      picked = select_named(expected, only)
      expected = {name: expected[name] for name in picked}
      entries = {k: v for k, v in entries.items() if k in expected}
    check_named(expected, entries, what=what)
    return {name: entries[name] for name in expected}
  return {name: entries[name] for name in select_named(entries, only)}


def build(
  words: Mapping[str, np.ndarray], entries: Mapping[str, Entry], like: Any
) -> Any:
  """Returns the tree of some leaves.

  Args:
    words: `{name: bits}` of the leaves that were read.
    entries: their entries.
    like: see `Repo.checkout`.
  """
  used: set[int] = set()

  def place(name: str, leaf: Any) -> Any:
    bits = words[name]
    if id(bits) in used:
      # Equal leaves are read once, and must not share memory: numpy arrays
      # can be written to, and JAX may use their memory without a copy.
      bits = bits.copy()
    used.add(id(bits))
    return _place(bits, entries[name], leaf)

  if like is None:
    return nested({name: place(name, None) for name in words})
  import jax

  named, treedef = flatten(like)
  leaves = [
    place(name, leaf) if name in words else leaf for name, leaf in named.items()
  ]
  return jax.tree.unflatten(treedef, leaves)


def stored(words: np.ndarray, entry: Entry) -> Any:
  """Returns a leaf as it was stored: on the host, PRNG keys as keys.

  Args:
    words: its bits.
    entry: its entry.
  """
  return dtypes.device(words, entry.dtype)


def _place(words: np.ndarray, entry: Entry, like: Any) -> Any:
  """Returns one leaf where `like` has it: on the host, or in its sharding."""
  import jax

  x = stored(words, entry)
  if state.is_data(like):
    return state.restored(x, like)
  if isinstance(like, np.ndarray | np.generic):
    return x if x.flags.writeable else x.copy()
  if dtypes.is_wide(x):
    return x  # JAX would narrow it
  sharding = getattr(like, "sharding", None)
  if not getattr(like, "committed", True):
    sharding = None  # free to follow what it meets, as the count of adam is
  placed = jax.device_put(x, sharding)
  if getattr(like, "weak_type", False):
    placed = state.weak(placed)
  known.remember(placed, entry)
  return placed
