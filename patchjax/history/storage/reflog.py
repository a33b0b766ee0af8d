"""The reflog: where each branch and tag has been, and who moved it.

Each move writes one immutable entry `logs/heads/<branch>/<time>-<uuid>` before
the ref is swapped, in one go with the objects that the ref will name; a move
that loses the swap takes its entry away again. A process killed in between
leaves an entry of a move that never happened: what the ref holds, followed
from entry to entry, tells such entries apart.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history.storage import layout
from patchjax.history.storage.refs import HEADS, TAGS
from patchjax.trees.errors import (
  ConflictError,
  IntegrityError,
  RefNotFoundError,
)

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.refs import Refs

LOGS = "logs"
_ENTRY = re.compile(r"\d{20}-[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Move:
  """One move of a ref.

  Attributes:
    ref: the ref, such as `refs/heads/main`.
    old: id of the commit it held before; None if it was created.
    new: id of the commit it held then; None if it was removed.
    who: who moved it.
    when: when, ISO 8601.
    why: the verb, and what it did.
    done: False if the ref never got there: the process died on the way.
  """

  ref: str
  old: str | None
  new: str | None
  who: str
  when: str
  why: str
  done: bool = True

  def to_json(self) -> dict[str, Any]:
    """Returns the move as a JSON-able dict."""
    return dataclasses.asdict(self)


def folder_of(space: str, name: str) -> str:
  """Returns the key of the folder with the entries of a ref.

  Args:
    space: `HEADS` or `TAGS`.
    name: name within the space.

  Example:
    >>> folder_of("refs/heads", "main")
    'logs/heads/main'
  """
  return f"{LOGS}/{space.removeprefix('refs/')}/{name}"


def move(
  repo: Repo,
  space: str,
  name: str,
  *,
  old: str | None,
  new: str | None,
  why: str,
  who: str | None = None,
  objects: Mapping[str, bytes] | None = None,
) -> None:
  """Moves a branch or tag, and writes down that it did.

  Args:
    repo: the repository.
    space: `HEADS` or `TAGS`.
    name: name within the space.
    old: the id it must hold; None if it must not exist.
    new: the id it shall hold; None removes it.
    why: the verb, and what it did.
    who: who moves it; by default as for `Repo.commit`.
    objects: `{id: bytes}` to store before.

  Raises:
    ConflictError: if it holds another id by now.
  """
  entry = {
    "ref": f"{space}/{name}",
    "old": old,
    "new": new,
    "who": who or layout.default_author(),
    "when": layout.spell_time(None),
    "why": why,
  }
  stamp = f"{time.time_ns():020}-{uuid.uuid4().hex}"
  key = f"{folder_of(space, name)}/{stamp}"
  data = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace")
  repo.refs.check(space, name, new=old is None)
  repo.objects.write_all(objects or {}, {key: data + b"\n"})
  try:
    repo.refs.move(space, name, old=old, new=new)
  except ConflictError:
    repo.files.delete(key)
    raise


def moves(refs: Refs, space: str, name: str) -> Iterator[Move]:
  """Yields the moves of a ref, the latest first; see `reflog`.

  Moves that never happened come at the end.

  Args:
    refs: refs of the repository.
    space: `HEADS` or `TAGS`.
    name: name within the space.
  """
  stamps = refs.files.names(folder_of(space, name))
  unread = [stamp for stamp in stamps if _ENTRY.fullmatch(stamp)]
  at = _now(refs, space, name)
  passed: list[tuple[str, Move]] = []  # read, and not on the chain so far
  last = ""
  while True:
    found = _take(passed, at, last)
    while found is None and unread:
      stamp = unread.pop()
      move = _read(refs, f"{folder_of(space, name)}/{stamp}")
      if move is not None:
        passed.append((stamp, move))
        found = _take(passed, at, last)
    if found is None and at is not None:
      # Clocks of machines disagree; or older entries expired; or the ref was
      # mended by hand, and the log goes on with what it last knew.
      found = _take(passed, at, "") or _take(passed, ..., last)
    if found is None:
      break
    last, move = found
    yield move
    at = move.old
  for _, move in passed:
    yield dataclasses.replace(move, done=False)


def _now(refs: Refs, space: str, name: str) -> Any:
  """What a ref holds; ... (anything) if it is damaged: the log says it."""
  try:
    return refs.get(space, name)
  except IntegrityError:
    return ...


def _take(
  passed: list[tuple[str, Move]], at: Any, last: str
) -> tuple[str, Move] | None:
  """Takes the latest move to `at` (... is any) from before `last`."""
  for i, (stamp, move) in enumerate(passed):
    if at in (..., move.new) and (not last or stamp < last):
      return passed.pop(i)
  return None


def _read(refs: Refs, key: str) -> Move | None:
  try:
    spelled = json.loads(refs.files.read(key))
    fields = {f.name for f in dataclasses.fields(Move)} - {"done"}
    return Move(**{name: spelled[name] for name in fields})
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None  # expired meanwhile, or damaged: the log is no history


def reflog(
  repo: Repo, name: str = "main", *, limit: int | None = None
) -> list[Move]:
  """Returns where a branch or tag has been, the latest move first.

  `main@{n}` names the commit that `main` held before its last n moves. The
  log of a ref that was removed stays, so that a branch deleted by mistake
  comes back with `repo.branch(name, at=f"{name}@{1}")`.

  Args:
    repo: the repository.
    name: a branch, or a tag.
    limit: how many moves to return at most.

  Returns:
    The moves. One of which `done` is False never happened: its writer died
    before. Where entries have expired the list ends.

  Raises:
    RefNotFoundError: if no such ref was ever there.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   for i in range(3):
    ...     commit = repo.commit({"w": np.float32([i])}, message=f"step {i}")
    ...   commit = repo.reset("main~2")
    ...   [move.why for move in repo.reflog()][:2]
    ...   repo.show("main@{1}").title
    ['reset: moving to main~2', 'commit: step 2']
    'step 2'
  """
  found: list[Move] = []
  for space in (HEADS, TAGS):
    for each in moves(repo.refs, space, name):
      if limit is not None and len(found) >= limit:
        break
      found.append(each)
    if found:
      return found
  if repo.refs.get(HEADS, name) or repo.refs.get(TAGS, name):
    return []
  known = ", ".join(repo.refs.names(HEADS)) or "none"
  raise RefNotFoundError(
    f"there never was a branch or tag {name!r}; branches: {known}"
  )


def before(refs: Refs, name: str, number: int) -> str:
  """Returns the id that a ref held before its last moves.

  Args:
    refs: refs of the repository.
    name: a branch, or a tag.
    number: how many moves before now.

  Raises:
    RefNotFoundError: if the log does not go so far, or the ref was not there.
  """
  for space in (HEADS, TAGS):
    count = 0
    at = _now(refs, space, name)
    for move in moves(refs, space, name):
      if not move.done:
        continue
      at = move.new
      if count == number:
        break
      count += 1
      at = move.old
    else:
      if not count and at is None:
        continue  # no such ref
      if count < number:
        raise RefNotFoundError(
          f"{name}@{{{number}}}: the log of {name!r} has {count} move(s)"
        )
    if not isinstance(at, str):
      raise RefNotFoundError(
        f"{name}@{{{number}}}: {name!r} did not exist then; look at "
        f"`patchjax reflog {name}`"
      )
    return at
  raise RefNotFoundError(f"there never was a branch or tag {name!r}")
