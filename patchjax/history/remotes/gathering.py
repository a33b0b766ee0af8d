"""Notes across repositories: gathered, never lost.

Notes of a commit are a chain, the latest first. Where two repositories added
notes to one commit, ours are put on top of theirs again; a note that both
have, in whatever order, is there once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchjax.history.storage.objects import spell
from patchjax.history.storage.refs import NOTES
from patchjax.trees.errors import ConflictError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

_TRIES = 20  # each lost race means that somebody else's note was written


def gather(source: Repo, target: Repo, wanted: Callable[[str], bool]) -> int:
  """Brings notes of a source to a target; returns how many commits got some.

  Args:
    source: where notes are.
    target: where they shall be, beside those it has.
    wanted: says of the id of a commit whether its notes are.
  """
  keys = list(source.files.walk(NOTES))
  keys = [key for key in keys if wanted(key.rpartition("/")[2])]
  theirs = _heads(source, keys)
  mine = _heads(target, keys)
  return sum(
    _gather_one(source, target, commit, head)
    for commit, head in theirs.items()
    if head != mine.get(commit)
  )


def _heads(repo: Repo, keys: list[str]) -> dict[str, str]:
  data = repo.files.read_all(keys)
  return {
    key.removeprefix(f"{NOTES}/"): value.decode("ascii", "replace").strip()
    for key, value in data.items()
  }


def _gather_one(source: Repo, target: Repo, commit: str, head: str) -> bool:
  theirs = _chain(source, head)
  for attempt in range(_TRIES):
    old = target.refs.get(NOTES, commit)
    ours = _chain(target, old)
    if head in ours:
      return False
    objects = {name: source.objects.read(name) for name in theirs}
    new = head
    if old not in theirs:
      has = {_content(note) for note in theirs.values()}
      for note in reversed(ours.values()):
        if _content(note) not in has:
          data = spell({**note, "previous": new})
          new = target.objects.write(data)
    target.objects.write_all(objects)
    try:
      target.refs.move(NOTES, commit, old=old, new=new)
      return True
    except ConflictError:
      if attempt == _TRIES - 1:
        raise
  raise AssertionError("unreachable")


def _chain(repo: Repo, name: str | None) -> dict[str, dict[str, Any]]:
  """Returns the notes of a chain by id, the latest first."""
  found: dict[str, dict[str, Any]] = {}
  while name is not None and name not in found:
    found[name] = repo.objects.note(name)
    name = found[name]["previous"]
  return found


def _content(note: dict[str, Any]) -> bytes:
  return spell({k: v for k, v in note.items() if k != "previous"})
