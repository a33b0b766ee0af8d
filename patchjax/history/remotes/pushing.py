"""push: what this repository has, brought to another one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph
from patchjax.history.remotes import copying, fetching, gathering
from patchjax.history.remotes.reach import Progress, Reached, Walk, heads, roots
from patchjax.history.remotes.transfer import Counts
from patchjax.history.storage import config, layout, reflog
from patchjax.history.storage.objects import key_of
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS
from patchjax.trees.errors import (
  ConflictError,
  NotARepositoryError,
  RefNotFoundError,
  RepositoryError,
)

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.config import Remote


@dataclasses.dataclass(frozen=True)
class Pushed:
  """What a push did.

  Attributes:
    url: where to.
    branches: `{branch: (commit it was at, commit it is at)}`, there; the first
      is None for those that are new.
    tags: `{tag: commit}` of the tags that are new there.
    copied: what was copied.
  """

  url: str
  branches: Mapping[str, tuple[str | None, str]]
  tags: Mapping[str, str]
  copied: Counts

  def to_json(self) -> dict[str, Any]:
    """Returns the result as a JSON-able dict."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Update:
  """A ref that is to move there."""

  space: str
  name: str
  old: str | None
  new: str


def push(
  repo: Repo,
  remote: str | os.PathLike[str] | None = None,
  branches: Sequence[str] | str = ("main",),
  *,
  tags: bool = False,
  force: bool = False,
  verify: bool = False,
  progress: Progress | None = None,
) -> Pushed:
  """Copies branches, and all they lead to, to another repository.

  What it has already is not copied. Its branches move last, by
  compare-and-swap, and only forwards: what somebody else pushed is never lost.
  A push that was interrupted has changed nothing that can be seen; the next
  one goes on where it ended. Where there is nothing yet, a repository is
  created. Notes (verdicts, releases) go along with their commits.

  Args:
    repo: the repository.
    remote: a named remote, or a folder or URL; by default `origin`, or the
      only remote there is.
    branches: names of branches, or of tags.
    tags: whether to push all tags, too.
    force: whether a branch may move to a commit that does not follow the one
      it is at. Only from where it was when it was last fetched: what somebody
      pushed since is not lost. Tags never move.
    verify: computes the digest of each copied leaf there, at once.
    progress: see `fetch`.

  Raises:
    ConflictError: if a branch there has commits that are not here, or is
      moved meanwhile, or a tag names another commit there; names both sides.
    RefNotFoundError: if there is no such branch or tag here.
    RepositoryError: if this is a shallow or partial clone that lacks what the
      other side would need.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo, Repo.temporary() as backup:
    ...   commit = repo.commit({"w": np.ones(2)}, message="start")
    ...   pushed = repo.push(backup.path)
    ...   backup.resolve("main") == commit, pushed.copied.commits
    (True, 1)
  """
  place = config.find(repo, remote)
  progress = progress or (lambda what, done, total: None)
  names = [branches] if isinstance(branches, str) else list(branches)
  wanted = _wanted(repo, names, tags)
  target = _open_or_create(place)
  target.files.prove()  # before all the copying
  theirs = {space: heads(target, space) for space in (HEADS, TAGS)}
  repo.objects.forget()
  updates = [
    update
    for (space, name), new in wanted.items()
    if (update := _Update(space, name, theirs[space].get(name), new)).old != new
  ]
  for update in updates:
    _check(repo, target, place, update, force)
  found = _walk(repo, target, place, theirs, updates, progress)
  copied = copying.copy(repo, target, found, False, verify, progress)
  _notes(repo, target, list(wanted.values()))
  for update in updates:
    _move(target, place, update)
    if place.name is not None and update.space == HEADS:
      fetching.track(repo, place, update.name, update.new)
  moved = {
    name: (theirs[HEADS].get(name), new)
    for (space, name), new in wanted.items()
    if space == HEADS
  }
  new_tags = {u.name: u.new for u in updates if u.space == TAGS}
  return Pushed(place.url, moved, new_tags, copied)


