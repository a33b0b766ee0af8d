"""Refs: the only mutable truth of a repository, one commit id each.

`refs/heads/<branch>`, `refs/tags/<tag>`, `refs/notes/<commit>` with the latest
note of a commit, and `refs/remotes/<remote>/<branch>`: where a branch of
another repository was when it was last looked at. A ref moves by
compare-and-swap only.
"""

from __future__ import annotations

import re

from patchjax.history.storage.files import Files
from patchjax.history.storage.objects import Objects, is_id
from patchjax.trees.errors import (
  ConflictError,
  IntegrityError,
  RefNotFoundError,
  RepositoryError,
)

HEADS = "refs/heads"
TAGS = "refs/tags"
NOTES = "refs/notes"
REMOTES = "refs/remotes"

_NOUN = {
  HEADS: "branch",
  TAGS: "tag",
  NOTES: "note of commit",
  REMOTES: "remote branch",
}
_BAD_NAME = re.compile(
  r"^$|^[-/.]|[/.]$|//|\.\.|/\.|@\{|^@$|[\x00-\x20\x7f~^:?*\[\\]|\.lock$"
  r"|\.__lock(/|$)|\.orbax-checkpoint-tmp|[\ud800-\udfff]"
)


def check_name(name: str) -> None:
  """Refuses names that no ref can have (git's rules).

  Args:
    name: name of a branch or tag.

  Raises:
    RepositoryError: if it is not a name.

  Example:
    >>> check_name("ducksville/fix-1")
  """
  if not _is_name(name):
    raise RepositoryError(
      f"{name!r} cannot name a branch or tag: expected a text without "
      "spaces, '..', '~', '^', ':', '?', '*', '[', '\\', that neither "
      "starts with '-' or '.' nor starts or ends with '/' or '.'"
    )


def _is_name(name: str) -> bool:
  return not _BAD_NAME.search(name) and len(name.encode()) <= 200


def id_in(data: bytes, what: str, path: str) -> str:
  """Returns the id that the file of a ref holds.

  Args:
    data: its bytes.
    what: the ref, for messages.
    path: its path, for messages.

  Raises:
    IntegrityError: if it does not hold an id.
  """
  text = data.decode("ascii", "replace")
  if not (is_id(text[:-1]) and text.endswith("\n")):
    raise IntegrityError(
      f"{what} is damaged: expected 64 hex digits and a newline in {path}, "
      f"found {data[:80]!r}; write the id of its last commit into the file "
      "(its reflog names it first; fsck lists commits without a branch)"
    )
  return text[:-1]


class Refs:
  """The refs of a repository.

  Attributes:
    files: where they lie.
  """

  def __init__(self, files: Files, objects: Objects):
    self.files = files
    self._objects = objects

  def get(self, space: str, name: str) -> str | None:
    """Returns the id that a ref holds, or None if there is no such ref.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
      name: name within the space.

    Raises:
      IntegrityError: if the file does not hold an id.
    """
    if not _is_name(name):
      return None  # no path out of the folder either
    try:
      data = self.files.read(f"{space}/{name}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
      return None
    path = self.files.path(f"{space}/{name}")
    return id_in(data, f"{_NOUN[space]} {name!r}", path)

  def names(self, space: str) -> list[str]:
    """Returns the sorted names of a space.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
    """
    return [key[len(space) + 1 :] for key in self.files.walk(space)]

  def all(self, space: str) -> dict[str, str]:
    """Returns `{name: id}` of a space.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
    """
    # A ref may vanish between listing and reading: refs can be removed.
    found = {name: self.get(space, name) for name in self.names(space)}
    return {name: id_ for name, id_ in found.items() if id_ is not None}

  def readable(self, space: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the refs of a space, and what is wrong with damaged ones.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.

    Returns:
      `({name: id}, {name: message})`.
    """
    found, damaged = {}, {}
    for name in self.names(space):
      try:
        id_ = self.get(space, name)
      except IntegrityError as error:
        damaged[name] = str(error)
      else:
        if id_ is not None:
          found[name] = id_
    return found, damaged

  def check(self, space: str, name: str, *, new: bool) -> None:
    """Checks that there can be a ref of a name.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
      name: name within the space.
      new: whether it is to be created.

    Raises:
      RepositoryError: if it is no name, or collides with that of another ref.
    """
    if space != NOTES:
      check_name(name)
    if new:
      self._check_folders(space, name)

  def move(
    self, space: str, name: str, *, old: str | None, new: str | None
  ) -> None:
    """Moves a ref if it still holds what the caller has seen.

    Branches and tags are moved by `reflog.move`, which also logs it.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
      name: name within the space.
      old: the id it must hold; None if it must not exist.
      new: the id it shall hold, whose object must be stored already; None
        removes the ref.

    Raises:
      ConflictError: if it holds another id by now.
      IntegrityError: if the object is gone.
    """
    self.check(space, name, new=old is None)
    if new is not None:
      self._objects.freshen(new)
    if old is None:
      self.files.prune(f"{space}/{name}")  # left by refs that were removed
    swapped = self.files.swap(
      f"{space}/{name}",
      old=None if old is None else f"{old}\n".encode(),
      new=None if new is None else f"{new}\n".encode(),
    )
    if not swapped:
      raise ConflictError(self._conflict(space, name, old))

  def _check_folders(self, space: str, name: str) -> None:
    # Refs are files: `a` and `a/b` cannot both exist.
    for other in self.names(space):
      if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
        raise RepositoryError(
          f"{_NOUN[space]} {name!r} cannot exist beside {other!r}: "
          "one name is a folder of the other; choose another name"
        )

  def _conflict(self, space: str, name: str, old: str | None) -> str:
    now = self.get(space, name)
    noun = _NOUN[space]
    if now is None:
      return f"{noun} {name!r} does not exist any more; expected it at {old}"
    where = now[:12] if space == NOTES else self.describe(now)
    if old is None:
      return f"{noun} {name!r} exists already, at {where}"
    return (
      f"{noun} {name!r} moved in the meantime: expected it at {old[:12]}, "
      f"found it at {where}; nothing was lost: look at the new tip, then "
      "commit again on top of it (retry=True, if the changes do not touch "
      "the same leaves), or merge"
    )

  def describe(self, name: str) -> str:
    """Returns what a message says of a commit: its id, author, time, title.

    Args:
      name: its id.
    """
    try:
      commit = self._objects.commit(name)
    except IntegrityError:
      return name[:12]
    return f"{name[:12]} ({commit.author}, {commit.time}: {commit.title})"

  def must(self, space: str, name: str) -> str:
    """Returns the id that a ref holds.

    Args:
      space: `HEADS`, `TAGS` or `NOTES`.
      name: name within the space.

    Raises:
      RefNotFoundError: if there is no such ref; names those there are.
    """
    found = self.get(space, name)
    if found is None:
      known = ", ".join(self.names(space)) or "none"
      raise RefNotFoundError(
        f"there is no {_NOUN[space]} {name!r}; found: {known}"
      )
    return found
