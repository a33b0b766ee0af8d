"""The graph of commits: revisions, ancestry and merge bases.

Works on commit objects alone; imports no array library.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence

from patchjax.history.objects import Commit, Objects, is_id
from patchjax.history.refs import HEADS, TAGS, Refs
from patchjax.trees.errors import IntegrityError, RefNotFoundError

_STEP = re.compile(r"([~^])(\d*)")
_REVISION = re.compile(r"(?P<start>[^~^]+)(?P<steps>([~^]\d*)*)")
_SHORTEST_PREFIX = 4


def resolve(text: str, refs: Refs, objects: Objects) -> str:
  """Returns the commit id that a text names.

  Args:
    text: a branch, tag, commit id or unique prefix of one (at least 4 digits),
      or `heads/<branch>`, `tags/<tag>`; followed by any number of `~n` (n
      first parents back) and `^n` (the n-th parent).
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
  for space, short in ((HEADS, "heads/"), (TAGS, "tags/")):
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
  parents = objects.commit(name).parents
  if len(parents) < number:
    raise RefNotFoundError(
      f"{text!r} goes too far: commit {name[:12]} has {len(parents)} "
      f"parent(s), asked for number {number}"
    )
  return parents[number - 1]


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
      stack += objects.commit(name).parents
  return seen


def history(tip: str, objects: Objects) -> list[Commit]:
  """Returns a commit and all before it: children first, else newest first.

  Args:
    tip: commit id.
    objects: objects of the repository.
  """
  commits = {name: objects.commit(name) for name in ancestors([tip], objects)}
  waiting = dict.fromkeys(commits, 0)
  for commit in commits.values():
    for parent in commit.parents:
      waiting[parent] += 1
  ready: list[tuple[float, str]] = [(0.0, tip)]
  ordered = []
  while ready:
    commit = commits[heapq.heappop(ready)[1]]
    ordered.append(commit)
    for parent in commit.parents:
      waiting[parent] -= 1
      if not waiting[parent]:
        age = -commits[parent].when.timestamp()
        heapq.heappush(ready, (age, parent))
  return ordered


def merge_bases(tips: Sequence[str], objects: Objects) -> list[str]:
  """Returns the best common ancestors of commits.

  A common ancestor is best if it is no ancestor of another one. There are
  several after a criss-cross merge, none between unrelated histories.

  Args:
    tips: commit ids.
    objects: objects of the repository.
  """
  common = set.intersection(*(ancestors([tip], objects) for tip in tips))
  # What lies behind a common ancestor is common, but not best.
  behind = {
    parent for name in common for parent in objects.commit(name).parents
  }
  return sorted(common - behind)
