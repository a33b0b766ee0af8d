"""Values under way: leaves of versions, and new ones that are stored nowhere.

Verbs that compute versions (merge, revert, cherry-pick, rebase) work on
entries throughout. A leaf that is taken over is never read; one that is
computed is held here until the result is committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from patchjax.history.arrays import known
from patchjax.history.arrays.restoring import stored
from patchjax.trees import dtypes
from patchjax.trees.digest import Entry, entry

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

Leaves = dict[str, Entry]
"""A version: the entries of its leaves by text name."""


class Values:
  """Leaves by entry, from a repository and from memory.

  Attributes:
    repo: the repository.
  """

  def __init__(self, repo: Repo):
    self.repo = repo
    self._new: dict[str, Any] = {}

  def put(self, x: Any) -> Entry:
    """Keeps a new leaf and returns its entry.

    Args:
      x: an array.
    """
    found = entry(x)
    known.remember(x, found)
    self._new[found.digest] = x
    return found

  def words(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Returns the bits of leaves, verified.

    Args:
      entries: `{name: entry}`.
    """
    old = {k: e for k, e in entries.items() if e.digest not in self._new}
    found = self.repo.reader.read(old) if old else {}
    new = {
      name: dtypes.host(self._new[e.digest])[0]
      for name, e in entries.items()
      if name not in old
    }
    return {**found, **new}

  def arrays(self, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns leaves on the host, PRNG keys as keys.

    Args:
      entries: `{name: entry}`.
    """
    words = self.words(entries)
    return {name: stored(words[name], e) for name, e in entries.items()}

  def named(self, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns a version as it is committed: entries, and leaves that are new.

    Args:
      entries: its leaves.
    """
    return {name: self._new.get(e.digest, e) for name, e in entries.items()}
