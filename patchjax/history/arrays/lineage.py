"""Lineage: every leaf of a history, the oldest first, and those near it.

What a leaf may be a difference to is what is likely to be close: the leaf of
its name in the parents, in the first version, and in what branches and tags
name. Only what comes earlier in the order is offered, so that differences
never run in circles.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

from patchjax.history.commits import graph
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

_NEAR = 6  # candidates of a leaf: the work on it is bounded


@dataclasses.dataclass(frozen=True)
class Member:
  """A leaf of a history.

  Attributes:
    name: the first name under which it appeared.
    entry: its digest, dtype and shape.
    near: digests of earlier leaves that it may be a difference to, of the
      same dtype and shape, the nearest first.
    patch: id of the patch file that was committed with it, if one was.
  """

  name: str
  entry: Entry
  near: tuple[str, ...]
  patch: str | None


def members(repo: Repo) -> list[Member]:
  """Returns the leaves of all that branches, tags and remotes reach.

  Args:
    repo: the repository.
  """
  tips = {}
  for space in (HEADS, TAGS, REMOTES):
    tips |= {(space, n): id_ for n, id_ in repo.refs.all(space).items()}
  commits = graph.ancestors(tips.values(), repo.objects)
  named = set(tips.values())
  seen: dict[str, Member] = {}
  # For each name: its leaf in the first version, and in those with a name.
  marked: dict[str, dict[str, None]] = collections.defaultdict(dict)
  for id_ in _oldest_first(repo, commits):
    commit = repo.objects.commit(id_)
    tree = repo.objects.tree(commit.tree)
    before = [
      repo.objects.tree(repo.objects.commit(parent).tree)
      for parent in commit.parents
      if parent in commits
    ]
    for name, entry in tree.items():
      if entry.size and entry.digest not in seen:
        near = [old[name].digest for old in before if name in old]
        near += reversed(marked[name])
        fitting = [
          digest
          for digest in dict.fromkeys(near)
          if digest in seen and _fits(seen[digest].entry, entry)
        ]
        # The first version is a base that many others have, too.
        some = tuple(dict.fromkeys([*fitting[: _NEAR - 1], *fitting[-1:]]))
        seen[entry.digest] = Member(name, entry, some, commit.patch)
      if id_ in named or not commit.parents:
        marked[name][entry.digest] = None
  return list(seen.values())


def _fits(a: Entry, b: Entry) -> bool:
  return (a.dtype, a.shape) == (b.dtype, b.shape)


def _oldest_first(repo: Repo, commits: set[str]) -> list[str]:
  """Returns commits after their parents, otherwise by their time."""
  order: list[str] = []
  done: set[str] = set()
  for start in sorted(commits, key=lambda c: (repo.objects.commit(c).when, c)):
    stack = [start]
    while stack:
      id_ = stack[-1]
      parents = [
        parent
        for parent in repo.objects.commit(id_).parents
        if parent in commits and parent not in done
      ]
      if id_ in done or not parents:
        stack.pop()
        if id_ not in done:
          done.add(id_)
          order.append(id_)
      else:
        stack += parents
  return order
