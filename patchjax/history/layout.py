"""What a folder must be to be a repository, and who and when we are."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import socket

from patchjax.history.files import Files
from patchjax.trees.errors import (
  FormatError,
  NotARepositoryError,
  RepositoryError,
)

MARKER = "patchjax.json"
VERSION = 1


def local(path: str | os.PathLike[str]) -> str:
  """Returns the absolute path of a local folder.

  Args:
    path: path of a folder.

  Raises:
    RepositoryError: if it is a URL.
  """
  text = os.fspath(path)
  if "://" in text:
    raise RepositoryError(
      f"{text!r} is a URL: a repository lives in a local folder; copy it "
      "there, or mount the bucket"
    )
  return os.path.abspath(os.path.expanduser(text))


def create(files: Files) -> None:
  """Makes a folder a repository; does nothing if it is one.

  Args:
    files: the folder.

  Raises:
    RepositoryError: if it holds something else.
    OSError: if it cannot be written.
  """
  if files.exists(MARKER):
    return
  os.makedirs(files.root, exist_ok=True)
  if found := files.names(".")[:5]:
    raise RepositoryError(
      f"{files.root} is not empty and no repository: found "
      f"{', '.join(found)}; choose a new folder"
    )
  spelled = {"format": "patchjax repository", "version": VERSION}
  files.write(MARKER, (json.dumps(spelled) + "\n").encode())


def check(files: Files) -> None:
  """Checks that a folder is a repository of a format that is understood.

  Args:
    files: the folder.

  Raises:
    NotARepositoryError: if it is none.
    FormatError: if it was written by a newer version.
  """
  try:
    data = files.read(MARKER)
  except (FileNotFoundError, NotADirectoryError) as error:
    what = "is no" if os.path.isdir(files.root) else "does not exist, so no"
    raise NotARepositoryError(
      f"{files.root} {what} patchjax repository (expected the file "
      f"{MARKER} in it); create one with `patchjax init`, or name another "
      "folder with -C"
    ) from error
  try:
    version = json.loads(data)["version"]
  except (ValueError, TypeError, KeyError) as error:
    raise FormatError(
      f"{files.path(MARKER)} is damaged: expected "
      f'{{"format": "patchjax repository", "version": {VERSION}}}, found '
      f"{data[:80]!r}; write that line into it"
    ) from error
  if version != VERSION:
    raise FormatError(
      f"{files.root}: expected repository version {VERSION}, found "
      f"{version!r}; it was written by a newer patchjax: upgrade"
    )


def default_author() -> str:
  """Returns $PATCHJAX_AUTHOR, or user@host."""
  if author := os.environ.get("PATCHJAX_AUTHOR"):
    return author
  try:
    user = getpass.getuser()
  except (KeyError, OSError):  # a container without a user database
    user = "unknown"
  return f"{user}@{socket.gethostname()}"


def spell_time(time: datetime.datetime | float | None) -> str:
  """Returns a time as it is written in objects: ISO 8601, UTC.

  Args:
    time: a datetime (of the local zone if it names none), seconds since 1970,
      or None for now.

  Example:
    >>> spell_time(0.5)
    '1970-01-01T00:00:00.500000+00:00'
  """
  if time is None:
    time = datetime.datetime.now(datetime.UTC)
  elif not isinstance(time, datetime.datetime):
    time = datetime.datetime.fromtimestamp(time, datetime.UTC)
  return time.astimezone(datetime.UTC).isoformat(timespec="microseconds")
