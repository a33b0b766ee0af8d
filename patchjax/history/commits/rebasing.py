"""cherry_pick and rebase: what commits did, done to other versions."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history.commits import graph
from patchjax.history.storage import reflog
from patchjax.history.storage.refs import HEADS
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit
  from patchjax.trees.digest import Entry


def cherry_pick(
  repo: Repo,
  ref: str,
  *,
  branch: str = "main",
  mainline: int | None = None,
  method: Any = None,
  message: str | None = None,
  author: str | None = None,
  time: datetime.datetime | float | None = None,
) -> str:
  """Does what a commit did to the tip of a branch, and commits that.

  A leaf that the branch has as it was before the commit comes out as the
  commit made it, to the bit. A patch that was submitted is applied again, by
  the pinned evaluation. A leaf that was changed otherwise on the branch is
  put together entry by entry, to the bit, where no entry was changed by both;
  where some was, a `method` says what to do, and without one it is a conflict
  that lists the leaves: adding up two fine-tunes is a decision about numbers,
  not about files.

  Args:
    repo: the repository.
    ref: the commit.
    branch: the branch to commit to.
    mainline: for a merge commit, the number of the parent (from 1) that it
      is seen as a change of.
    method: how entries that both changed are merged, from the value before
      the commit: `patchjax.merging.task_arithmetic()` adds the commit's
      difference to the branch's value, in float32 and rounded once.
    message: by default the commit's.
    author: by default the commit's.
    time: by default the commit's.

  Returns:
    The id of the new commit.

  Raises:
    ConflictError: lists the leaves that both changed.
    RepositoryError: if the commit changes nothing on the branch, is a merge
      without `mainline`, or is the first of its history.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> start = {"a": np.float32([0, 0]), "b": np.float32([0])}
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit(start, message="start")
    ...   _ = repo.branch("fix")
    ...   fixed = {**start, "a": np.float32([0, 5])}
    ...   fix = repo.commit(fixed, message="fix", branch="fix")
    ...   tuned = {**start, "a": np.float32([1, 0])}
    ...   second = repo.commit(tuned, message="tune")
    ...   third = repo.cherry_pick(fix)
    ...   repo.checkout()["a"].tolist(), repo.show().title
    ([1.0, 5.0], 'fix')
  """
  from patchjax.history.arrays.values import Values
  from patchjax.history.commits import committing, picking

  commit = repo.show(ref)
  parent = parent_of(repo, commit, mainline)
  tip = repo.refs.must(HEADS, branch)
  ours = repo.tree(tip)
  values = Values(repo)
  picked, plain = picking.pick(
    values,
    picking.changes_of(values, parent.tree, commit.tree),
    ours,
    commit,
    method=method,
  )
  result = picking.put(ours, picked)
  if result == ours:
    raise RepositoryError(
      f"{branch!r} has all that {commit.id[:12]} ({commit.title}) changed: "
      "there is nothing to commit"
    )
  return committing.record(
    repo,
    values.named(result),
    ours,
    committing.Draft(
      branch=branch,
      expected=tip,
      parents=(tip,),
      message=commit.message if message is None else message,
      author=author or commit.author,
      time=commit.when if time is None else time,
      recipe=_recipe(commit, method),
      patch=_patch(repo, commit, repo.show(tip).tree) if plain else None,
      verb="cherry-pick",
    ),
  )


def parent_of(repo: Repo, commit: Commit, mainline: int | None) -> Commit:
  """Returns the parent that a commit is seen as a change of.

  Args:
    repo: the repository.
    commit: the commit.
    mainline: for a merge, the number of the parent, from 1.

  Raises:
    RepositoryError: if there is no such parent, or none is named of several.
  """
  count = len(commit.parents)
  what = f"commit {commit.id[:12]} ({commit.title})"
  if not count:
    raise RepositoryError(
      f"{what} is the first of its history: it changed nothing"
    )
  if count > 1 and mainline is None:
    raise RepositoryError(
      f"{what} is a merge of {count} versions: say which parent it is a "
      f"change of, mainline=1 to {count} (1 is the branch merged into)"
    )
  if mainline is not None and not 1 <= mainline <= count:
    raise RepositoryError(
      f"{what} has {count} parent(s), found mainline={mainline}"
    )
  return repo.objects.commit(commit.parents[(mainline or 1) - 1])


@dataclasses.dataclass(frozen=True)
class _Version:
  """A version on the way: its commit, the id of its value, its leaves."""

  commit: str
  tree: str
  leaves: Mapping[str, Entry]


def rebase(
  repo: Repo,
  branch: str,
  onto: str = "main",
  *,
  method: Any = None,
  author: str | None = None,
) -> str:
  """Puts the commits of a branch on top of another version.

  Each commit that `onto` does not have is done again, in order, as
  `cherry_pick` does it: bits where nobody else changed them, submitted
  patches by the pinned evaluation, and entries that both changed by `method`
  or not at all. Author, message and time stay. A commit whose change `onto`
  has already is left out. The branch moves once, at the end: a conflict
  leaves it where it was.

  Merges become a line, as in git: a merge that took every leaf from one of
  its parents disappears. One whose method computed new numbers would lose
  them, so it is refused: merge instead.

  Args:
    repo: the repository.
    branch: the branch to move.
    onto: the version to put its commits on.
    method: see `cherry_pick`.
    author: who the reflog says moved the branch; by default as for `commit`.

  Returns:
    The id of the new tip.

  Raises:
    ConflictError: lists the leaves that both sides changed, and the commit.
    RepositoryError: if there is a merge that computed something.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> start = {"a": np.float32([0]), "b": np.float32([0])}
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit(start, message="start")
    ...   _ = repo.branch("topic")
    ...   tuned = {**start, "a": np.float32([1])}
    ...   commit = repo.commit(tuned, message="a", branch="topic")
    ...   commit = repo.commit({**start, "b": np.float32([2])}, message="b")
    ...   tip = repo.rebase("topic")
    ...   [commit.title for commit in repo.log("topic")]
    ['a', 'b', 'start']
  """
  from patchjax.history.arrays.values import Values

  tip = repo.refs.must(HEADS, branch)
  start = repo.resolve(onto)
  if graph.is_ancestor(start, tip, repo.objects):
    return tip  # as in git: it is on top of it already
  commits = list(graph.walk([tip], repo.objects, without=[start]))[::-1]
  for commit in commits:
    _check_linear(repo, commit)
  shown = repo.objects.commit(start)
  values = Values(repo)
  at = _Version(start, shown.tree, repo.objects.tree(shown.tree))
  for commit in commits:
    if len(commit.parents) == 1:
      at = _again(values, commit, at, method)
  reflog.move(
    repo,
    HEADS,
    branch,
    old=tip,
    new=at.commit,
    why=f"rebase: {len(commits)} commit(s) onto {onto}",
    who=author,
  )
  return at.commit


def _again(values: Any, commit: Commit, at: _Version, method: Any) -> _Version:
  """Stores what a commit makes of another version; moves no ref."""
  from patchjax.history.commits import committing, picking

  repo = values.repo
  parent = repo.objects.commit(commit.parents[0])
  changes = picking.changes_of(values, parent.tree, commit.tree)
  picked, plain = picking.pick(
    values, changes, at.leaves, commit, method=method
  )
  leaves = picking.put(at.leaves, picked)
  if changes and leaves == at.leaves:
    return at  # it is there already
  made = committing.record(
    repo,
    values.named(leaves),
    at.leaves,
    committing.Draft(
      branch=None,
      expected=None,
      parents=(at.commit,),
      message=commit.message,
      author=commit.author,
      time=commit.when,
      recipe=_recipe(commit, method),
      patch=_patch(repo, commit, at.tree) if plain else None,
    ),
  )
  return _Version(made, repo.objects.commit(made).tree, leaves)


def _check_linear(repo: Repo, commit: Commit) -> None:
  """Refuses merges whose value is more than a choice of leaves."""
  if len(commit.parents) == 1:
    return
  what = f"commit {commit.id[:12]} ({commit.title})"
  if not commit.parents:
    raise RepositoryError(
      f"{what} is the first of a history of its own: what it is a change of "
      "is not known; merge with base= instead"
    )
  objects = repo.objects
  sides = [objects.tree(objects.commit(p).tree) for p in commit.parents]
  found = objects.tree(commit.tree)
  computed = [
    name
    for name, entry in found.items()
    if entry not in [side.get(name) for side in sides]
  ]
  if computed:
    raise RepositoryError(
      f"{what} is a merge that computed {len(computed)} leaves "
      f"({', '.join(computed[:5])}{', ...' * (len(computed) > 5)}); putting "
      "its parents in a line would lose them: merge the branch instead, or "
      "cherry_pick its commits"
    )


def _recipe(commit: Commit, method: Any) -> dict[str, Any]:
  """How a picked value came about; what the commit's own recipe said stays."""
  from patchjax.history.commits import recipes

  kept = dict(commit.recipe or {})
  if kept.get("kind", "merge") == "merge":
    kept = {"kind": "cherry-pick"}
  asked = {} if method is None else {"method": recipes.of_method(method)}
  return {**kept, "picked": commit.id, **asked}


def _patch(repo: Repo, commit: Commit, tree: str) -> str | None:
  """The patch file of a commit, made out for another base."""
  from patchjax.history.commits import proposals

  if commit.patch is None:
    return None
  patch = repo.patch_of(commit.id)
  if patch.base == tree:
    return commit.patch
  return repo.objects.write(proposals.file_of(patch.replace(base=tree)))
