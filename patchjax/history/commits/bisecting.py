"""bisect: the first bad commit, in as few tests as a graph allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchjax.history.commits import graph
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit, Objects

Answer = Literal["good", "bad", "skip"]


@dataclasses.dataclass(frozen=True)
class Bisection:
  """What a bisection found.

  Attributes:
    first: the first bad commit; None if commits that could not be tested
      are in the way.
    candidates: the commits one of which is the first bad one, oldest first;
      one, unless some were skipped.
    steps: `(commit, "good" | "bad" | "skip")` of each test, in order.
  """

  first: Commit | None
  candidates: tuple[Commit, ...]
  steps: tuple[tuple[Commit, Answer], ...]

  def to_json(self) -> dict[str, Any]:
    """Returns the finding as a JSON-able dict."""
    return {
      "first": None if self.first is None else self.first.id,
      "candidates": [commit.id for commit in self.candidates],
      "steps": [
        {"commit": commit.id, "answer": answer} for commit, answer in self.steps
      ],
    }

  def __str__(self) -> str:
    if self.first is not None:
      return f"{self.first.id[:12]} is the first bad commit: {self.first.title}"
    listed = [f"  {c.id[:12]} {c.title}" for c in self.candidates]
    return "\n".join(
      ["the first bad commit could be any of these; the rest was skipped:"]
      + listed
    )


def bisect(
  repo: Repo,
  good: str | Sequence[str],
  bad: str,
  test: Callable[[Any, Commit], bool | None],
  *,
  like: Any = None,
  only: Any = None,
  load: bool = True,
  progress: Callable[[int, int, Commit], None] | None = None,
) -> Bisection:
  """Finds the commit that made a good version bad.

  As in git: of the commits that lead to `bad` and not to `good`, the one is
  tested that splits them best, merges and side branches included, until one
  is left: about log2 of their number.

  Args:
    repo: the repository.
    good: a ref known to be good, or several.
    bad: a ref known to be bad; it is not tested.
    test: `(params, commit) -> good`: True, False, or None for a version that
      cannot be tested.
    like: how `params` are checked out, see `Repo.checkout`.
    only: which leaves of them, see `Repo.checkout`.
    load: False gives `test` the repository instead of parameters.
    progress: called before each test with the number of tests made, about
      how many more there will be, and the commit.

  Returns:
    The first bad commit, and the tests that showed it.

  Raises:
    RepositoryError: if `bad` leads to `good`, or the good and the bad version
      come from one that is bad: then good was mended, and nothing broke.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   for i in range(9):
    ...     params = {"w": np.float32([i if i < 6 else np.nan])}
    ...     commit = repo.commit(params, message=f"step {i}")
    ...   def finite(params, commit):
    ...     return bool(np.isfinite(params["w"][0]))
    ...   found = repo.bisect("main~8", "main", finite)
    ...   found.first.title, len(found.steps)
    ('step 6', 3)
  """

  def ask(commit: Commit) -> Answer:
    subject = repo
    if load:
      subject = repo.checkout(commit.id, like=like, only=only)
    result = test(subject, commit)
    return "skip" if result is None else "good" if result else "bad"

  return search(repo, good, bad, ask, progress=progress)


def search(
  repo: Repo,
  good: str | Sequence[str],
  bad: str,
  ask: Callable[[Commit], Answer],
  *,
  progress: Callable[[int, int, Commit], None] | None = None,
) -> Bisection:
  """Bisects with a test that is given the commit alone; see `bisect`.

  Args:
    repo: the repository.
    good: see `bisect`.
    bad: see `bisect`.
    ask: `(commit) -> "good" | "bad" | "skip"`.
    progress: see `bisect`.
  """
  objects = repo.objects
  goods = [repo.resolve(g) for g in ([good] if isinstance(good, str) else good)]
  end = repo.resolve(bad)
  steps: list[tuple[Commit, Answer]] = []

  def tested(name: str, left: int) -> Answer:
    commit = objects.commit(name)
    if progress is not None:
      progress(len(steps), left, commit)
    steps.append((commit, ask(commit)))
    return steps[-1][1]

  for start in _before(goods, end, objects):
    # The good version is on a side branch: is what both came from good?
    answer = tested(start, 1)
    if answer == "bad":
      raise RepositoryError(
        f"{repo.refs.describe(start)} is bad, and what is good came from it: "
        "nothing broke, something was mended; exchange good and bad, and test "
        "for the contrary"
      )
    if answer == "good":
      goods.append(start)
  parents = {
    commit.id: objects.parents(commit.id)
    for commit in graph.walk([end], objects, without=goods)
  }  # children first
  if end not in parents:
    raise RepositoryError(
      f"{repo.refs.describe(end)} is said to be bad, and what is good was made "
      "from it; are good and bad exchanged?"
    )
  skipped: set[str] = set()
  while True:
    best = _best(parents, end, skipped)
    if best is None:
      break
    answer = tested(best, max(math.ceil(math.log2(len(parents))) - 1, 0))
    behind = _behind(best, parents)
    if answer == "skip":
      skipped.add(best)
    elif answer == "bad":
      end = best
      parents = {name: ps for name, ps in parents.items() if name in behind}
    else:
      parents = {name: ps for name, ps in parents.items() if name not in behind}
  left = tuple(objects.commit(name) for name in reversed(parents))
  return Bisection(left[0] if len(left) == 1 else None, left, tuple(steps))


def _before(goods: Sequence[str], end: str, objects: Objects) -> Iterator[str]:
  """Yields what good and bad versions come from, if not a good one itself."""
  for good in goods[:]:
    for base in graph.merge_bases([good, end], objects):
      if base not in goods and base != end:
        yield base


def _best(
  parents: dict[str, tuple[str, ...]], end: str, skipped: Collection[str]
) -> str | None:
  """The candidate that halves the others best; None if none can be tested."""
  counts: dict[str, int] = {}  # of candidates that lead to each, and itself
  best, most = None, 0
  for name in reversed(parents):  # parents first
    inside = [parent for parent in parents[name] if parent in parents]
    if len(inside) > 1:
      counts[name] = len(_behind(name, parents))
    else:
      counts[name] = 1 + sum(counts[parent] for parent in inside)
    if name == end or name in skipped:
      continue
    split = min(counts[name], len(parents) - counts[name])
    if split > most:
      best, most = name, split
  return best


def _behind(name: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
  """A candidate, and the candidates before it."""
  seen: set[str] = set()
  stack = [name]
  while stack:
    at = stack.pop()
    if at in parents and at not in seen:
      seen.add(at)
      stack += parents[at]
  return seen
