"""revert: the value that a history would have without one of its commits."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph
from patchjax.history.storage.refs import HEADS
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.arrays.values import Values
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit
  from patchjax.trees.digest import Entry

Overlay = dict[str, "Entry | None"]
"""What is otherwise in a version without the commit; None for no such leaf."""


def revert(
  repo: Repo,
  ref: str = "main",
  *,
  branch: str = "main",
  mainline: int | None = None,
  method: Any = None,
  message: str | None = None,
  author: str | None = None,
  time: datetime.datetime | float | None = None,
) -> str:
  """Undoes a commit of a branch with a new commit, and returns its id.

  The value is that of the history without the commit. What came after it is
  done again, from commit to commit, where that matters:

  - Reverting the tip gives back the bits of its parent.
  - A leaf that no later commit touched gets the bits it had before, and so
    does every entry that no later commit touched.
  - A patch that was submitted later is applied again, by the pinned
    evaluation; a later merge is computed again from its recipe, if what its
    method saw is different now. The result is to the bit that of a history in
    which the commit was never made.
  - An entry that a later commit set, and that is no patch, was made from a
    value that is gone: that is a conflict that lists the leaves, or for
    `method` to decide.

  Args:
    repo: the repository.
    ref: the commit to undo.
    branch: the branch to commit to, which must contain it.
    mainline: for a merge commit, the number of the parent (from 1) to go
      back to.
    method: how entries that later commits set are merged, from the value
      before the later commit: `patchjax.merging.task_arithmetic()` adds that
      commit's difference to what there is without the reverted one, in
      float32 and rounded once.
    message: by default says what was reverted.
    author: by whom; by default as for `commit`.
    time: when; by default now.

  Returns:
    The id of the new commit.

  Raises:
    ConflictError: lists the leaves that a later commit set, and that commit.
    RepositoryError: if the branch does not contain the commit, the commit is
      a merge without `mainline` or the first of its history, nothing is left
      of it, or a later merge cannot be computed again to the bit here.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> from patchjax.history import Repo
    >>> start = {"w": np.float32([1, 1]), "b": np.float32([0])}
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit(start, message="start")
    ...   wrong = repo.commit({**start, "w": start["w"] * 2}, message="wrong")
    ...   more = {"w": np.float32([3, 3]), "b": start["b"]}
    ...   patch = pj.diff(repo.checkout(), more, only="w")
    ...   third = repo.commit(patch, message="add one")
    ...   fourth = repo.revert(wrong)
    ...   repo.checkout()["w"].tolist(), repo.show().title
    ([2.0, 2.0], 'Revert "wrong"')
  """
  from patchjax.history.arrays.values import Values
  from patchjax.history.commits import committing, picking, recipes
  from patchjax.history.commits.rebasing import parent_of

  objects = repo.objects
  commit = repo.show(ref)
  parent = parent_of(repo, commit, mainline)
  tip = repo.refs.must(HEADS, branch)
  if not graph.is_ancestor(commit.id, tip, objects):
    raise RepositoryError(
      f"branch {branch!r} does not contain {commit.id[:12]} ({commit.title}): "
      "there is nothing to undo"
    )
  values = Values(repo)
  changes = picking.changes_of(values, parent.tree, commit.tree)
  without: dict[str, Overlay] = {
    commit.id: {name: before for name, (before, _) in changes.items()}
  }
  later = graph.walk([tip], objects, without=commit.parents)
  for each in list(later)[::-1]:
    if each.id != commit.id and any(without.get(p) for p in each.parents):
      without[each.id] = _again(values, each, without, method)
  ours = repo.tree(tip)
  result = picking.put(ours, without.get(tip, {}))
  if result == ours:
    raise RepositoryError(
      f"nothing is left of {commit.id[:12]} ({commit.title}) in {branch!r}: "
      "there is nothing to commit"
    )
  asked = {} if method is None else {"method": recipes.of_method(method)}
  return committing.record(
    repo,
    values.named(result),
    ours,
    committing.Draft(
      branch=branch,
      expected=tip,
      parents=(tip,),
      message=message
      or f'Revert "{commit.title}"\n\nThis reverts commit {commit.id}.',
      author=author,
      time=time,
      recipe={
        "kind": "revert",
        "commit": commit.id,
        "to": parent.id,
        **asked,
      },
      verb="revert",
    ),
  )


def _again(
  values: Values,
  commit: Commit,
  without: Mapping[str, Overlay],
  method: Any,
) -> Overlay:
  """Returns what is otherwise in a commit if it is so in its parents."""
  if len(commit.parents) != 1:
    if (commit.recipe or {}).get("kind") == "merge":
      return _merged_again(values, commit, without)
    return _joined_again(values, commit, without, method)
  (parent,) = commit.parents
  tree = values.repo.objects.commit(parent).tree
  return _picked_again(values, commit, tree, without[parent], method)


def _picked_again(
  values: Values, commit: Commit, parent: str, before: Overlay, method: Any
) -> Overlay:
  """What a commit makes of another version of its parent."""
  from patchjax.history.commits import picking

  changes = picking.changes_of(values, parent, commit.tree)
  touched = {name: changes[name] for name in before if name in changes}
  picked, _ = picking.pick(values, touched, before, commit, method=method)
  # What the picking leaves as it is here, the commit may have otherwise.
  result = {**before, **picked}
  found = {name: pair[1] for name, pair in touched.items()}
  return {
    name: entry
    for name, entry in result.items()
    if name not in found or found[name] != entry
  }


def _joined_again(
  values: Values,
  commit: Commit,
  without: Mapping[str, Overlay],
  method: Any,
) -> Overlay:
  """A merge without a recipe: leaf by leaf, from the parent it came from."""
  objects = values.repo.objects
  found = objects.tree(commit.tree)
  rest: dict[str, Overlay] = {}
  result: Overlay = {}
  sides = {p: objects.tree(objects.commit(p).tree) for p in commit.parents}
  for name in {n for p in commit.parents for n in without.get(p, {})}:
    came = [p for p in commit.parents if sides[p].get(name) == found.get(name)]
    touched = [p for p in commit.parents if name in without.get(p, {})]
    if not came:
      rest.setdefault(touched[0], {})[name] = without[touched[0]][name]
    elif came[0] in touched:
      result[name] = without[came[0]][name]
  for parent, before in rest.items():
    tree = objects.commit(parent).tree
    result |= _picked_again(values, commit, tree, before, method)
  return result


def _merged_again(
  values: Values, commit: Commit, without: Mapping[str, Overlay]
) -> Overlay:
  """A merge with a recipe, computed from what its parents are instead."""
  from patchjax.history.commits import merges, picking, recipes

  recipe = commit.recipe or {}
  objects = values.repo.objects
  found = objects.tree(commit.tree)
  one_sided = recipe.get("one_sided", "take")

  def planned(changed: bool) -> merges.Plan:
    def leaves(name: str) -> dict[str, Entry]:
      tree = objects.tree(objects.commit(name).tree)
      return picking.put(tree, without.get(name, {})) if changed else tree

    base = leaves(recipe["base"])
    sides = {parent: leaves(parent) for parent in commit.parents}
    # One that equals the base contributes nothing.
    return merges.plan(
      base, {p: side for p, side in sides.items() if side != base}, one_sided
    )

  then, now = planned(False), planned(True)
  if (then.base, then.sides) == (now.base, now.sides):
    # The method would see the same: what it gave is what was stored.
    result = now.taken | {name: found[name] for name in now.base}
  else:
    method = recipes.method_of(recipe)
    before = merges.run(values, then.base, then.sides, method)
    other = [name for name in before if before[name] != found.get(name)]
    if other:
      raise RepositoryError(
        f"the merge {commit.id[:12]} ({commit.title}) came later and must be "
        f"computed again, but gives other bits here in {len(other)} leaves "
        f"({', '.join(other[:5])}); `replay` says what has changed. Revert "
        "where it was made, or revert the merge first"
      )
    result = now.taken | merges.run(values, now.base, now.sides, method)
  return {
    name: result.get(name)
    for name in {**found, **result}
    if result.get(name) != found.get(name)
  }
