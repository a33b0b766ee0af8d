"""The graph of commits: revisions, ancestry, ranges and merge bases.

Works on commit objects alone; imports no array library. The position of a
commit (`Commit.position`) sorts after those of all commits before it, so every
walk here meets children before parents and stops as soon as it knows the
answer: what lies further back is not read.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from patchjax.history.storage import reflog
from patchjax.history.storage.objects import Commit, Objects, is_id
from patchjax.history.storage.refs import HEADS, REMOTES, TAGS, Refs
from patchjax.trees.errors import IntegrityError, RefNotFoundError

_STEP = re.compile(r"([~^])(\d*)")
_REVISION = re.compile(r"(?P<start>[^~^]+)(?P<steps>([~^]\d*)*)")
_BEFORE = re.compile(r"(?P<ref>.*)@\{(?P<number>\d+)\}")
_SHORTEST_PREFIX = 4


def resolve(text: str, refs: Refs, objects: Objects) -> str:
  """Returns the commit id that a text names.

  Args:
    text: a branch, tag, commit id or unique prefix of one (at least 4 digits),
      or `heads/<branch>`, `tags/<tag>`, or `<branch>@{n}`, what the branch
      held before its last n moves; followed by any number of `~n` (n first
      parents back) and `^n` (the n-th parent).
    refs: refs of the repository.
    objects: objects of the repository.

  Raises:
    RefNotFoundError: if it names nothing, or several commits.
  """
  match = _REVISION.fullmatch(text)
  if match is None:
    raise RefNotFoundError(
      f"{text!r} is no revision: expected a branch, tag or commit id, "
      "optionally followed by ~n or ^n"
    )
  found = _start(match["start"], refs, objects)
  for kind, digits in _STEP.findall(match["steps"]):
    number = int(digits) if digits else 1
    if kind == "~":
      for _ in range(number):
        found = _parent(text, found, 1, objects)
    elif number:
      found = _parent(text, found, number, objects)
  return found


def _start(text: str, refs: Refs, objects: Objects) -> str:
  if match := _BEFORE.fullmatch(text):
    name = match["ref"].removeprefix("refs/").removeprefix("heads/")
    return reflog.before(refs, name or "main", int(match["number"]))
  for space in (HEADS, TAGS, REMOTES):
    short = f"{space.removeprefix('refs/')}/"
    for prefix in ("", short, f"refs/{short}"):
      if text.startswith(prefix):
        found = refs.get(space, text[len(prefix) :])
        if found is not None:
          return found
  if set(text) <= set("0123456789abcdef") and len(text) >= _SHORTEST_PREFIX:
    found = [text] if is_id(text) else objects.with_prefix(text)
    commits = [name for name in found if _is_commit(name, objects)]
    if len(commits) == 1:
      return commits[0]
    if commits:
      raise RefNotFoundError(
        f"{text!r} is ambiguous: found the commits "
        + ", ".join(name[: len(text) + 6] for name in commits)
        + "; give more digits"
      )
  branches = ", ".join(refs.names(HEADS)) or "none"
  tags = ", ".join(refs.names(TAGS)) or "none"
  raise RefNotFoundError(
    f"there is no branch, tag or commit {text!r}; "
    f"branches: {branches}; tags: {tags}"
  )


def _is_commit(name: str, objects: Objects) -> bool:
  try:
    objects.commit(name)
  except IntegrityError:
    return False
  return True


def _parent(text: str, name: str, number: int, objects: Objects) -> str:
  parents = objects.parents(name)
  if len(parents) < number:
    raise RefNotFoundError(
      f"{text!r} goes too far: commit {name[:12]} has {len(parents)} "
      f"parent(s), asked for number {number}"
    )
  return parents[number - 1]


class Waiting:
  """Commits to be visited, children before parents, else the latest first."""

  def __init__(self, objects: Objects, names: Iterable[str] = ()):
    self._objects = objects
    self._heap: list[tuple[_Late, str]] = []
    self._seen: set[str] = set()
    for name in names:
      self.add(name)

  def add(self, name: str) -> None:
    """Adds a commit, unless it was added before.

    Args:
      name: its id.
    """
    if name not in self._seen:
      self._seen.add(name)
      position = self._objects.commit(name).position
      heapq.heappush(self._heap, (_Late(position), name))

  def pop(self) -> Commit:
    """Takes the commit that comes before all others."""
    return self._objects.commit(heapq.heappop(self._heap)[1])

  def __iter__(self) -> Iterator[str]:
    return (name for _, name in self._heap)

  def __bool__(self) -> bool:
    return bool(self._heap)


class _Late(str):
  """A position; the later one comes first."""

  __slots__ = ()

  def __lt__(self, other: str) -> bool:
    return str.__gt__(self, other)


def walk(
  tips: Iterable[str],
  objects: Objects,
  *,
  without: Iterable[str] = (),
  follow: Callable[[Commit], tuple[bool, Sequence[str]]] | None = None,
) -> Iterator[Commit]:
  """Yields commits and all before them: children first, else latest first.

  Reads no further back than it yields (but for what is left out).

  Args:
    tips: commit ids.
    objects: objects of the repository.
    without: ids of commits that are left out with all before them.
    follow: says of a commit whether to yield it, and which parents to go on
      with; by default every commit, and all.
  """
  hidden = set(without)
  waiting = Waiting(objects, [*tips, *hidden])
  shown = not hidden.issuperset(waiting)  # whether some may be yielded
  while waiting and shown:
    commit = waiting.pop()
    if commit.id in hidden:
      parents = objects.parents(commit.id)
      hidden.update(parents)
      wanted = False
    elif follow is None:
      wanted, parents = True, objects.parents(commit.id)
    else:
      wanted, parents = follow(commit)
    for parent in parents:
      waiting.add(parent)
    if commit.id in hidden:
      # If all that waits is left out, so is all that lies behind it.
      shown = not hidden.issuperset(waiting)
    if wanted:
      yield commit


def ancestors(start: Iterable[str], objects: Objects) -> set[str]:
  """Returns the ids of commits and of all that came before them.

  Args:
    start: commit ids.
    objects: objects of the repository.
  """
  seen: set[str] = set()
  stack = list(start)
  while stack:
    name = stack.pop()
    if name not in seen:
      seen.add(name)
      stack += objects.parents(name)
  return seen


def is_ancestor(name: str, tip: str, objects: Objects) -> bool:
  """Returns whether a commit is another, or came before it.

  Args:
    name: id of the one.
    tip: id of the other.
    objects: objects of the repository.
  """
  end = objects.commit(name).position
  waiting = Waiting(objects, [tip])
  while waiting:
    commit = waiting.pop()
    if commit.id == name:
      return True
    if commit.position > end:
      for parent in objects.parents(commit.id):
        waiting.add(parent)
  return False


def merge_bases(tips: Sequence[str], objects: Objects) -> list[str]:
  """Returns the best common ancestors of commits.

  A common ancestor is best if it is no ancestor of another one. There are
  several after a criss-cross merge, none between unrelated histories. Reads
  no further back than the bases.

  Args:
    tips: commit ids.
    objects: objects of the repository.
  """
  reached: dict[str, int] = {}  # by which tips, as bits
  for i, tip in enumerate(tips):
    reached[tip] = reached.get(tip, 0) | 1 << i
  all_tips = (1 << len(tips)) - 1
  behind = all_tips + 1  # what lies behind a base is common, but not best
  waiting = Waiting(objects, tips)
  found = []
  while waiting and any(reached[name] <= all_tips for name in waiting):
    commit = waiting.pop()
    bits = reached[commit.id]
    if bits == all_tips:
      found.append(commit.id)
      bits |= behind
    for parent in objects.parents(commit.id):
      reached[parent] = reached.get(parent, 0) | bits
      waiting.add(parent)
  return sorted(found)
