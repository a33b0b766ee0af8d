"""Import: files of other libraries, and whole training runs, as versions."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from patchjax.interop import files, orbax

if TYPE_CHECKING:
  from collections.abc import Callable

  from patchjax.history import Repo

_KIND = "imported step"


def import_(
  repo: Repo,
  path: str | os.PathLike[str],
  *,
  message: str | None = None,
  branch: str = "main",
  author: str | None = None,
  progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
  """Commits what is in a file, a checkpoint, or a directory of checkpoints.

  Of a directory of steps, as Orbax's `CheckpointManager` or
  `training.Checkpointer` writes it, each step becomes a commit, in order and
  with the time at which it was saved; its number and metrics are in the
  recipe. Steps that the branch has are passed over: run again, it takes the
  new ones, and an import that was interrupted goes on.

  Args:
    repo: the repository.
    path: what `interop.read` takes, or a directory of steps.
    message: what it is; by default where it is from. Of steps, what precedes
      the number.
    branch: the branch to commit to; one that does not exist starts a history
      of its own.
    author: by whom; by default as for `Repo.commit`.
    progress: called with what is imported, the count so far and the total.

  Returns:
    The ids of the commits made, oldest first.

  Raises:
    FormatError: if it is malformed, truncated, or of another format.
    OSError: if it cannot be read.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> from patchjax.interop import write
    >>> with Repo.temporary() as repo, tempfile.TemporaryDirectory() as folder:
    ...   write(f"{folder}/a.npz", {"w": np.float32([1, 2])})
    ...   commits = import_(repo, f"{folder}/a.npz")
    ...   repo.show().message, repo.checkout()["w"].tolist()
    ('import a.npz', [1.0, 2.0])
  """
  path = pathlib.Path(path)
  found = orbax.steps(path) if _is_run(path) else []
  if not found:
    value = files.read(path)
    return [
      repo.commit(
        value,
        message=message or f"import {path.name}",
        branch=branch,
        author=author,
        parents=_parents(repo, branch),
      )
    ]
  seen = _seen(repo, branch)
  new = [step for step in found if (step.number, step.stamp) not in seen]
  made = []
  for count, step in enumerate(new):
    if progress is not None:
      progress(f"step {step.number}", count, len(new))
    made.append(
      repo.commit(
        files.read(step.path),
        message=" ".join(
          [*([f"{message}:"] if message else []), f"step {step.number}"]
        ),
        branch=branch,
        author=author,
        time=step.stamp / 1e9,
        parents=_parents(repo, branch),
        recipe={
          "kind": _KIND,
          "step": step.number,
          "stamp": step.stamp,
          "metrics": step.metrics,
          "source": path.name,
        },
      )
    )
  return made


def _is_run(path: pathlib.Path) -> bool:
  return path.is_dir() and not orbax.is_checkpoint(path)


def _parents(repo: Repo, branch: str) -> list[str]:
  return [f"heads/{branch}"] if branch in repo.branches() else []


def _seen(repo: Repo, branch: str) -> set[tuple[int, int]]:
  """Number and time of the steps that a branch has."""
  if branch not in repo.branches():
    return set()
  recipes = (commit.recipe or {} for commit in repo.log(f"heads/{branch}"))
  return {
    (recipe["step"], recipe["stamp"])
    for recipe in recipes
    if recipe.get("kind") == _KIND
  }
