"""Checkpoints of a training run, as versions: kept, dropped, resumed.

Each saved step is a commit with a tag `steps/<branch>/<step>`, and the branch
is at the newest. Which steps stay is decided anew at every save; a step that
does not loses its tag, and `Repo.gc` takes what only it held.

For that to be exact nothing that stays may follow, or be stored as a
difference to, what goes. So a step's parent is not the step before it, but
the last one that is kept for good (a multiple of `keep_every`), else the
version that the branch was at when the run began:

    base -- 1000 -- 2000 -- 3000        kept for good: the chain
              \\       \\       \\
               1700    2600    3100      kept for now: twigs; main is at 3100

`log`, `diff` and `blame` of the branch follow the chain and its newest twig;
any kept step is a version like all others (`steps/main/2600`). No commit is
ever rewritten, so ids stay. Moves of these refs are not logged: a reflog
would keep for 90 days what retention drops.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import operator
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from patchjax.history import steps
from patchjax.history.arrays import processes
from patchjax.history.retention import Retention, check_count
from patchjax.history.storage.refs import HEADS, TAGS, check_name
from patchjax.trees.errors import (
  ConflictError,
  PatchjaxError,
  RefNotFoundError,
)

if TYPE_CHECKING:
  import types

  from patchjax.history.arrays.pending import PendingCommit
  from patchjax.history.repo import Repo

  _Running = tuple[PendingCommit, concurrent.futures.Future[None]]

GRACE = datetime.timedelta(hours=1)

_REST = 10  # between two collections, times what one takes


class Checkpointer:
  """Commits the state of a training loop every so many steps.

  What Orbax's `CheckpointManager` does, with a history: equal leaves are
  stored once, every leaf is verified when it is read, and any step can be
  compared, merged and released. Killed at any moment, it leaves whole steps
  only; the next process starts at `latest_step`.

  Attributes:
    repo: the repository.
    branch: the branch that is at the newest step.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   with Checkpointer(repo, every=10, keep_last=2) as saver:
    ...     for step in range(1, 51):
    ...       state = {"w": np.float32([step]), "step": step}
    ...       saved = saver.save(step, state, metrics={"loss": 1 / step})
    ...   saver.all_steps, saver.restore(state)["step"]
    ((40, 50), 50)
  """

  def __init__(
    self,
    repo: Repo,
    *,
    branch: str = "main",
    every: int = 1,
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: tuple[str, Literal["min", "max"]] | None = None,
    asynchronous: bool = True,
    grace: datetime.timedelta | float = GRACE,
    author: str | None = None,
  ):
    """Starts, or goes on with, the run of a branch.

    A step is kept if any of the three rules keeps it; without rules all are.

    Args:
      repo: the repository.
      branch: the branch to move; created by the first step. Runs that share a
        repository have a branch each.
      every: `save` stores steps that are multiples of this.
      keep_last: how many of the newest steps to keep.
      keep_every: keep steps that are multiples of this, for good.
      keep_best: a metric, and whether "min" or "max" is better: keep the step
        where it is best.
      asynchronous: store in the background. `save` returns once it has
        copied the values, which may be donated then; what goes wrong is
        raised by the next `save`, `wait` or `restore`. (Several processes
        call these together; the first one moves the refs, and another sees
        in `all_steps` what it has done after one of these calls.)
      grace: see `Repo.gc`, which runs after a step is dropped, for a tenth of
        the time at most, and at the end. What was dropped takes space for this
        long; 0 gives it back at once, and is for a repository that nobody else
        writes to in the meantime.
      author: by whom; by default as for `Repo.commit`.

    Raises:
      ValueError: if a number is not positive, or a rule is none.
    """
    check_name(branch)
    check_count("every", every)
    self._rules = Retention(last=keep_last, every=keep_every, best=keep_best)
    self.repo = repo
    self.branch = branch
    self._every = every
    self._grace = grace
    self._author = author
    self._asynchronous = asynchronous
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpointer")
    # Whether something was dropped that was not collected, when the last
    # collection ended, and how long it took.
    self._owed, self._collected, self._took = False, 0.0, 0.0
    # At most one: a commit, and what follows it. Whoever forgets to wait is
    # told when the process ends.
    self._running: list[_Running] = []
    weakref.finalize(self, _tell, self._running)

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    self.close()

  def close(self) -> None:
    """Waits for what is being stored; raises what went wrong."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._collect()

  def wait(self) -> None:
    """Waits until the last step is stored; raises what went wrong."""
    if self._running:
      pending, published = self._running.pop()
      pending.result()
      # Of several processes one moves the refs; all know when it has.
      processes.together(published.result)

  @property
  def all_steps(self) -> tuple[int, ...]:
    """The steps that are kept, in order."""
    self._settle()
    return tuple(self._steps())

  @property
  def latest_step(self) -> int | None:
    """The newest step; None before the first."""
    return max(self.all_steps, default=None)

  @property
  def best_step(self) -> int | None:
    """The kept step with the best metric; None if none has it.

    Raises:
      ValueError: if the checkpointer was not told what is best.
    """
    self._settle()
    return self._rules.best_of(self._steps(), self._metrics)

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the metrics of a kept step.

    Args:
      step: the step.

    Raises:
      RefNotFoundError: if it is not kept.
    """
    self._settle()
    return self._metrics(step)

  def save(
    self,
    step: int,
    state: Any,
    *,
    metrics: Mapping[str, Any] | None = None,
    force: bool = False,
  ) -> bool:
    """Stores the state after a step, if it is one to store.

    Args:
      step: its number; steps only go up.
      state: what `Repo.commit` takes: parameters, optimizer state, PRNG keys,
        numbers, `Record`s of data iterators.
      metrics: numbers by name, kept in the commit.
      force: store it though it is no multiple of `every`: the last one.

    Returns:
      Whether it is (being) stored.

    Raises:
      ConflictError: if this step, or a later one, is stored already; or if
        somebody else moved the branch.
    """
    step = operator.index(step)
    if step % self._every and not force:
      return False
    self.wait()
    message, recipe = steps.describe(self.branch, step, metrics or {})
    tip, base = processes.first(lambda: self._start_of(step))
    pending = self.repo.commit_async(
      state,
      message=message,
      branch=None,
      parents=[base] if base else [],
      author=self._author,
      recipe=recipe,
    )
    published = self._worker.submit(self._publish, step, pending, tip)
    self._running.append((pending, published))
    if not self._asynchronous:
      self.wait()
    return True

  def restore(
    self,
    like: Any = None,
    *,
    step: int | Literal["latest", "best"] = "latest",
    only: Any = None,
  ) -> Any:
    """Returns the state of a kept step.

    Args:
      like: see `Repo.checkout`: the state of a run that has not begun, or
        `ShapeDtypeStruct`s.
      step: its number, or the latest, or the best.
      only: see `Repo.checkout`.

    Raises:
      RefNotFoundError: if there is no such step.
      MismatchError: if `like` has other leaves; lists every one.
    """
    self.wait()
    if step == "latest":
      number = self.latest_step
    elif step == "best":
      number = self.best_step
    elif isinstance(step, str):
      raise ValueError(f'step={step!r}: expected a number, "latest" or "best"')
    else:
      number = operator.index(step)
    if number is None:
      raise RefNotFoundError(
        f"branch {self.branch!r} of {self.repo.path} has no {step} step: "
        "nothing was saved yet"
        + (" with that metric" if step == "best" else "")
      )
    return self.repo.checkout(self._commit_of(number), like=like, only=only)

  def _settle(self) -> None:
    """Waits for this process alone; what went wrong is raised later."""
    for _, published in self._running:
      published.exception()

  def _start_of(self, step: int) -> tuple[str | None, str | None]:
    """Where the branch is, and what a new step follows."""
    latest = max(self._steps(), default=None)
    if latest is not None and step <= latest:
      tag = steps.tag_of(self.branch, latest)
      raise ConflictError(
        f"step {step} of branch {self.branch!r}: expected one after {latest}, "
        "which is stored already; to train on from an earlier step, give the "
        f"run a branch of its own: repo.branch(name, at={tag!r}), "
        "Checkpointer(repo, branch=name)"
      )
    tip = self.repo.refs.get(HEADS, self.branch)
    return tip, self._base(tip)

  def _steps(self) -> list[int]:
    return steps.all_of(self.repo, self.branch)

  def _commit_of(self, step: int) -> str:
    return steps.commit_of(self.repo, self.branch, step)

  def _metrics(self, step: int) -> dict[str, float]:
    return steps.metrics_of(self.repo.objects.commit(self._commit_of(step)))

  def _base(self, tip: str | None) -> str | None:
    """The version that the next step follows: the last that stays for good."""
    while tip is not None:
      commit = self.repo.objects.commit(tip)
      step = steps.number_of(commit, self.branch)
      if step is None or self._rules.for_good(step):
        break
      tip = commit.parents[0] if commit.parents else None
    return tip

  def _publish(
    self, step: int, pending: PendingCommit, tip: str | None
  ) -> None:
    """Names a step once it is stored, and lets go of those not kept."""
    commit = pending.part()
    if commit is None:
      return  # another process moves refs
    # Tag first: a process killed in between has lost nothing, and the next
    # one finds its latest step by the tags.
    refs = self.repo.refs
    tag = steps.tag_of(self.branch, step)
    refs.move(TAGS, tag, old=None, new=commit)
    refs.move(HEADS, self.branch, old=tip, new=commit)
    there = self._steps()
    dropped = set(there) - self._rules.kept(there, self._metrics)
    for each in sorted(dropped):
      tag = steps.tag_of(self.branch, each)
      refs.move(TAGS, tag, old=self._commit_of(each), new=None)
    self._owed = self._owed or bool(dropped)
    # A collection looks at the whole repository, however large that is.
    if time.monotonic() - self._collected >= _REST * self._took:
      self._collect()

  def _collect(self) -> None:
    """Gives back the space of what was dropped since the last time."""
    if not self._owed:
      return
    start = time.monotonic()
    try:
      self.repo.gc(grace=self._grace)
    except PatchjaxError as error:
      warnings.warn(
        f"the steps are stored, but space was not given back: {error}",
        stacklevel=2,
      )
    self._owed = False
    self._collected = time.monotonic()
    self._took = self._collected - start


def _tell(running: list[_Running]) -> None:
  """Says that a step was not stored, if nobody waited for it."""
  for _, published in running:
    error = published.exception()
    if error is not None:
      print(
        "patchjax: the last step of a Checkpointer was not stored "
        f"({type(error).__name__}: {error}); call close(), or use it as a "
        "context manager",
        file=sys.stderr,
      )
