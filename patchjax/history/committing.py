"""Recording a version: leaves, then objects, then the ref."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history import layout
from patchjax.history.objects import commit_bytes, id_of
from patchjax.history.refs import HEADS, check_name
from patchjax.trees.digest import Entry, tree_objects
from patchjax.trees.errors import ConflictError, RefNotFoundError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def parents_of(
  repo: Repo, branch: str, parents: Sequence[str] | None
) -> tuple[tuple[str, ...], str | None]:
  """Returns the parents of a new commit, and where the branch must be.

  Args:
    repo: the repository.
    branch: the branch that is to move.
    parents: refs; by default the tip of the branch.

  Raises:
    ConflictError: if the branch is not at the first of them.
    RefNotFoundError: if there is no such branch, but others.
  """
  tip = repo.refs.get(HEADS, branch)
  if parents is not None:
    ids = tuple(repo.resolve(parent) for parent in parents)
    if tip is not None and ids[:1] != (tip,):
      first = ids[0][:12] if ids else "nothing (a new root)"
      raise ConflictError(
        f"branch {branch!r} is at {tip[:12]}, the new commit is to follow "
        f"{first}; commit to a branch of its own "
        "(repo.branch(name, at=...)) and merge"
      )
    return ids, tip
  if tip is None and (known := repo.refs.names(HEADS)):
    raise RefNotFoundError(
      f"there is no branch {branch!r}; found: {', '.join(known)}; create "
      f"it with repo.branch({branch!r})"
    )
  return (() if tip is None else (tip,)), tip


def record(
  repo: Repo,
  named: Mapping[str, Any],
  old: Mapping[str, Entry],
  *,
  branch: str,
  expected: str | None,
  parents: tuple[str, ...],
  message: str,
  author: str | None,
  time: datetime.datetime | float | None,
  recipe: dict[str, Any] | None,
  patch: str | None = None,
) -> str:
  """Stores a value, records it as a commit, and moves the branch to it.

  Args:
    repo: the repository.
    named: `{text name: leaf}`; an `Entry` stands for a leaf that is stored.
    old: the entries of the first parent.
    branch: the branch to move.
    expected: the commit it must be at; None if it must not exist.
    parents: ids of the parents.
    message: what was done.
    author: by whom; by default as for `Repo.commit`.
    time: when; by default now.
    recipe: how the value was computed.
    patch: id of the patch file that was submitted.

  Returns:
    The commit id.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime.
  """
  check_name(branch)
  # The order matters: what a ref can reach is written before the ref.
  entries = repo.writer.write(named, old)
  tree, objects = tree_objects(entries)
  data = commit_bytes(
    tree=tree,
    parents=parents,
    message=message,
    author=author or layout.default_author(),
    time=layout.spell_time(time),
    recipe=recipe,
    patch=patch,
  )
  commit = id_of(data)
  repo.objects.write_all({**objects, commit: data})
  repo.refs.move(HEADS, branch, old=expected, new=commit)
  return commit
