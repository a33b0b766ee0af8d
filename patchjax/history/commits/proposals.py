"""Committing a patch: base checked, value computed, file kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.trees.errors import BaseMismatchError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit
  from patchjax.patches import Patch
  from patchjax.trees.digest import Entry


def is_patch(value: Any) -> bool:
  """Returns whether a value is a patch or the path of a patch file.

  Args:
    value: what was given to `Repo.commit`.
  """
  from patchjax.patches import Patch

  return isinstance(value, Patch | str | os.PathLike)


def materialise(
  repo: Repo,
  value: Any,
  parents: tuple[str, ...],
  old: Mapping[str, Entry],
  *,
  any_base: bool = False,
) -> tuple[dict[str, Any], str]:
  """Returns the leaves of a patched version, and the id of the patch file.

  Untouched leaves are not read. A patch that says for which value it was made
  is applied to no other, and a patch file has to say it; a patch in memory
  that does not is taken to be for the version that it is committed on.

  Args:
    repo: the repository.
    value: a patch, or the path of a patch file.
    parents: ids of the parents; the patch is applied to the first.
    old: the entries of the first parent.
    any_base: whether any version of the same structure will do.

  Raises:
    BaseMismatchError: if the patch was made for another value, or is a file
      that does not say for which.
    MismatchError: if its structure does not fit; lists every bad leaf.
  """
  from patchjax.history.arrays import encodings
  from patchjax.history.arrays.restoring import stored
  from patchjax.history.storage.objects import id_of
  from patchjax.patches import Patch

  if isinstance(value, Patch):
    patch, data = value, None
  else:
    patch = Patch.load(value)
    with open(value, "rb") as file:
      data = file.read()
    if patch.base is None and not any_base:
      raise BaseMismatchError(
        f"{os.fspath(value)} does not say for which value it was made; save "
        "it with `patch.save(path, base=params)`, or commit it with "
        "any_base=True (--any-base)"
      )
  if any_base:
    patch = patch.replace(base=None)
  if not parents:
    raise RepositoryError(
      "a patch needs a version to be applied to, and the branch has none "
      "yet; commit the base first, or name it with on="
    )
  base = repo.objects.commit(parents[0])
  _check_base(repo, patch, base, old)
  touched = {name: old[name] for name in patch.names if name in old}
  words = repo.reader.read(touched)
  named: dict[str, Any] = {
    name: stored(words[name], entry) if name in words else entry
    for name, entry in old.items()
  }
  if data is None:
    data = file_of(patch.replace(base=base.tree))
  changed = encodings.applied(named, old, id_of(data), data)
  return changed, repo.objects.write(data)


def _check_base(
  repo: Repo, patch: Patch, base: Commit, old: Mapping[str, Entry]
) -> None:
  from patchjax.history.arrays import state
  from patchjax.trees.check import check_named
  from patchjax.trees.digest import tree_objects

  ids = {base.tree}
  if patch.structure is not None:
    known = state.rest(old, patch.structure.leaves)
    check_named(
      patch.structure.leaves, known, what=f"the version {base.id[:12]}"
    )
    ids.add(tree_objects(known)[0])
  else:
    unknown = [
      name
      for name, delta in patch.deltas.items()
      if name not in old and not _inserts(delta)
    ]
    if unknown:
      raise BaseMismatchError(
        f"version {base.id[:12]} has no leaf for the patch's "
        + ", ".join(unknown)
      )
  if patch.base is None or patch.base in ids:
    return
  fitting = [
    commit.id[:12]
    for tip in {**repo.branches(), **repo.tags()}.values()
    for commit in repo.log(tip)
    if commit.tree == patch.base
  ]
  hint = (
    f"it was made for {' or '.join(sorted(set(fitting)))}: commit it on=that "
    "version to a branch of its own, and merge"
    if fitting
    else "no version of this repository has that value"
  )
  raise BaseMismatchError(
    f"wrong base: the patch was made for the value {patch.base[:12]}, found "
    f"{base.tree[:12]} in commit {base.id[:12]}; {hint}"
  )


def _inserts(delta: Any) -> bool:
  from patchjax.patches import Insert

  return isinstance(delta, Insert)


def file_of(patch: Patch) -> bytes:
  """Returns the bytes of a patch as a file.

  Args:
    patch: the patch.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "patch.safetensors")
    patch.save(path)
    with open(path, "rb") as file:
      return file.read()


def patch_of(repo: Repo, ref: str = "main") -> Patch:
  """Returns the patch that made a version.

  The file that was submitted, if it was one; else the exact difference
  (law `bits`) to its first parent.

  Args:
    repo: the repository.
    ref: the version.

  Raises:
    RepositoryError: if the version is the first of its history.
  """
  from patchjax.patches import Patch, diff

  commit = repo.show(ref)
  if commit.patch is not None:
    data = repo.objects.read(commit.patch)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, "patch.safetensors")
      with open(path, "wb") as file:
        file.write(data)
      return Patch.load(path)
  if not commit.parents:
    raise RepositoryError(
      f"commit {commit.id[:12]} is the first of its history: there is "
      "nothing that it is a patch to"
    )
  parent = repo.objects.commit(commit.parents[0])
  patch = diff(
    repo.checkout(parent.id),
    repo.checkout(commit.id),
    exact=True,
    structural=True,
  )
  return patch.replace(base=parent.tree)
