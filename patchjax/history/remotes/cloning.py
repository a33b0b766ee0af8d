"""clone: a copy of another repository, that knows where it came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchjax.history.remotes.fetching import open_remote
from patchjax.history.remotes.reach import Progress
from patchjax.history.storage import config, layout, reflog
from patchjax.history.storage.refs import HEADS
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def clone(
  url: str | os.PathLike[str],
  path: str | os.PathLike[str],
  *,
  only: str | Sequence[str] | None = None,
  depth: int | None = None,
  verify: bool = False,
  progress: Progress | None = None,
) -> Repo:
  """Copies a repository, and returns the copy.

  The copy knows where it came from as the remote `origin`. It has one branch
  of its own: `main`, or else the first; the others are `origin/<branch>`. A
  clone that was interrupted is finished by cloning again into its folder.

  Args:
    url: a folder, `gs://bucket/path` or `s3://bucket/path`.
    path: the folder to create, or `gs://bucket/path`.
    only: see `fetch`: makes a partial clone.
    depth: see `fetch`: makes a shallow clone.
    verify: see `fetch`.
    progress: see `fetch`.

  Raises:
    NotARepositoryError: if there is no repository at the URL.
    RepositoryError: if the folder holds something else.

  Example:
    >>> import numpy as np, tempfile
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo, tempfile.TemporaryDirectory() as folder:
    ...   commit = repo.commit({"w": np.ones(2)}, message="start")
    ...   copy = Repo.clone(repo.path, folder)
    ...   copy.resolve("main") == copy.resolve("origin/main") == commit
    True
  """
  from patchjax.history.repo import Repo

  place = layout.place(url, remote=True)
  open_remote(config.Remote(None, place))  # nothing is created for nothing
  repo = Repo.init(path)
  known = config.remotes(repo).get(config.ORIGIN)
  if known is None and not (repo.branches() or repo.tags()):
    repo.add_remote(config.ORIGIN, place)
  elif known is None or known.url != place or repo.branches():
    raise RepositoryError(
      f"{repo.path} is a repository already; fetch into it (`patchjax fetch "
      f"{place}`), or choose a new folder"
    )
  fetched = repo.fetch(
    config.ORIGIN, only=only, depth=depth, verify=verify, progress=progress
  )
  for name in ("main", *fetched.branches):
    if name in fetched.branches:
      at = fetched.branches[name][1]
      why = f"clone: from {place}"
      reflog.move(repo, HEADS, name, old=None, new=at, why=why)
      break
  return repo
