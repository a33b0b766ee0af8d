"""Recording a version: leaves, then objects, then the ref."""

from __future__ import annotations

import dataclasses
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
  from patchjax.history.arrays.writing import Rest
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """All of a commit but its value.

  Attributes:
    message: what was done.
    parents: ids of the parents.
    branch: the branch to move; None leaves it to the caller to name the
      commit by a ref.
    expected: the commit that the branch must be at; None if it must not exist.
    author: by whom; by default as for `Repo.commit`.
    time: when; by default now.
    recipe: how the value was computed.
    patch: id of the patch file that was submitted.
    verb: what the reflog says was done.
    retry: how often the changes may be put on top of somebody else's who was
      faster; True for as often as it takes, since each time somebody's commit
      did land.
  """

  message: str
  parents: tuple[str, ...]
  branch: str | None
  expected: str | None
  author: str | None = None
  time: datetime.datetime | float | None = None
  recipe: dict[str, Any] | None = None
  patch: str | None = None
  verb: str = "commit"
  retry: bool | int = False


def drafted(
  repo: Repo,
  value: Any,
  *,
  branch: str | None,
  parents: Sequence[str] | None,
  on: str | None,
  retry: bool | int,
  any_base: bool,
  **facts: Any,
) -> tuple[dict[str, Any], dict[str, Entry], Draft]:
  """Returns what `Repo.commit` was asked to record, as `record` takes it.

  Args:
    repo: the repository.
    value: see `Repo.commit`, as for all arguments that are not listed.
    branch: see there.
    parents: see there.
    on: see there.
    retry: see there.
    any_base: see there.
    **facts: what else a `Draft` says.
  """
  from patchjax.history.arrays import state
  from patchjax.history.commits import proposals
  from patchjax.trees.names import named_leaves

  if on is not None and parents is not None:
    raise RepositoryError("commit: give `on` or `parents`, not both")
  first = [on] if on else parents
  ids, expected = processes.first(
    lambda: parents_of(repo, branch, first, retry=retry)
  )
  ids = tuple(ids)
  old = processes.together(lambda: repo.tree(ids[0]) if ids else {})
  patch = None
  if proposals.is_patch(value):
    named, patch = processes.together(
      lambda: proposals.materialise(repo, value, ids, old, any_base=any_base)
    )
  else:
    named = processes.together(lambda: state.arrays(named_leaves(value)))
  draft = Draft(
    parents=ids,
    branch=branch,
    expected=expected,
    patch=patch,
    retry=retry,
    **facts,
  )
  return named, old, draft


def record(
  repo: Repo, named: Mapping[str, Any], old: Mapping[str, Entry], draft: Draft
) -> str:
  """Stores a value, records it as a commit, and moves the branch to it.

  Args:
    repo: the repository.
    named: `{text name: leaf}`; an `Entry` stands for a leaf that is stored.
    old: the entries of the first parent.
    draft: the commit.

  Returns:
    The commit id.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime.
    RepositoryError: if the message is empty.
  """
  entries = store(repo, named, old, draft)
  # Of several processes the first one moves the branch, and tells the others.
  return processes.first(lambda: land(repo, entries, old, draft))


def store(
  repo: Repo,
  named: Mapping[str, Any],
  old: Mapping[str, Entry],
  draft: Draft,
  later: Rest | None = None,
) -> dict[str, Entry]:
  """Stores a value that is to be recorded; returns the entries of its leaves.

  Args:
    repo: the repository.
    named: see `record`, as for all arguments that are not listed.
    old: see there.
    draft: see there.
    later: takes what remains to be done; see `LeafWriter.write`.
  """
  if draft.branch is not None:
    check_name(draft.branch)
  check_message(draft.message)
  processes.together(
    lambda: [repo.objects.freshen(parent) for parent in draft.parents]
  )
  # The order matters: what a ref can reach is written before the ref.
  return repo.writer.write(named, old, draft.patch, later)


def land(
  repo: Repo,
  entries: Mapping[str, Entry],
  old: Mapping[str, Entry],
  draft: Draft,
) -> str:
  """Records a value whose leaves are stored, and moves the branch to it.

  Exchanges nothing with other processes: one of them does it.

  Args:
    repo: the repository.
    entries: the leaves of the value.
    old: the leaves of the first parent.
    draft: the commit. Without a branch it is written, and no ref moves.

  Returns:
    The commit id.

  Raises:
    ConflictError: if somebody else moved the branch in the meantime and that
      is not to be retried, or both changed the same leaves; names them.
  """
  branch, now = draft.branch, datetime.datetime.now(datetime.UTC)
  draft = dataclasses.replace(
    draft,
    author=draft.author or layout.default_author(),
    time=now if draft.time is None else draft.time,
  )
  title = draft.message.partition("\n")[0]
  initial = "" if draft.parents else " (initial)"
  tries = float("inf") if draft.retry is True else int(draft.retry)
  mine = dict(entries)
  while True:
    commit, objects = _spelled(repo, mine, draft)
    if branch is None:
      repo.objects.write_all(objects)
      return commit
    try:
      reflog.move(
        repo,
        HEADS,
        branch,
        old=draft.expected,
        new=commit,
        why=f"{draft.verb}{initial}: {title}",
        who=draft.author,
        objects=objects,
      )
      return commit
    except ConflictError:
      tip = repo.refs.get(HEADS, branch)
      if tries <= 0 or tip is None or not draft.parents:
        raise
    tries -= 1
    first, *others = draft.parents
    mine = combined(repo, entries, old, branch, first, tip)
    draft = dataclasses.replace(draft, parents=(tip, *others), expected=tip)


def _spelled(
  repo: Repo, entries: Mapping[str, Entry], draft: Draft
) -> tuple[str, dict[str, bytes]]:
  """The id of a commit, and the objects that it needs."""
  tree, objects = tree_objects(entries)
  time = layout.spell_time(draft.time)
  data = commit_bytes(
    tree=tree,
    parents=draft.parents,
    message=draft.message,
    author=draft.author or layout.default_author(),
    time=time,
    recipe=draft.recipe,
    patch=draft.patch,
    order=_order(repo, draft.parents, time),
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
