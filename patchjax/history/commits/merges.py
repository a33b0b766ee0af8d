"""Merging versions: their merge base, their contributions, the commit."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchjax.history.commits import graph
from patchjax.history.storage import reflog
from patchjax.history.storage.refs import HEADS
from patchjax.trees.errors import ConflictError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.arrays.values import Leaves, Values
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

OneSided = Literal["take", "method"]


def merge_base(repo: Repo, *refs: str) -> str:
  """Returns the id of the best common ancestor of versions.

  Args:
    repo: the repository.
    *refs: two or more refs.

  Raises:
    RepositoryError: if there is none, or more than one.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": np.zeros(2)}, message="start")
    ...   for name in ("a", "b"):
    ...     commit = repo.branch(name)
    ...     commit = repo.commit({"w": np.ones(2)}, message=name, branch=name)
    ...   repo.merge_base("a", "b") == first
    True
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
  one_sided: OneSided = "take",
) -> str:
  """Merges versions into a branch and returns the commit id.

  What each version contributes is its difference to the merge base; one that
  equals the base contributes nothing, and is not counted in means.

  As in git, a change that collides with no other is taken as it is, to the
  bit and with no questions: a leaf that one version changed, added or removed
  (or several, to the same bits) comes from there, of whatever dtype. The
  method sees only leaves that were changed in different ways; a threshold
  over the whole tree (`ties`) is one over these leaves, and every
  contributor counts in them, as in `patchjax.merge`. With
  `one_sided="method"` every floating point leaf that was changed goes through
  the method, as if the models had been merged without a history: scales,
  trims and means then act on one-sided changes too.

  As in git too, refs that the branch contains already are skipped, and where
  only one version is left to contribute, the branch moves on to it. The merge
  commit stores its value; how it was computed (spec, numbers and keys,
  digests of statistics, base, contributors, versions) is kept as its recipe,
  and `replay` computes it again.

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
    fast_forward: False makes a merge commit where the branch could move on.
    one_sided: "take", or "method": what becomes of leaves that were changed
      in one way only.

  Returns:
    The id of the new tip.

  Raises:
    RepositoryError: if there is no merge base, or more than one.
    ConflictError: if changes collide that cannot be merged (a leaf removed
      here and changed there, other shapes, integers); lists every leaf. Or if
      somebody else moved the branch in the meantime.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> from patchjax.history import Repo
    >>> start = {"a": np.float32([0]), "b": np.float32([0])}
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit(start, message="start")
    ...   for name, tuned in {"x": {"a": 2, "b": 4}, "y": {"a": 4}}.items():
    ...     commit = repo.branch(name)
    ...     leaves = {k: np.float32([v]) for k, v in tuned.items()}
    ...     commit = repo.commit(start | leaves, message=name, branch=name)
    ...   commit = repo.merge("main", ["x", "y"], method=pj.merging.linear())
    ...   {name: leaf.tolist() for name, leaf in repo.checkout().items()}
    {'a': [3.0], 'b': [4.0]}
  """
  from patchjax.history.arrays.values import Values
  from patchjax.history.commits import committing, recipes

  refs = [refs] if isinstance(refs, str) else refs
  objects = repo.objects
  tip = repo.refs.must(HEADS, target)
  tips = contributing(repo, tip, refs)
  if len(tips) == 1:
    return tip  # everything is contained already
  if (
    fast_forward and len(tips) == 2 and graph.is_ancestor(tip, tips[1], objects)
  ):
    why = f"merge {', '.join(refs)}: fast-forward"
    reflog.move(repo, HEADS, target, old=tip, new=tips[1], why=why, who=author)
    return tips[1]
  base_id = merge_base(repo, *tips) if base is None else repo.resolve(base)
  start = objects.commit(base_id)
  sides = [c for c in map(objects.commit, tips) if c.tree != start.tree]
  values = Values(repo)
  entries = merged(
    values,
    objects.tree(start.tree),
    {commit.id: objects.tree(commit.tree) for commit in sides},
    method,
    one_sided,
  )
  return committing.record(
    repo,
    values.named(entries),
    objects.tree(objects.commit(tip).tree),
    committing.Draft(
      branch=target,
      expected=tip,
      parents=tuple(tips),
      message=message or f"Merge {', '.join(refs)} into {target}",
      author=author,
      time=time,
      recipe=recipes.of_merge(
        method, base_id, [commit.id for commit in sides], one_sided
      ),
      verb="merge",
    ),
  )


