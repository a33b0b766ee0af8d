"""blame: which commit gave each leaf the bits that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph, leaves

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit


def blame(
  repo: Repo, ref: str = "main", *, only: Any = None
) -> dict[str, Commit]:
  """Returns, for each leaf of a version, the commit that last changed it.

  A merge is followed to the first parent that has the same leaf, to the bit;
  it is to blame itself only for what it has from none of them. Equal folders
  are never looked into, so a long history of small commits is cheap.

  Args:
    repo: the repository.
    ref: the version.
    only: which leaves (see `patchjax.select`); by default all.

  Returns:
    `{text name: commit}`, in the order of the names.

  Raises:
    SelectionError: if `only` picks nothing.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> a, b = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"a": a, "b": a}, message="start")
    ...   second = repo.commit({"a": a, "b": b}, message="tune b")
    ...   {name: commit.title for name, commit in repo.blame().items()}
    {'a': 'start', 'b': 'tune b'}
  """
  from patchjax.trees.selectors import select_named

  objects = repo.objects
  tip = repo.resolve(ref)
  names = select_named(objects.tree(objects.commit(tip).tree), only)
  pending = {tip: set(names)}  # leaves that a commit has as the version does
  waiting = graph.Waiting(objects, [tip])
  found: dict[str, Commit] = {}
  while waiting:
    commit = waiting.pop()
    rest = pending.pop(commit.id)
    for parent in objects.parents(commit.id):
      if not rest:
        break
      differing = leaves.changes(
        objects, objects.commit(parent).tree, commit.tree
      )
      kept = {name for name, _, _ in differing if name in rest}
      rest -= kept
      if rest:
        # The set itself is handed on: a leaf costs nothing while it stays.
        if parent in pending:
          pending[parent] |= rest
        else:
          pending[parent] = rest
        waiting.add(parent)
      rest = kept
    found.update(dict.fromkeys(rest, commit))
  return {name: found[name] for name in names}
