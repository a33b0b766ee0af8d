"""log: the commits behind refs, in ranges, or that changed some leaves."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from patchjax.history.commits import graph, leaves
from patchjax.trees.errors import RefNotFoundError, SelectionError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit


def log(
  repo: Repo,
  ref: str | Sequence[str] = "main",
  *,
  limit: int | None = None,
  name: str | None = None,
) -> list[Commit]:
  """Returns a commit and all before it: children first, else latest first.

  With a `limit`, no more of the history is read than is returned.

  Args:
    repo: the repository.
    ref: a ref, or several. `a..b` stands for what leads to b and not to a;
      an end that is left out is `main`. `^a` leaves out what leads to a.
    limit: how many to return at most.
    name: a regex; only commits are returned that changed a leaf whose whole
      name matches. Of a merge that took all such leaves from one side, this
      side is followed alone, as in git.

  Raises:
    RefNotFoundError: if a ref names nothing.
    SelectionError: if `name` is no regex.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> a, b = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"a": a, "b": a}, message="start")
    ...   second = repo.commit({"a": a, "b": b}, message="b")
    ...   third = repo.commit({"a": b, "b": b}, message="a")
    ...   [commit.title for commit in repo.log(name="b")]
    ...   [commit.title for commit in repo.log("main~2..")]
    ['b', 'start']
    ['a', 'b']
  """
  commits = Listing(repo, [ref] if isinstance(ref, str) else ref, name)
  return list(itertools.islice(commits, limit))


class Listing:
  """The commits that a log shows, and how they are linked.

  Attributes:
    repo: the repository.
  """

  def __init__(self, repo: Repo, refs: Sequence[str], name: str | None = None):
    """Reads nothing but the refs yet.

    Args:
      repo: the repository.
      refs: see `log`.
      name: see `log`.
    """
    self.repo = repo
    self._tips, self._without = _ends(repo, refs)
    try:
      self._pattern = None if name is None else re.compile(name)
    except re.error as error:
      raise SelectionError(f"{name!r} is no regex: {error}") from error
    # For commits that are passed over: the parent that says the same.
    self._passed: dict[str, str | None] = {}

  def __iter__(self) -> Iterator[Commit]:
    return graph.walk(
      self._tips,
      self.repo.objects,
      without=self._without,
      follow=None if self._pattern is None else self._follow,
    )

  @property
  def filtered(self) -> bool:
    """Whether commits are passed over: `parents` needs a whole iteration."""
    return self._pattern is not None

  def parents(self, commit: Commit) -> tuple[str, ...]:
    """Returns the parents as shown: those passed over stand for theirs.

    Args:
      commit: a commit of the listing, all of which was iterated over.
    """
    found = []
    for parent in self.repo.objects.parents(commit.id):
      at: str | None = parent
      while at is not None and at in self._passed:
        at = self._passed[at]
      if at is not None and at not in found:
        found.append(at)
    return tuple(found)

  def _follow(self, commit: Commit) -> tuple[bool, Sequence[str]]:
    objects = self.repo.objects
    parents = objects.parents(commit.id)
    for parent in parents:
      if not self._differs(objects.commit(parent).tree, commit.tree):
        self._passed[commit.id] = parent
        return False, (parent,)
    if not parents and not self._differs(None, commit.tree):
      self._passed[commit.id] = None
      return False, ()
    return True, parents

  def _differs(self, old: str | None, new: str) -> bool:
    found = leaves.changes(self.repo.objects, old, new)
    pattern = self._pattern
    return pattern is not None and any(
      pattern.fullmatch(n) for n, _, _ in found
    )


def _ends(repo: Repo, refs: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the commits to start from, and those to leave out."""
  tips, without = [], []
  for ref in refs:
    start, dots, end = ref.partition("..")
    if dots and end.startswith("."):
      raise RefNotFoundError(
        f"{ref!r}: expected a..b, what leads to b and not to a"
      )
    if dots:
      without.append(repo.resolve(start or "main"))
      tips.append(repo.resolve(end or "main"))
    elif ref.startswith("^"):
      without.append(repo.resolve(ref[1:]))
    else:
      tips.append(repo.resolve(ref))
  return tips, without
