"""What is to be written: leaves described first, fetched as they are due."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from patchjax.history.arrays import state
from patchjax.trees.digest import Entry
from patchjax.trees.dtypes import KINDS, dtype_name, host, is_array
from patchjax.trees.names import named_leaves

if TYPE_CHECKING:
  from patchjax.history import Repo

_GROUP = 64 << 20  # bytes fetched at a time: reading is faster in company


@dataclasses.dataclass(frozen=True)
class Source:
  """The leaves of a tree, or of a version, on their way to a file.

  Attributes:
    entries: `{text name: dtype and shape}` (digests may be empty).
    fetch: returns the words of some of them.
  """

  entries: Mapping[str, Entry]
  fetch: Callable[[Sequence[str]], Mapping[str, np.ndarray]]

  def itemsize(self, name: str) -> int:
    """Returns the bytes of a word of a leaf; 0 if its dtype is no plain one."""
    kind = KINDS.get(self.entries[name].dtype)
    return 0 if kind is None else kind.word.itemsize

  def nbytes(self, name: str) -> int:
    """Returns the bytes of a leaf."""
    entry = self.entries[name]
    return entry.size * KINDS[entry.dtype].words * self.itemsize(name)

  def stream(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the words of leaves, few in memory at a time.

    Args:
      names: which, in this order.
    """
    group: list[str] = []
    size = 0
    for name in names:
      more = self.nbytes(name)
      if group and size + more > _GROUP:
        yield from self._take(group)
        group, size = [], 0
      group.append(name)
      size += more
    yield from self._take(group)

  def _take(self, group: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    words = dict(self.fetch(group))
    for name in group:
      yield name, words.pop(name)


def of_tree(tree: Any) -> Source:
  """Returns the arrays of a pytree as what is to be written.

  Args:
    tree: any pytree; Python numbers count as arrays without axes, functions
      are left out.
  """
  held = state.arrays(named_leaves(tree))
  named = {k: v for k, v in held.items() if is_array(v)}
  entries = {
    name: Entry("", dtype_name(leaf), tuple(np.shape(leaf)))
    for name, leaf in named.items()
  }
  return Source(
    entries, lambda names: {name: host(named[name])[0] for name in names}
  )


def of_version(repo: Repo, ref: str, only: Any = None) -> Source:
  """Returns the leaves of a version as what is to be written, verified.

  Args:
    repo: the repository.
    ref: the version.
    only: which leaves; see `patchjax.select`.
  """
  from patchjax.trees.selectors import select_named

  entries = repo.tree(ref)
  entries = {name: entries[name] for name in select_named(entries, only)}
  return Source(
    entries,
    lambda names: repo.reader.read({name: entries[name] for name in names}),
  )
