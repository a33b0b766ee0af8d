"""Recording a version: leaves, then objects, then the ref."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history.arrays import processes
from patchjax.history.commits import graph
from patchjax.history.storage import layout, reflog
from patchjax.history.storage.objects import commit_bytes, id_of
from patchjax.history.storage.refs import HEADS, check_name
from patchjax.trees.digest import Entry, tree_objects
from patchjax.trees.errors import (
  ConflictError,
  RefNotFoundError,
  RepositoryError,
  StructureError,
)

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def parents_of(
  repo: Repo,
  branch: str | None,
  parents: Sequence[str] | None,
  *,
  retry: bool | int = False,
) -> tuple[tuple[str, ...], str | None]:
  """Returns the parents of a new commit, and where the branch must be.

  Args:
    repo: the repository.
    branch: the branch that is to move; None if no ref is to name the commit.
    parents: refs; by default the tip of the branch.
    retry: whether the branch may have moved on from the first of them.

  Raises:
    ConflictError: if the branch is not at the first of them.
    RefNotFoundError: if there is no such branch, but others.
  """
  if branch is None:
    return tuple(repo.resolve(parent) for parent in parents or ()), None
  tip = repo.refs.get(HEADS, branch)
  if parents is not None:
    ids = tuple(repo.resolve(parent) for parent in parents)
    if tip is not None and ids[:1] != (tip,):
      if retry and ids:
        return ids, ids[0]
      first = ids[0][:12] if ids else "nothing (a new root)"
      raise ConflictError(
        f"branch {branch!r} is at {repo.refs.describe(tip)}, the new commit "
        f"is to follow {first}; commit to a branch of its own "
        "(repo.branch(name, at=...)) and merge, or with retry=True if the "
        "changes do not touch the same leaves"
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
  branch: str | None,
  expected: str | None,
  parents: tuple[str, ...],
  message: str,
  author: str | None,
  time: datetime.datetime | float | None,
  recipe: dict[str, Any] | None,
  patch: str | None = None,
  verb: str = "commit",
  retry: bool | int = False,
) -> str:
  """Stores a value, records it as a commit, and moves the branch to it.

  Args:
    repo: the repository.
    named: `{text name: leaf}`; an `Entry` stands for a leaf that is stored.
    old: the entries of the first parent.
    branch: the branch to move; None leaves it to the caller to name the
      commit by a ref.
    expected: the commit it must be at; None if it must not exist.
    parents: ids of the parents.
    message: what was done.
    author: by whom; by default as for `Repo.commit`.
    time: when; by default now.
    recipe: how the value was computed.
    patch: id of the patch file that was submitted.
    verb: what the reflog says was done.
    retry: see `land`.

  Returns:
    The commit id.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime.
    RepositoryError: if the message is empty.
  """
  if branch is not None:
    check_name(branch)
  check_message(message)
  processes.together(
    lambda: [repo.objects.freshen(parent) for parent in parents]
  )
  # The order matters: what a ref can reach is written before the ref.
  entries = repo.writer.write(named, old, patch)
  # Of several processes the first one moves the branch, and tells the others.
  return processes.first(
    lambda: land(
      repo,
      entries,
      old,
      branch=branch,
      expected=expected,
      parents=parents,
      message=message,
      author=author,
      time=time,
      recipe=recipe,
      patch=patch,
      verb=verb,
      retry=retry,
    )
  )


def land(
  repo: Repo,
  entries: Mapping[str, Entry],
  old: Mapping[str, Entry],
  *,
  branch: str | None,
  expected: str | None,
  parents: tuple[str, ...],
  message: str,
  author: str | None,
  time: datetime.datetime | float | None,
  recipe: dict[str, Any] | None,
  patch: str | None = None,
  verb: str = "commit",
  retry: bool | int = False,
) -> str:
  """Records a value whose leaves are stored, and moves the branch to it.

  Args:
    repo: the repository.
    entries: the leaves of the value.
    old: the leaves of the first parent.
    branch: see `record`, as for all arguments that are not listed. Without
      one the commit is written, and no ref moves.
    expected: see there.
    parents: see there.
    message: see there.
    author: see there.
    time: see there.
    recipe: see there.
    patch: see there.
    verb: see there.
    retry: how often the changes may be put on top of somebody else's who was
      faster; True for as often as it takes, since each time somebody's
      commit did land.

  Returns:
    The commit id.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime and that
      is not to be retried, or both changed the same leaves; names them.
  """
  author = author or layout.default_author()
  when = layout.spell_time(time)
  title = message.partition("\n")[0]
  tries = float("inf") if retry is True else int(retry)
  mine = dict(entries)
  while True:
    commit, objects = _spelled(
      repo,
      mine,
      parents=parents,
      message=message,
      author=author,
      time=when,
      recipe=recipe,
      patch=patch,
    )
    if branch is None:
      repo.objects.write_all(objects)
      return commit
    try:
      reflog.move(
        repo,
        HEADS,
        branch,
        old=expected,
        new=commit,
        why=f"{verb}: {title}" if parents else f"{verb} (initial): {title}",
        who=author,
        objects=objects,
      )
      return commit
    except ConflictError:
      tip = repo.refs.get(HEADS, branch)
      if tries <= 0 or tip is None or not parents:
        raise
    tries -= 1
    mine = combined(repo, entries, old, branch, parents[0], tip)
    parents, expected = (tip, *parents[1:]), tip


def _spelled(
  repo: Repo,
  entries: Mapping[str, Entry],
  *,
  parents: tuple[str, ...],
  message: str,
  author: str,
  time: str,
  recipe: dict[str, Any] | None,
  patch: str | None,
) -> tuple[str, dict[str, bytes]]:
  """The id of a commit, and the objects that it needs."""
  tree, objects = tree_objects(entries)
  data = commit_bytes(
    tree=tree,
    parents=parents,
    message=message,
    author=author,
    time=time,
    recipe=recipe,
    patch=patch,
    order=_order(repo, parents, time),
  )
  return id_of(data), {**objects, id_of(data): data}


def combined(
  repo: Repo,
  mine: Mapping[str, Entry],
  old: Mapping[str, Entry],
  branch: str,
  since: str,
  tip: str,
) -> dict[str, Entry]:
  """Returns what two writers made of one version, if they do not collide.

  Args:
    repo: the repository.
    mine: the leaves of the one.
    old: the leaves both started from.
    branch: where the other's work is.
    since: a commit it follows.
    tip: its last commit.

  Raises:
    ConflictError: if the branch does not follow `since` any more, or both
      changed the same leaves, otherwise; names them, and by whom.
  """
  where = f"branch {branch!r} moved to {repo.refs.describe(tip)}"
  if not graph.is_ancestor(since, tip, repo.objects):
    raise ConflictError(
      f"{where}, which does not follow {since[:12]} any more; nothing was "
      "lost: commit to a branch of its own, and merge"
    )
  theirs = repo.objects.tree(repo.objects.commit(tip).tree)
  result, both = dict(theirs), []
  for name in {**old, **mine}:
    change = mine.get(name)
    if change in (old.get(name), theirs.get(name)):
      continue
    if theirs.get(name) != old.get(name):
      both.append(name)
    elif change is None:
      del result[name]
    else:
      result[name] = change
  if not both:
    try:
      tree_objects(result)
    except StructureError as error:
      raise ConflictError(f"{where}; together: {error}") from error
    return result
  raise ConflictError(
    f"{where}; both it and this commit changed {len(both)} leaf/leaves since "
    f"{since[:12]}: {', '.join(sorted(both))}; nothing was lost: commit to a "
    "branch of its own, and merge"
  )


def check_message(message: str) -> None:
  """Refuses messages that say nothing, as git does.

  Args:
    message: of a commit.

  Raises:
    RepositoryError: if it is empty.
  """
  if not message.strip():
    raise RepositoryError(
      "the message is empty; say what was done, and why (message=, -m)"
    )


def _order(repo: Repo, parents: Sequence[str], when: str) -> str | None:
  """What puts a commit after its parents, if its own time does not."""
  latest = max((repo.objects.commit(p).position for p in parents), default="")
  if when > latest:
    return None
  after = datetime.datetime.fromisoformat(latest)
  return layout.spell_time(after + datetime.timedelta(microseconds=1))
