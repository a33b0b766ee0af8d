"""Notes: facts about a commit that become known after it was made.

Verdicts, releases and the like are attached as in git notes: a note object
names its commit, its kind and the note before it, and `refs/notes/<commit>`
holds the latest. The id of the commit does not change.
"""

from __future__ import annotations

from typing import Any

from patchjax.history.storage.objects import Objects, spell
from patchjax.history.storage.refs import NOTES, Refs
from patchjax.trees.errors import ConflictError

_TRIES = 100  # each lost race means that somebody else's note was written


def add(
  objects: Objects,
  refs: Refs,
  commit: str,
  *,
  kind: str,
  payload: Any,
  author: str,
  time: str,
) -> str:
  """Attaches a note to a commit and returns the id of the note.

  Args:
    objects: objects of the repository.
    refs: refs of the repository.
    commit: id of the commit.
    kind: what it is about, such as `verdict`.
    payload: JSON-able content.
    author: who says so.
    time: since when, ISO 8601.

  Raises:
    IntegrityError: if the commit is gone.
    ConflictError: if others keep writing notes to this commit.
  """
  objects.freshen(commit)
  for attempt in range(_TRIES):
    previous = refs.get(NOTES, commit)
    spelled = {
      "type": "note",
      "commit": commit,
      "kind": kind,
      "payload": payload,
      "author": author,
      "time": time,
      "previous": previous,
    }
    note = objects.write(spell(spelled))
    try:
      refs.move(NOTES, commit, old=previous, new=note)
      return note
    except ConflictError:
      # Notes only accumulate: put this one on top of the other.
      if attempt == _TRIES - 1:
        raise
  raise AssertionError("unreachable")


def read(
  objects: Objects, refs: Refs, commit: str, kind: str | None
) -> list[dict[str, Any]]:
  """Returns the notes of a commit, oldest first, each with its `id`.

  Args:
    objects: objects of the repository.
    refs: refs of the repository.
    commit: id of the commit.
    kind: only those of this kind.
  """
  found = []
  name = refs.get(NOTES, commit)
  while name is not None:
    note = objects.note(name)
    if kind in (None, note["kind"]):
      found.append({"id": name, **note})
    name = note["previous"]
  return found[::-1]
