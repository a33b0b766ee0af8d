"""fetch: what another repository has, brought here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Mapping,
  Sequence,
)
from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph
from patchjax.history.remotes import copying, gathering, partial
from patchjax.history.remotes.reach import Progress, Walk, heads, roots
from patchjax.history.remotes.transfer import Counts
from patchjax.history.storage import config, reflog, shallow
from patchjax.history.storage.objects import key_of
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS
from patchjax.trees.errors import (
  ConflictError,
  NotARepositoryError,
  RefNotFoundError,
  RepositoryError,
  SelectionError,
)

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.config import Remote


@dataclasses.dataclass(frozen=True)
class Fetched:
  """What a fetch brought.

  Attributes:
    url: from where.
    branches: `{branch: (commit it was at, commit it is at)}` of all branches
      looked at; the first is None for those that are new here.
    tags: `{tag: commit}` of the tags that are new here.
    clashes: `{tag: commit there}` of tags that name another commit here; tags
      never move, so they were left alone.
    copied: what was copied.
    lacking: names of leaves that are not here even after a complete fetch:
      of versions that the remote does not have (any more).
  """

  url: str
  branches: Mapping[str, tuple[str | None, str]]
  tags: Mapping[str, str]
  clashes: Mapping[str, str]
  copied: Counts
  lacking: tuple[str, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """Returns the result as a JSON-able dict."""
    return dataclasses.asdict(self)


def fetch(
  repo: Repo,
  remote: str | os.PathLike[str] | None = None,
  branches: Sequence[str] | None = None,
  *,
  only: str | Sequence[str] | None = None,
  depth: int | None = None,
  complete: bool = False,
  prune: bool = False,
  verify: bool = False,
  progress: Progress | None = None,
) -> Fetched:
  """Copies what another repository has and this one lacks; moves no branch.

  The branches of a named remote are to be found as `<remote>/<branch>`; tags
  keep their names. A fetch that was interrupted has changed nothing that can
  be seen; the next one goes on where it ended.

  Args:
    repo: the repository.
    remote: a named remote, or a folder or URL; by default `origin`, or the
      only remote there is.
    branches: branches to fetch; by default all, and all tags.
    only: regexes; fetches only leaves one of them matches as a whole, of every
      version that is fetched or was before. Later fetches from this remote
      keep to it. In a clone that is partial already it adds to what is there.
    depth: fetches only commits that are at most so many back from some
      branch; where the history ends is written down, and `log` says so.
    complete: fetches all that `only` and `depth` left out so far.
    prune: forgets branches that the remote does not have any more.
    verify: computes the digest of each fetched leaf at once, rather than when
      it is checked out.
    progress: called with `objects` or `bytes`, how many are done, and how many
      there are (0 where that is not known).

  Raises:
    NotARepositoryError: if there is no repository at the remote.
    RefNotFoundError: if the remote does not have a branch.
    IntegrityError: if what it has is damaged; nothing was moved.
    SelectionError: if `only` matches no leaf.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as theirs, Repo.temporary() as ours:
    ...   commit = theirs.commit({"w": np.ones(2)}, message="start")
    ...   remote = ours.add_remote("origin", theirs.path)
    ...   fetched = ours.fetch()
    ...   ours.resolve("origin/main") == commit
    True
  """
  place = config.find(repo, remote)
  source = open_remote(place)
  patterns, widened = _patterns(place, only, complete)
  progress = progress or (lambda what, done, total: None)
  theirs = heads(source, HEADS)
  chosen = theirs if branches is None else _chosen(theirs, branches, place)
  tags = heads(source, TAGS) if branches is None and depth is None else {}
  objects = repo.objects
  objects.forget()  # others may have fetched, too
  known = roots(repo)
  walk = Walk(source, repo, matches=_matcher(patterns), progress=progress)
  cut_before = objects.shallow
  found = walk.run(
    {*chosen.values(), *tags.values()},
    known=lambda name: is_here(repo, name, known),
    depth=None if complete else depth,
    through=complete or widened or depth is not None,
    partial=bool(partial.sources(repo.files)),
  )
  if patterns is not None:
    _check_patterns(source, chosen, patterns)
  copied = copying.copy(
    source, repo, found, patterns is not None, verify, progress
  )
  if place.name is not None and patterns not in (None, place.only):
    # Before refs lead to versions that lack leaves.
    _set_patterns(repo, place.name, patterns)
  joined = {n for n in cut_before if n in found.commits and n not in found.cut}
  shallow.update(repo.files, cut=found.cut, joined=joined)
  objects.forget()
  gathering.gather(
    source, repo, lambda commit: repo.files.exists(key_of(commit))
  )
  if depth is not None and branches is None:
    # Of tags, those whose commits came along.
    there = heads(source, TAGS).items()
    tags = {n: at for n, at in there if at in found.commits}
  new_tags, clashes = _keep_tags(repo, tags)
  moved = {name: track(repo, place, name, at) for name, at in chosen.items()}
  if prune and place.name is not None:
    _prune(repo, place.name, theirs)
  lacking: list[str] = []
  if patterns is None and place.name is not None and place.only is not None:
    # Commits that the remote does not have any more may still lack some.
    lacking = partial.lacking(repo)
    if not lacking:
      _set_patterns(repo, place.name, None)
  return Fetched(place.url, moved, new_tags, clashes, copied, tuple(lacking))


def open_remote(remote: Remote) -> Repo:
  """Opens the repository that a remote names, to copy from or to.

  Args:
    remote: the remote.

  Raises:
    NotARepositoryError: if there is none.
  """
  from patchjax.history.repo import Repo

  try:
    return Repo(remote.url, remote=True)
  except NotARepositoryError as error:
    raise NotARepositoryError(
      f"remote {remote.label!r}: there is no patchjax repository at "
      f"{remote.url}; the first push creates one"
    ) from error


def _chosen(
  theirs: Mapping[str, str], branches: Iterable[str], remote: Remote
) -> dict[str, str]:
  found = {}
  for name in branches:
    if name not in theirs:
      raise RefNotFoundError(
        f"remote {remote.label!r} has no branch {name!r}; found: "
        f"{', '.join(theirs) or 'none'}"
      )
    found[name] = theirs[name]
  return found


def _patterns(
  remote: Remote, only: str | Sequence[str] | None, complete: bool
) -> tuple[tuple[str, ...] | None, bool]:
  """Returns which leaves to fetch, and whether those are more than before."""
  if complete:
    if only is not None:
      raise RepositoryError("fetch: give `only` or `complete`, not both")
    return None, remote.only is not None
  if only is None:
    return remote.only, False
  new = (only,) if isinstance(only, str) else tuple(only)
  for pattern in new:
    try:
      re.compile(pattern)
    except re.error as error:
      raise SelectionError(f"{pattern!r} is no regex: {error}") from error
  before = remote.only or ()
  return tuple(dict.fromkeys([*before, *new])), not set(new) <= set(before)


def _matcher(
  patterns: Sequence[str] | None,
) -> Callable[[str], bool] | None:
  if patterns is None:
    return None
  compiled = [re.compile(pattern) for pattern in patterns]
  return lambda name: any(pattern.fullmatch(name) for pattern in compiled)


def _check_patterns(
  source: Repo, tips: Mapping[str, str], patterns: Sequence[str]
) -> None:
  """Refuses patterns of which none matches a leaf of any branch."""
  matches = _matcher(patterns)
  assert matches is not None
  names: dict[str, None] = {}
  for tip in dict.fromkeys(tips.values()):
    names |= dict.fromkeys(source.objects.tree(source.objects.commit(tip).tree))
  if names and not any(map(matches, names)):
    shown = ", ".join(list(names)[:5])
    raise SelectionError(
      f"only={list(patterns)} matches none of the {len(names)} leaves; a regex "
      f"has to match a whole name, such as: {shown}"
    )


def _set_patterns(
  repo: Repo, name: str, patterns: tuple[str, ...] | None
) -> None:
  def change(known: dict[str, Remote]) -> None:
    if name in known:
      known[name] = dataclasses.replace(known[name], only=patterns)

  config.update(repo, change)


def is_here(repo: Repo, name: str, tips: Collection[str]) -> bool:
  """Returns whether a commit is here with all that it needs.

  Args:
    repo: the repository.
    name: id of a commit, of which an interrupted copy may have left a part.
    tips: ids of commits that are whole, such as those that refs hold.
  """
  if name in tips:
    return True
  return repo.files.exists(key_of(name)) and any(
    graph.is_ancestor(name, tip, repo.objects) for tip in tips
  )


def _keep_tags(
  repo: Repo, tags: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
  new, clashes = {}, {}
  for name, at in tags.items():
    found = repo.refs.get(TAGS, name)
    if found is None:
      try:
        reflog.move(repo, TAGS, name, old=None, new=at, why="fetch")
        new[name] = at
        continue
      except ConflictError:
        found = repo.refs.get(TAGS, name)
    if found != at:
      clashes[name] = at
  return new, clashes


def track(
  repo: Repo, remote: Remote, branch: str, new: str
) -> tuple[str | None, str]:
  """Notes where a branch of a remote is; returns where it was, and is.

  Args:
    repo: the repository.
    remote: the remote; without a name there is nothing to note.
    branch: the branch.
    new: the commit it is at.
  """
  if remote.name is None:
    return None, new
  name = f"{remote.name}/{branch}"
  for _ in range(20):
    old = repo.refs.get(REMOTES, name)
    if old == new:
      return old, new
    try:
      repo.refs.move(REMOTES, name, old=old, new=new)
      return old, new
    except ConflictError:
      continue  # another fetch was faster; what we have seen is as good
  raise ConflictError(f"{name}: other processes keep moving it; try again")


def _prune(repo: Repo, remote: str, theirs: Mapping[str, str]) -> None:
  for name, at in repo.refs.all(REMOTES).items():
    owner, _, branch = name.partition("/")
    if owner == remote and branch not in theirs:
      repo.refs.move(REMOTES, name, old=at, new=None)
