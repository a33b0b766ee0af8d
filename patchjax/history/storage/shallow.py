"""Shallow histories: where a history was cut when it was copied.

The file `shallow` lists, as git's does, the ids of commits whose parents were
not copied. `Objects.parents` says of them that they have none, so that every
walk ends there; the commit objects themselves, and so their ids, stay as they
are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from patchjax.trees.errors import ConflictError, IntegrityError

if TYPE_CHECKING:
  from patchjax.history.storage.files import Files

KEY = "shallow"


def read(files: Files) -> frozenset[str]:
  """Returns the ids of the commits at which the history was cut.

  Args:
    files: files of the repository.

  Raises:
    IntegrityError: if the file is damaged.
  """
  try:
    data = files.read(KEY)
  except FileNotFoundError:
    return frozenset()
  return _parse(data, files)


def _parse(data: bytes, files: Files) -> frozenset[str]:
  from patchjax.history.storage.objects import is_id

  found = data.decode("ascii", "replace").split()
  if not all(map(is_id, found)):
    raise IntegrityError(
      f"{files.path(KEY)} is damaged: expected a commit id in each line, found "
      f"{data[:80]!r}; `patchjax fetch --complete` fetches all and mends it"
    )
  return frozenset(found)


def update(
  files: Files, *, cut: Iterable[str], joined: Collection[str]
) -> None:
  """Changes where the history is cut, beside others who may do so too.

  Args:
    files: files of the repository.
    cut: commits whose parents are not here.
    joined: commits whose parents, and all before them, are here now.

  Raises:
    ConflictError: if others keep changing it.
  """
  cut = set(cut)
  for _ in range(20):
    try:
      old = files.read(KEY)
    except FileNotFoundError:
      old = None
    before = frozenset() if old is None else _parse(old, files)
    after = (before | cut).difference(joined)
    if after == before:
      return
    new = "".join(f"{name}\n" for name in sorted(after)).encode()
    if files.swap(KEY, old=old, new=new):
      return
  raise ConflictError(
    f"{files.path(KEY)}: other processes keep changing it; try again"
  )
