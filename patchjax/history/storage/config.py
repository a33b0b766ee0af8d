"""Named remotes: what other repositories a repository knows.

`config.json` is the one file of settings. It is swapped as refs are, so that
two processes that change it do not lose each other's change.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchjax.history.storage import layout
from patchjax.history.storage.refs import REMOTES, check_name
from patchjax.trees.errors import (
  ConflictError,
  FormatError,
  RefNotFoundError,
  RepositoryError,
)

if TYPE_CHECKING:
  import os

  from patchjax.history.repo import Repo
  from patchjax.history.storage.files import Files

KEY = "config.json"
VERSION = 1
ORIGIN = "origin"


@dataclasses.dataclass(frozen=True)
class Remote:
  """Another repository.

  Attributes:
    name: what it is called here; None if it was given by its place alone.
    url: its folder or URL.
    only: regexes; of a partial clone, leaves with other names are not fetched.
      None for all leaves.
  """

  name: str | None
  url: str
  only: tuple[str, ...] | None = None

  @property
  def label(self) -> str:
    """What messages call it."""
    return self.name or self.url

  def to_json(self) -> dict[str, Any]:
    """Returns the remote as a JSON-able dict."""
    only = None if self.only is None else list(self.only)
    return {"name": self.name, "url": self.url, "only": only}


def remotes(repo: Repo) -> dict[str, Remote]:
  """Returns the remotes of a repository by name.

  Args:
    repo: the repository.

  Raises:
    FormatError: if `config.json` cannot be understood.

  Example:
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   remote = repo.add_remote("backup", "s3://bucket/model")
    ...   {name: remote.url for name, remote in repo.remotes().items()}
    {'backup': 's3://bucket/model'}
  """
  return read(repo.files)


def read(files: Files) -> dict[str, Remote]:
  """Returns the remotes of a repository by name; see `remotes`.

  Args:
    files: files of the repository.

  Raises:
    FormatError: if `config.json` cannot be understood.
  """
  return _parse(files, _read(files))


def add_remote(repo: Repo, name: str, url: str | os.PathLike[str]) -> Remote:
  """Gives another repository a name, and returns what is known of it.

  Args:
    repo: the repository.
    name: the name, such as `origin`.
    url: a folder, `gs://bucket/path` or `s3://bucket/path`. It need not exist:
      the first `push` creates it.

  Raises:
    ConflictError: if there is a remote of that name.
    RepositoryError: if it is no name, or no place for a repository.
  """
  check_name(name)
  if "/" in name:
    raise RepositoryError(
      f"{name!r} cannot name a remote: it is the first part of the names of "
      "its branches; choose one without '/'"
    )
  remote = Remote(name, layout.place(url, remote=True))

  def change(known: dict[str, Remote]) -> None:
    if name in known:
      raise ConflictError(
        f"there is a remote {name!r} already, at {known[name].url}; remove it "
        f"first (`patchjax remote remove {name}`), or choose another name"
      )
    known[name] = remote

  update(repo, change)
  return remote


def remove_remote(repo: Repo, name: str) -> None:
  """Forgets a remote and where its branches were; copies nothing, loses none.

  Args:
    repo: the repository.
    name: its name.

  Raises:
    RefNotFoundError: if there is none of that name.
    RepositoryError: if leaves are to be had from there that are not here.
  """
  from patchjax.history.remotes import partial

  remote = remotes(repo).get(name)
  if remote is not None and remote.only is not None:
    lacking = partial.lacking(repo)
    if lacking:
      raise RepositoryError(
        f"{repo.path} is a partial clone of {remote.url}: {len(lacking)} "
        f"leaf/leaves, such as {lacking[0]}, are to be had from there alone; "
        f"`patchjax fetch {name} --complete` first"
      )

  def change(known: dict[str, Remote]) -> None:
    if name not in known:
      raise RefNotFoundError(_unknown(name, known))
    del known[name]

  update(repo, change)
  for branch, at in repo.refs.all(REMOTES).items():
    if branch.startswith(f"{name}/"):
      repo.refs.move(REMOTES, branch, old=at, new=None)


def find(repo: Repo, name: str | os.PathLike[str] | None) -> Remote:
  """Returns a remote by name or place.

  Args:
    repo: the repository.
    name: a name, or a folder or URL; None for `origin`, or the only remote.

  Raises:
    RefNotFoundError: if there is none of that name, or several to choose from.
  """
  known = remotes(repo)
  if name is None:
    if ORIGIN in known or len(known) == 1:
      return known.get(ORIGIN) or next(iter(known.values()))
    raise RefNotFoundError(
      "no remote is named, and none is 'origin'; found: "
      f"{', '.join(known) or 'none'}; name one, or add it: `patchjax remote "
      "add origin URL`"
    )
  text = str(name)
  if text in known:
    return known[text]
  if any(sign in text for sign in ("/", "\\")) or text in (".", ".."):
    return Remote(None, layout.place(name, remote=True))
  raise RefNotFoundError(_unknown(text, known))


def update(repo: Repo, change: Callable[[dict[str, Remote]], None]) -> None:
  """Changes the remotes, beside others who may do so too.

  Args:
    repo: the repository.
    change: changes `{name: remote}`; called again if somebody was faster.

  Raises:
    ConflictError: if others keep changing them.
  """
  for _ in range(20):
    old = _read(repo.files)
    known = _parse(repo.files, old)
    change(known)
    value = {
      "version": VERSION,
      "remotes": {
        name: {k: v for k, v in remote.to_json().items() if k != "name"}
        for name, remote in sorted(known.items())
      },
    }
    new = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    if new == old or repo.files.swap(KEY, old=old, new=new):
      return
  raise ConflictError(
    f"{repo.files.path(KEY)}: other processes keep changing it; try again"
  )


def _read(files: Files) -> bytes | None:
  try:
    return files.read(KEY)
  except FileNotFoundError:
    return None


def _parse(files: Files, data: bytes | None) -> dict[str, Remote]:
  if data is None:
    return {}
  path = files.path(KEY)
  try:
    spelled = json.loads(data)
    if spelled["version"] != VERSION:
      raise FormatError(
        f"{path}: expected version {VERSION}, found {spelled['version']!r}; "
        "it was written by a newer patchjax: upgrade"
      )
    return {
      name: Remote(
        name,
        str(item["url"]),
        None if item.get("only") is None else tuple(item["only"]),
      )
      for name, item in spelled["remotes"].items()
    }
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    if isinstance(error, FormatError):
      raise
    raise FormatError(
      f"{path} is damaged ({error!r}): expected "
      '{"version": 1, "remotes": {"origin": {"url": ...}}}; mend or remove '
      "it, and add the remotes again"
    ) from error


def _unknown(name: str, known: dict[str, Remote]) -> str:
  return (
    f"there is no remote {name!r}; found: {', '.join(known) or 'none'}; add "
    f"it: `patchjax remote add {name} URL`"
  )