def contributing(repo: Repo, tip: str, refs: Sequence[str]) -> list[str]:
  """Returns the parents of a merge: the tip, and what it lacks.

  Args:
    repo: the repository.
    tip: id of the commit that is merged into.
    refs: what is merged.
  """
  tips = [tip]
  for ref in refs:
    commit = repo.resolve(ref)
    if commit not in tips and not graph.is_ancestor(commit, tip, repo.objects):
      tips.append(commit)
  return tips


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a merge takes as it is, and what it leaves to the method.

  Attributes:
    taken: leaves that changed in one way, or not at all.
    base: the others, in the base.
    sides: the others, in each contributor.
  """

  taken: Leaves
  base: Leaves
  sides: tuple[Leaves, ...]


def plan(
  base: Mapping[str, Entry],
  sides: Mapping[str, Mapping[str, Entry]],
  one_sided: OneSided = "take",
) -> Plan:
  """Returns what becomes of each leaf in a merge.

  Args:
    base: leaves of the base.
    sides: `{commit id: leaves}` of the contributors.
    one_sided: see `merge`.

  Raises:
    ConflictError: lists the leaves whose changes collide.
  """
  taken: Leaves = {}
  colliding, bad = [], []
  for name in sorted(set(base).union(*sides.values())):
    old = base.get(name)
    found = [side.get(name) for side in sides.values()]
    new = set(found) - {old}
    why = _unmergeable(old, found)
    if not why and (len(new) > 1 or (new and one_sided == "method")):
      colliding.append(name)
    elif len(new) > 1:
      bad.append(f"  {name}: {why}; {_spell(old, sides, name)}")
    elif (only := next(iter(new), old)) is not None:
      taken[name] = only
  if bad:
    raise ConflictError(
      f"{len(bad)} leaf/leaves were changed in ways that cannot be merged:\n"
      + "\n".join(bad)
      + "\nto mend it: make them equal in a commit to one of the branches"
    )
  return Plan(
    taken,
    {name: base[name] for name in colliding},
    tuple({n: side[n] for n in colliding} for side in sides.values()),
  )


def merged(
  values: Values,
  base: Mapping[str, Entry],
  sides: Mapping[str, Mapping[str, Entry]],
  method: Any,
  one_sided: OneSided = "take",
) -> Leaves:
  """Returns the leaves of a merged value; new ones are put into `values`.

  Args:
    values: reads and keeps leaves.
    base: leaves of the base.
    sides: `{commit id: leaves}` of the contributors.
    method: a merge method.
    one_sided: see `merge`.

  Raises:
    ConflictError: lists the leaves whose changes collide.
  """
  planned = plan(base, sides, one_sided)
  return planned.taken | run(values, planned.base, planned.sides, method)


def is_merged(leaf: Entry) -> bool:
  """Returns whether a leaf has task vectors: real floating point numbers.

  Args:
    leaf: its entry.
  """
  from patchjax.trees.dtypes import KINDS

  kind = KINDS.get(leaf.dtype)
  return kind is not None and kind.floating and kind.words == 1


def _unmergeable(
  old: Entry | None, found: Sequence[Entry | None]
) -> str | None:
  """Why a leaf has no task vectors; None if it has."""
  if old is None:
    return "added in different ways"
  if None in found:
    return "removed here and changed there"
  if any((e.dtype, e.shape) != (old.dtype, old.shape) for e in found if e):
    return "of another dtype or shape"
  return None if is_merged(old) else f"{old.dtype} has no mean"


def _spell(
  old: Entry | None, sides: Mapping[str, Mapping[str, Entry]], name: str
) -> str:
  parts = []
  for commit, side in sides.items():
    found = side.get(name)
    if found == old:
      continue
    what = "removed" if found is None else f"{found.dtype}{list(found.shape)}"
    parts.append(f"{commit[:12]}: {what}")
  return ", ".join(parts)


def run(
  values: Values,
  base: Mapping[str, Entry],
  sides: Sequence[Mapping[str, Entry]],
  method: Any,
) -> Leaves:
  """Runs a method on leaves that all versions have; see `merged`.

  Args:
    values: reads and keeps leaves.
    base: leaves of the base.
    sides: those of each contributor.
    method: a merge method.
  """
  if not base:
    return {}
  from patchjax import merging
  from patchjax.trees.names import named_leaves, nested

  def tree(side: Mapping[str, Entry]) -> Any:
    return nested(values.arrays(side))

  result = merging.merge(tree(base), [tree(side) for side in sides], method)
  return {name: values.put(x) for name, x in named_leaves(result).items()}