def _wanted(
  repo: Repo, names: Sequence[str], tags: bool
) -> dict[tuple[str, str], str]:
  """Returns `{(space, name): commit}` of what is to be pushed."""
  found = {}
  for name in names:
    for space in (HEADS, TAGS):
      at = repo.refs.get(space, name)
      if at is not None:
        found[space, name] = at
        break
    else:
      raise RefNotFoundError(
        f"there is no branch or tag {name!r} to push; branches: "
        f"{', '.join(repo.refs.names(HEADS)) or 'none'}"
      )
  if tags:
    found |= {(TAGS, name): at for name, at in heads(repo, TAGS).items()}
  return found


def _open_or_create(remote: Remote) -> Repo:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.files import open_files

  try:
    return Repo(remote.url, remote=True)
  except NotARepositoryError:
    layout.create(open_files(remote.url))
    return Repo(remote.url, remote=True)


def _check(
  repo: Repo, target: Repo, remote: Remote, update: _Update, force: bool
) -> None:
  """Refuses what would lose somebody's work."""
  if update.old is None:
    return
  here = repo.refs.describe(update.new)
  there = target.refs.describe(update.old)
  if update.space == TAGS:
    raise ConflictError(
      f"tag {update.name!r} of {remote.label!r} is at {there}, yours is at "
      f"{here}: tags never move; push yours under another name"
    )
  if fetching.is_here(repo, update.old, roots(repo)) and graph.is_ancestor(
    update.old, update.new, repo.objects
  ):
    return
  if not force:
    raise ConflictError(
      f"branch {update.name!r} of {remote.label!r} is at {there}, which does "
      f"not lead to yours at {here}; nothing was pushed: `patchjax pull` first "
      "(which merges both), or push with force to drop what is there"
    )
  name = f"{remote.name}/{update.name}"
  seen = None if remote.name is None else repo.refs.get(REMOTES, name)
  if remote.name is not None and seen != update.old:
    last = "never fetched" if seen is None else repo.refs.describe(seen)
    raise ConflictError(
      f"branch {update.name!r} of {remote.label!r} moved since it was last "
      f"looked at: it is at {there}, expected {last}; nothing was pushed: "
      "fetch, look at what is new there, and force again if it may go"
    )


def _walk(
  repo: Repo,
  target: Repo,
  remote: Remote,
  theirs: Mapping[str, Mapping[str, str]],
  updates: Sequence[_Update],
  progress: Progress,
) -> Reached:
  """Returns what the updates reach beyond what the other side has."""
  tips = {at for refs in theirs.values() for at in refs.values()}
  mine = roots(repo)
  if target.objects.shallow:
    # Its refs lead less far there than they do here.
    whole = graph.ancestors(tips, target.objects)
  else:
    whole = {at for at in tips if fetching.is_here(repo, at, mine)}

  def known(name: str) -> bool:
    if target.objects.shallow:
      return name in whole
    return fetching.is_here(repo, name, whole)

  partial = any(r.only is not None for r in config.remotes(target).values())
  found = Walk(repo, target, progress=progress).run(
    {update.new for update in updates}, known=known, partial=partial
  )
  _check_cut(repo, target, remote, found, tips)
  return found


def _check_cut(
  repo: Repo, target: Repo, remote: Remote, found: Reached, tips: set[str]
) -> None:
  """Refuses to push a history whose beginning nobody there has."""
  if not found.cut:
    return
  parents = {p for name in found.cut for p in found.commits[name].parents}
  lacking = parents - graph.ancestors(tips, target.objects)
  if lacking:
    raise RepositoryError(
      f"the history was cut when it was cloned, and {remote.label!r} does not "
      f"have what lies behind: {', '.join(n[:12] for n in sorted(lacking))}; "
      "nothing was pushed: `patchjax fetch --complete` first"
    )


def _notes(repo: Repo, target: Repo, tips: Sequence[str]) -> None:
  def wanted(commit: str) -> bool:
    return repo.files.exists(key_of(commit)) and any(
      graph.is_ancestor(commit, tip, repo.objects) for tip in tips
    )

  gathering.gather(repo, target, wanted)


def _move(target: Repo, remote: Remote, update: _Update) -> None:
  try:
    reflog.move(
      target,
      update.space,
      update.name,
      old=update.old,
      new=update.new,
      why="push",
    )
  except ConflictError as error:
    raise ConflictError(
      f"{remote.label!r}: {error}; yours is at {update.new[:12]}: somebody "
      "else pushed at the same time. `patchjax pull`, then push again: what "
      "was copied is not copied again"
    ) from error
