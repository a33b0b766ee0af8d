"""Merging versions: their merge base, their contributions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history import graph, reflog
from patchjax.history.refs import HEADS
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.objects import Commit
  from patchjax.history.repo import Repo

_VERSIONED = ("patchjax", "jax", "jaxlib", "numpy", "orbax-checkpoint")


def merge_base(repo: Repo, *refs: str) -> str:
  """Returns the id of the best common ancestor of versions.

  Args:
    repo: the repository.
    *refs: two or more refs.

  Raises:
    RepositoryError: if there is none, or more than one.
  """
  tips = [repo.resolve(ref) for ref in refs]
  found = graph.merge_bases(tips, repo.objects)
  if len(found) == 1:
    return found[0]
  names = ", ".join(refs)
  if not found:
    raise RepositoryError(
      f"{names} have no common ancestor: expected one commit that all were "
      "made from; name the value they differ from with base="
    )
  listed = "\n".join(
    f"  {name[:12]} {repo.objects.commit(name).title}" for name in found
  )
  raise RepositoryError(
    f"{names} have {len(found)} merge bases (they were merged criss-cross):\n"
    f"{listed}\nsay which one the contributions are measured from: base=..."
  )


def merge(
  repo: Repo,
  target: str,
  refs: Sequence[str] | str,
  *,
  method: Any,
  base: str | None = None,
  message: str | None = None,
  author: str | None = None,
  time: datetime.datetime | float | None = None,
  fast_forward: bool = True,
) -> str:
  """Merges versions into a branch and returns the commit id.

  What each version contributes is its difference to the merge base; one that
  equals the base contributes nothing, and is not counted in means. The merge
  commit stores its value; how it was computed (spec, numbers, base,
  contributors, versions) is kept as its recipe.

  As in git, refs that the branch contains already are skipped, and where only
  one version is left to contribute, the branch moves on to it.

  Args:
    repo: the repository.
    target: the branch to merge into; its tip is the first contributor.
    refs: the version or versions to merge.
    method: a merge method, such as `patchjax.merging.ties(density=0.2)`.
    base: ref of the version that contributions are measured from; by default
      the merge base of all.
    message: by default says what was merged.
    author: by whom; by default as for `commit`.
    time: when; by default now.
    fast_forward: False runs the method even for a single contributor.

  Returns:
    The id of the new tip.

  Raises:
    RepositoryError: if there is no merge base, or more than one.
    ConflictError: if somebody else moved the branch in the meantime.
    MismatchError: if the versions differ in structure.
  """
  from patchjax.history import committing

  refs = [refs] if isinstance(refs, str) else refs
  objects = repo.objects
  tip = repo.refs.must(HEADS, target)
  seen = graph.ancestors([tip], objects)
  tips = [tip]
  for ref in refs:
    commit = repo.resolve(ref)
    if commit not in seen and commit not in tips:
      tips.append(commit)
  if len(tips) == 1:
    return tip  # everything is contained already
  base_id = merge_base(repo, *tips) if base is None else repo.resolve(base)
  base_commit = objects.commit(base_id)
  contributing = [
    commit
    for commit in map(objects.commit, tips)
    if commit.tree != base_commit.tree
  ]
  if (
    fast_forward and len(tips) == 2 and graph.is_ancestor(tip, tips[1], objects)
  ):
    why = f"merge {', '.join(refs)}: fast-forward"
    reflog.move(repo, HEADS, target, old=tip, new=tips[1], why=why, who=author)
    return tips[1]
  named = _merged(repo, base_commit, contributing, method, fast_forward)
  return committing.record(
    repo,
    named,
    objects.tree(objects.commit(tip).tree),
    branch=target,
    expected=tip,
    parents=tuple(tips),
    message=message or f"Merge {', '.join(refs)} into {target}",
    author=author,
    time=time,
    recipe=_recipe(method, base_id, contributing),
    verb="merge",
  )


def _merged(
  repo: Repo,
  base: Commit,
  contributing: Sequence[Commit],
  method: Any,
  fast_forward: bool,
) -> dict[str, Any]:
  """Returns the leaves of the merged value."""
  from patchjax.trees.check import check_named
  from patchjax.trees.names import named_leaves

  if not contributing or (fast_forward and len(contributing) == 1):
    # One side changed: it is taken as it is, to the bit.
    return dict(repo.objects.tree((*contributing, base)[0].tree))
  from patchjax import merging

  expected = repo.objects.tree(base.tree)
  for commit in contributing:
    found = repo.objects.tree(commit.tree)
    check_named(expected, found, what=f"commit {commit.id[:12]}")
  value = merging.merge(
    repo.checkout(base.id),
    [repo.checkout(commit.id) for commit in contributing],
    method,
  )
  return named_leaves(value)


def _recipe(
  method: Any, base: str, contributing: Sequence[Commit]
) -> dict[str, Any]:
  """Returns the account of a merge; enough to compute it again."""
  import jax

  return {
    "kind": "merge",
    "spec": _plain(method.spec),
    "numbers": _plain(method.numbers),
    "base": base,
    "contributors": [commit.id for commit in contributing],
    "backend": jax.default_backend(),
    "versions": {
      name: importlib.metadata.version(name)
      for name in _VERSIONED
      if _installed(name)
    },
  }


def _installed(name: str) -> bool:
  try:
    importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return False  # run from a source tree
  return True


def _plain(value: Any) -> Any:
  """Returns a spec or numbers as JSON: arrays as nested lists."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return value.tolist()
  return value
