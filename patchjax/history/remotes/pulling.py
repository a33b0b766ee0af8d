"""pull: a branch of another repository, fetched and joined with ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph
from patchjax.history.remotes.fetching import fetch
from patchjax.history.remotes.reach import Progress
from patchjax.history.storage import config, reflog
from patchjax.history.storage.refs import HEADS
from patchjax.trees.errors import ConflictError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def pull(
  repo: Repo,
  remote: str | os.PathLike[str] | None = None,
  branch: str = "main",
  *,
  method: Any = None,
  message: str | None = None,
  author: str | None = None,
  progress: Progress | None = None,
) -> str:
  """Fetches a branch and brings the local one up to it.

  Where only the remote went on, the branch moves there; where both did, they
  are merged by a method.

  Args:
    repo: the repository.
    remote: see `fetch`.
    branch: the branch, there and here.
    method: how to merge, such as `patchjax.merging.ties(density=0.2)`; not
      needed where only one side went on.
    message: of a merge commit; by default says what was merged.
    author: by whom; by default as for `commit`.
    progress: see `fetch`.

  Returns:
    The commit the branch is at.

  Raises:
    ConflictError: if both sides went on and there is no method; names both.
    RefNotFoundError: if the remote does not have the branch.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as theirs, Repo.temporary() as ours:
    ...   first = theirs.commit({"w": np.ones(2)}, message="start")
    ...   ours.pull(theirs.path) == first
    ...   second = theirs.commit({"w": np.zeros(2)}, message="more")
    ...   ours.pull(theirs.path) == second
    True
    True
  """
  place = config.find(repo, remote)
  fetched = fetch(repo, remote, [branch], progress=progress)
  theirs = fetched.branches[branch][1]
  mine = repo.refs.get(HEADS, branch)
  if mine is None or graph.is_ancestor(mine, theirs, repo.objects):
    if mine != theirs:
      why = f"pull {place.label}: fast-forward"
      reflog.move(
        repo, HEADS, branch, old=mine, new=theirs, why=why, who=author
      )
    return theirs
  if graph.is_ancestor(theirs, mine, repo.objects):
    return mine
  if method is None:
    raise ConflictError(
      f"branch {branch!r} went on here, to {repo.refs.describe(mine)}, and at "
      f"{place.label!r}, to {repo.refs.describe(theirs)}; say how to merge "
      "them: method=, or `patchjax pull --method`"
    )
  message = message or f"Merge {branch} of {place.label} into {branch}"
  return repo.merge(
    branch, [theirs], method=method, message=message, author=author
  )
