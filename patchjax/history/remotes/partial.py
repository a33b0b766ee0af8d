"""Partial clones: which leaves were left out, and how to get them.

What a fetch leaves out with `only` is no damage: `fsck` counts it, and a
checkout says where it is and what fetches it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from patchjax.history.commits import graph
from patchjax.history.remotes.reach import roots
from patchjax.history.storage import config

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.config import Remote
  from patchjax.history.storage.files import Files
  from patchjax.trees.digest import Entry

_SHOWN = 5


def sources(files: Files) -> list[Remote]:
  """Returns the remotes of which a repository is a partial clone.

  Args:
    files: files of the repository.
  """
  return [r for r in config.read(files).values() if r.only is not None]


def asked(repo: Repo, commits: Iterable[str]) -> set[str] | None:
  """Returns the leaves that must be here, or None if that is all of them.

  Args:
    repo: the repository.
    commits: ids of the commits whose leaves are meant.
  """
  found = sources(repo.files)
  if not found:
    return None
  # What came from which remote is not known: what one left out may be absent.
  filters = [[re.compile(p) for p in remote.only or ()] for remote in found]
  return {
    entry.digest
    for name, entry in _leaves(repo, commits)
    if all(any(p.fullmatch(name) for p in patterns) for patterns in filters)
  }


def lacking(repo: Repo) -> list[str]:
  """Returns the names of leaves that refs lead to and that are not here.

  Args:
    repo: the repository.
  """
  names = {
    entry.digest: name
    for name, entry in _leaves(repo, graph.ancestors(roots(repo), repo.objects))
    if entry.size
  }
  repo.index.refresh()
  found = repo.index.find(names)
  return sorted({names[digest] for digest in names if not found[digest]})


def _leaves(repo: Repo, commits: Iterable[str]) -> Iterator[tuple[str, Entry]]:
  for tree in {repo.objects.commit(name).tree for name in commits}:
    yield from repo.objects.tree(tree).items()


def explain(files: Files, names: Collection[str]) -> str | None:
  """Returns what to do about leaves that are not here by choice.

  Args:
    files: files of the repository.
    names: names of the leaves.

  Returns:
    A message that names the remote and the command; None if the repository is
    no partial clone, so that something else is wrong.
  """
  found = sources(files)
  if not found:
    return None
  remote = found[0]
  shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." * (len(names) > _SHOWN))
  pattern = "|".join(re.escape(name) for name in sorted(names)[:_SHOWN])
  if len(names) > _SHOWN:
    pattern = "REGEX"
  return (
    f"{len(names)} leaf/leaves were not copied: {shown}; this is a partial "
    f"clone of {remote.url}, with only={list(remote.only or ())}. Fetch them: "
    f"`patchjax fetch {remote.name} --only {shlex.quote(pattern)}` "
    f"(repo.fetch({remote.name!r}, only=...)), or everything: `patchjax fetch "
    f"{remote.name} --complete`; or check out with only="
  )
