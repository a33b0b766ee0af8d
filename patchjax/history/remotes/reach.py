"""What refs reach that another repository lacks: commits, trees, leaves.

Walks two repositories at once. Whatever the other side's own refs reach is
there, so the walk stops at it; everything else is asked for level by level,
many objects in one go, from the nearer side first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from patchjax.history.storage.objects import (
  Commit,
  id_of,
  is_id,
  key_of,
  parse_commit,
  parse_folder,
)
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS
from patchjax.trees.errors import IntegrityError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

_BATCH = 512  # objects asked for at a time

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Reached:
  """What a walk met.

  Attributes:
    commits: every commit beyond what the other side has.
    cut: those of them whose parents were not followed.
    objects: `{id: bytes}` of commits and trees.
    files: ids of submitted patch files.
    leaves: `{digest: entry}` of the leaves of these commits.
    names: `{digest: a name}`, for messages.
  """

  commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
  cut: set[str] = dataclasses.field(default_factory=set)
  objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
  files: set[str] = dataclasses.field(default_factory=set)
  leaves: dict[str, Entry] = dataclasses.field(default_factory=dict)
  names: dict[str, str] = dataclasses.field(default_factory=dict)


class Walk:
  """A walk from one repository's refs to what another has.

  Attributes:
    source: where things are.
    target: where they shall be.
  """

  def __init__(
    self,
    source: Repo,
    target: Repo,
    *,
    matches: Callable[[str], bool] | None = None,
    progress: Progress,
  ):
    """Prepares a walk.

    Args:
      source: where things are.
      target: where they shall be.
      matches: says of a name whether its leaf is wanted; None wants all.
      progress: called with `objects`, the count so far, and 0.
    """
    self.source = source
    self.target = target
    self._matches = matches
    self._progress = progress
    # A disk answers sooner, and may hold what an interrupted copy left.
    self._sides = sorted((target, source), key=lambda r: not r.files.local)
    self._near = self._sides[0]

  def run(
    self,
    tips: Iterable[str],
    *,
    known: Callable[[str], bool],
    depth: int | None = None,
    through: bool = False,
    partial: bool = False,
  ) -> Reached:
    """Returns what commits reach beyond what is known.

    Args:
      tips: ids of commits of the source.
      known: says of the id of a commit whether the target has it, with all
        that it needs; such a commit must be readable on the nearer side.
      depth: how many commits deep to go; None for all.
      through: whether to walk on through what is known, for what is lacking.
      partial: whether the target may lack leaves of what it knows.
    """
    found = Reached()
    edge = self._commits(found, tips, known, depth, through)
    trees = {commit.tree for commit in found.commits.values()}
    if self._matches is None:
      known_trees = set() if through or partial else self._subtrees(edge)
      self._trees(found, trees, known_trees)
    else:
      self._named(found, trees)
    return found

  def _commits(
    self,
    found: Reached,
    tips: Iterable[str],
    known: Callable[[str], bool],
    depth: int | None,
    through: bool,
  ) -> set[str]:
    """Walks commits; returns the known ones it stopped at."""
    stopped: set[str] = set()
    level = dict.fromkeys(tips)
    for _ in range(depth) if depth is not None else itertools.count():
      new = {}
      for name in level:
        if name in found.commits or name in stopped:
          continue
        if not through and known(name):
          stopped.add(name)
        else:
          new[name] = None
      if not new:
        break
      level = {}
      for name, data in self._read(new):
        found.objects[name] = data
        commit = parse_commit(name, data)
        found.commits[name] = commit
        if commit.patch is not None:
          found.files.add(commit.patch)
        if name not in self.source.objects.shallow:
          level |= dict.fromkeys(commit.parents)
    self._cut(found, stopped, known)
    return stopped

  def _cut(
    self,
    found: Reached,
    stopped: set[str],
    known: Callable[[str], bool],
  ) -> None:
    """Notes the commits whose parents do not come along."""
    for name, commit in found.commits.items():
      for parent in commit.parents:
        if parent in found.commits or parent in stopped:
          continue
        if known(parent):
          stopped.add(parent)
        else:
          found.cut.add(name)

  def _subtrees(self, commits: Iterable[str]) -> set[str]:
    """Returns the ids of all trees of commits that are known."""
    objects = self._near.objects
    seen: set[str] = set()
    stack = [objects.commit(name).tree for name in commits]
    while stack:
      name = stack.pop()
      if name not in seen:
        seen.add(name)
        folder = objects.folder(name).values()
        stack += [item for item in folder if isinstance(item, str)]
    return seen

  def _trees(
    self, found: Reached, level: Iterable[str], seen: set[str]
  ) -> None:
    from patchjax.trees.names import join

    level = set(level) - seen
    while level:
      seen |= level
      after: set[str] = set()
      for name, data in self._read(level):
        found.objects[name] = data
        for part, item in parse_folder(name, data).items():
          if isinstance(item, str):
            after.add(item)
          elif item.size:
            found.leaves[item.digest] = item
            found.names.setdefault(item.digest, join((part,)))
      level = after - seen

  def _named(self, found: Reached, trees: Iterable[str]) -> None:
    """Walks trees by path, since what is wanted depends on whole names."""
    from patchjax.trees.names import join

    matches = self._matches
    assert matches is not None
    level: set[tuple[str, tuple[str, ...]]] = {(name, ()) for name in trees}
    seen = set(level)
    while level:
      ids = {name for name, _ in level}
      found.objects |= dict(self._read(ids - found.objects.keys()))
      folders = {n: parse_folder(n, found.objects[n]) for n in ids}
      after = set()
      for name, path in level:
        for part, item in folders[name].items():
          here = (*path, part)
          if isinstance(item, str):
            after.add((item, here))
          elif item.size and matches(join(here)):
            found.leaves[item.digest] = item
            found.names.setdefault(item.digest, join(here))
      level = after - seen
      seen |= level

  def _read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yields objects, verified, from whichever side has them intact."""
    names = list(names)
    for start in range(0, len(names), _BATCH):
      batch = names[start : start + _BATCH]
      missing = batch
      for side in self._sides:
        values = side.files.read_all(map(key_of, missing))
        got = [(name, values.get(key_of(name))) for name in missing]
        good = [(n, d) for n, d in got if d is not None and id_of(d) == n]
        yield from good
        missing = [n for n in missing if n not in dict(good)]
        if not missing:
          break
      if missing:
        # The source says what is wrong with it.
        self.source.objects.read(missing[0])
        raise IntegrityError(f"object {missing[0]} cannot be read")
      self._progress("objects", start + len(batch), 0)


def heads(repo: Repo, space: str) -> dict[str, str]:
  """Returns `{name: id}` of a space of refs, asked for in one go.

  Args:
    repo: a repository, near or far.
    space: `HEADS`, `TAGS`, or `REMOTES`.

  Raises:
    IntegrityError: if a ref is damaged.
  """
  data = repo.files.read_all(repo.files.walk(space))
  found = {}
  for key, value in data.items():
    name, id_ = key[len(space) + 1 :], value.decode("ascii", "replace").strip()
    # What is no id is damaged: reading it alone says how to mend it.
    found[name] = id_ if is_id(id_) else repo.refs.must(space, name)
  return found


def roots(repo: Repo) -> set[str]:
  """Returns the commits that the refs of a repository hold.

  Args:
    repo: the repository.
  """
  spaces = (HEADS, TAGS, REMOTES)
  return {at for space in spaces for at in heads(repo, space).values()}
