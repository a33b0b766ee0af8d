"""Branches and tags: created, removed, renamed, and moved by hand."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from patchjax.history.commits import graph
from patchjax.history.storage import reflog
from patchjax.history.storage.refs import HEADS, TAGS
from patchjax.trees.errors import ConflictError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def branches(repo: Repo) -> dict[str, str]:
  """Returns `{branch: commit id}`; warns of damaged ones and goes on.

  Args:
    repo: the repository.
  """
  return _readable(repo, HEADS)


def tags(repo: Repo) -> dict[str, str]:
  """Returns `{tag: commit id}`; warns of damaged ones and goes on.

  Args:
    repo: the repository.
  """
  return _readable(repo, TAGS)


def _readable(repo: Repo, space: str) -> dict[str, str]:
  found, damaged = repo.refs.readable(space)
  for message in damaged.values():
    warnings.warn(message, stacklevel=3)
  return found


def branch(
  repo: Repo,
  name: str,
  at: str = "main",
  *,
  rename: str | None = None,
  delete: bool = False,
  force: bool = False,
) -> str:
  """Creates a branch and returns the id of the commit it starts at.

  Args:
    repo: the repository.
    name: its name.
    at: ref to start at.
    rename: gives the branch, which there must be, this name instead.
    delete: removes the branch instead. Its reflog stays: `<name>@{1}` is what
      it was, as long as `gc` keeps that.
    force: whether to remove a branch with commits that no other branch or tag
      leads to.

  Returns:
    The commit id it starts at, or was at.

  Raises:
    ConflictError: if there is such a branch (or if somebody moves it).
    RefNotFoundError: if there is none to remove or rename.
    RepositoryError: if removing it would hide commits.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": np.zeros(2)}, message="start")
    ...   repo.branch("try") == first
    ...   repo.branch("try", rename="tried") == first
    ...   list(repo.branches())
    ...   repo.branch("tried", delete=True) == first
    True
    True
    ['main', 'tried']
    True
  """
  if delete or rename is not None:
    if delete and rename is not None:
      raise RepositoryError("branch: give `delete` or `rename`, not both")
    commit = repo.refs.must(HEADS, name)
    if rename is not None:
      _create(repo, HEADS, rename, commit, f"branch: renamed {name}")
      why = f"branch: renamed to {rename}"
    else:
      if not force:
        _check_reached(repo, name, commit)
      why = "branch: deleted"
    reflog.move(repo, HEADS, name, old=commit, new=None, why=why)
    return commit
  return _create(repo, HEADS, name, repo.resolve(at), f"branch: at {at}")


def tag(
  repo: Repo, name: str, ref: str = "main", *, delete: bool = False
) -> str:
  """Names a version for good and returns its commit id; tags never move.

  Args:
    repo: the repository.
    name: name of the tag.
    ref: the version.
    delete: removes the tag instead; its reflog stays.

  Raises:
    ConflictError: if there is such a tag.
    RefNotFoundError: if there is none to remove.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": np.zeros(2)}, message="start")
    ...   repo.tag("v1") == first, list(repo.tags())
    (True, ['v1'])
  """
  if delete:
    commit = repo.refs.must(TAGS, name)
    reflog.move(repo, TAGS, name, old=commit, new=None, why="tag: deleted")
    return commit
  return _create(repo, TAGS, name, repo.resolve(ref), f"tag: {ref}")


def reset(
  repo: Repo, ref: str, *, branch: str = "main", author: str | None = None
) -> str:
  """Moves a branch to any version, and returns the commit id it was at.

  Commits that it does not lead to any more stay; `<branch>@{1}` names the
  last of them, as long as `gc` keeps them.

  Args:
    repo: the repository.
    ref: where to move it.
    branch: the branch.
    author: by whom; by default as for `commit`.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime.
    RefNotFoundError: if there is no such branch or version.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": np.zeros(2)}, message="start")
    ...   second = repo.commit({"w": np.ones(2)}, message="mistake")
    ...   repo.reset(first) == second
    ...   repo.show().title, repo.show("main@{1}").title
    True
    ('start', 'mistake')
  """
  new = repo.resolve(ref)
  old = repo.refs.must(HEADS, branch)
  if new != old:
    why = f"reset: moving to {ref}"
    reflog.move(repo, HEADS, branch, old=old, new=new, why=why, who=author)
  return old


def _create(repo: Repo, space: str, name: str, commit: str, why: str) -> str:
  other = TAGS if space == HEADS else HEADS
  if repo.refs.get(other, name) is not None:
    noun = "tag" if other == TAGS else "branch"
    raise ConflictError(
      f"there is a {noun} {name!r} already; one name for both would be "
      "ambiguous"
    )
  reflog.move(repo, space, name, old=None, new=commit, why=why)
  return commit


def _check_reached(repo: Repo, name: str, commit: str) -> None:
  others = [at for each, at in branches(repo).items() if each != name]
  others += tags(repo).values()
  if not any(graph.is_ancestor(commit, at, repo.objects) for at in others):
    raise RepositoryError(
      f"branch {name!r} is at {repo.refs.describe(commit)}, which no other "
      "branch or tag leads to: merge it first, or delete it all the same "
      f"with force=True (-D); {name}@{{1}} will name it"
    )
