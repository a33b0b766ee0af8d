"""What a folder must be to be a repository, and who and when we are."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import socket

from patchjax.history.storage.files import Files
from patchjax.trees.errors import (
  FormatError,
  NotARepositoryError,
  RepositoryError,
)

MARKER = "patchjax.json"
VERSION = 1


def place(path: str | os.PathLike[str], *, remote: bool = False) -> str:
  """Returns the absolute path of a local folder, or a URL as it is.

  Args:
    path: path of a folder, `gs://bucket/path` or, for a remote, also
      `s3://bucket/path`.
    remote: whether it is to be copied to and from only.

  Raises:
    RepositoryError: if no repository can live there.

  Example:
    >>> place("gs://bucket/model/")
    'gs://bucket/model'
  """
  text = os.fspath(path)
  if "://" not in text:
    return os.path.abspath(os.path.expanduser(text))
  scheme, _, rest = text.partition("://")
  if scheme == "file":
    return os.path.abspath(rest)
  if scheme == "s3" and not remote:
    raise RepositoryError(
      f"{text}: Orbax cannot write S3 payloads today, so a repository cannot "
      "be worked in there; use a local repository with an S3 remote: "
      f"`patchjax clone {text}`, or `patchjax push {text}`"
    )
  from patchjax.history.storage.stores import SCHEMES

  if scheme not in SCHEMES or not rest.strip("/"):
    raise RepositoryError(
      f"{text!r} is no place for a repository: expected a folder, "
      "gs://BUCKET/PATH or s3://BUCKET/PATH"
    )
  if found := sorted(set(text) & set("[]*?#%")):
    raise RepositoryError(
      f"{text!r} contains {' '.join(found)}, which Google's file system takes "
      "for a pattern and would lose payloads by; choose another path"
    )
  return text.rstrip("/")


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
  if files.local:
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
    known = not files.local or os.path.isdir(files.root)
    what = "is no" if known else "does not exist, so no"
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
