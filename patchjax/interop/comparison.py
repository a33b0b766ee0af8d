"""Two checkpoints side by side, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.history import TreeDiff
from patchjax.history.arrays import state
from patchjax.history.commits.differences import compare
from patchjax.trees.digest import Entry, words_digest
from patchjax.trees.dtypes import host, is_array
from patchjax.trees.names import named_leaves


class _Values:
  """Leaves in memory, read as a repository reads stored ones."""

  def __init__(self):
    self.words: dict[Entry, np.ndarray] = {}

  def entries(self, params: Any) -> dict[str, Entry]:
    entries = {}
    for name, leaf in state.arrays(named_leaves(params)).items():
      if is_array(leaf):
        words, dtype = host(leaf)
        shape = tuple(np.shape(leaf))
        entry = Entry(words_digest(words, dtype, shape), dtype, shape)
        entries[name], self.words[entry] = entry, words
    return entries

  def read(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    return {name: self.words[entry] for name, entry in entries.items()}


def compare_params(old: Any, new: Any) -> TreeDiff:
  """Returns what differs between two pytrees, leaf by leaf.

  Args:
    old: any pytree of arrays.
    new: another; containers may differ, leaves are compared by name.

  Returns:
    What `Repo.diff` returns for two versions; print it.

  Example:
    >>> a = {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.int8)}
    >>> found = compare_params(a, {**a, "w": np.float32([0, 0, 2])})
    >>> found.changed, found.count, found.same
    (('w',), 1, 1)
  """
  values = _Values()
  return compare(values.entries(old), values.entries(new), values)
