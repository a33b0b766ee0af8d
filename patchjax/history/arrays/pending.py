"""Commits in the background: captured at once, written while work goes on.

What is committed is copied to the host before `commit_async` returns; leaves
that this repository is known to hold are not even copied. One thread writes
after the other, in the order of the calls, so that each commit follows the one
before. A commit is recorded, or not, exactly as `Repo.commit` would have it;
`result()` says which. Whoever forgets to ask is told on stderr when the
process ends.

In several processes of `jax.distributed` all call `commit_async` together, and
`result()`. What they have to exchange (digests, decisions) is exchanged before
`commit_async` returns, in step with the program's own collectives, which a
thread in the background could not be. What is left to the background needs no
collective: each process waits until Orbax has written its shards, and process
0, for which Orbax waits until all have, records the commit. Whether it did is
known to the others when they ask.
"""

from __future__ import annotations

import atexit
import datetime
import math
import sys
import threading
import time as clock
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history.arrays import processes
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

_lock = threading.Lock()
_unasked: list[PendingCommit] = []  # in the order of the calls
_begun: list[PendingCommit] = []  # the last one of several processes

_LONGEST = 1.0  # seconds between two looks at how other processes fare


class PendingCommit:
  """A commit that is being made.

  As a context manager it waits for the commit at the end of the block, and
  raises what went wrong with it.

  Attributes:
    message: the message of the commit.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> weights = {"w": np.float32([1, 2])}
    >>> with Repo.temporary() as repo:
    ...   with repo.commit_async(weights, message="start") as pending:
    ...     weights["w"][:] = 0  # captured already
    ...   repo.checkout(pending.result())["w"].tolist()
    [1.0, 2.0]
  """

  def __init__(
    self,
    message: str,
    work: Callable[[], str | None],
    stop: threading.Event | None = None,
  ):
    """Starts the work; `commit_async` makes these.

    Args:
      message: the message of the commit.
      work: does this process's part of the commit; returns its id, or None
        where another process records it.
      stop: set once the commit has failed in another process.
    """
    self.message = message
    self._work = work
    self._stop = stop
    self._index = processes.index()
    # What became of the part of this process, and of the commit.
    self._part: str | None = None
    self._fault: BaseException | None = None
    self._settled = False
    self._commit: str | None = None
    self._error: BaseException | None = None
    with _lock:
      before = _unasked[-1] if _unasked and stop is None else None
      _unasked.append(self)
    # Not a daemon: the interpreter does not end while it writes.
    self._thread = threading.Thread(
      target=self._run, args=(before,), name="commit_async"
    )
    self._thread.start()

  def _run(self, before: PendingCommit | None) -> None:
    if before is not None:
      before._thread.join()
    try:
      if self._stop is None and not threading.main_thread().is_alive():
        raise RepositoryError(
          "the process ended before the commit was begun; nothing was "
          "recorded: wait for result()"
        )
      self._part = self._work()
    except BaseException as error:  # raised by result(), or told at the end
      self._fault = error
    finally:
      del self._work  # and with it the captured value

  def done(self) -> bool:
    """Returns whether the commit was made, or has failed.

    Of several processes each answers for its own part.
    """
    return not self._thread.is_alive()

  def result(self, timeout: float | None = None) -> str:
    """Waits for the commit and returns its id.

    Of several processes all call it, in the same order; all return the id, or
    raise what went wrong in one of them.

    Args:
      timeout: seconds to wait at most; None waits as long as it takes.

    Raises:
      TimeoutError: if it is not made yet; ask again.
      PatchjaxError: what `Repo.commit` would have raised.
    """
    if not self._settle(timeout):
      raise TimeoutError(
        f"the commit {self.message!r} was not made within {timeout} seconds"
      )
    self._ask()
    if self._error is not None:
      raise self._error
    if self._commit is None:
      raise RepositoryError(
        f"process 0 alone knows whether the commit {self.message!r} was made: "
        "ask for result() before jax.distributed.shutdown()"
      )
    return self._commit

  def part(self) -> str | None:
    """Waits for what this process does; asks no other, unlike `result()`.

    Returns:
      The id of the commit, in the process that records it; elsewhere None.

    Raises:
      PatchjaxError: what went wrong here.
    """
    self._thread.join()
    self._ask()
    if self._fault is not None:
      raise self._fault
    return self._part

  def _ask(self) -> None:
    with _lock:
      if self in _unasked:
        _unasked.remove(self)

  def _settle(self, timeout: float | None = None) -> bool:
    """Waits until all know what became of it; False if that took too long."""
    if not self._settled and processes.count() == 1:
      self._thread.join(timeout)
      self._commit, self._error = self._part, self._fault
      self._settled = self.done()
    elif not self._settled:
      self._settled = self._agree(timeout)
    return self._settled

  def _agree(self, timeout: float | None) -> bool:
    """Lets all processes know what became of it in each of them."""
    end = math.inf if timeout is None else clock.monotonic() + timeout
    pause, cause = 0.01, None
    while True:
      left = end - clock.monotonic()
      self._thread.join(max(min(pause, left), 0))
      said = processes.gather(self._state(late=left <= 0))
      failed = [(i, x) for i, x in enumerate(said) if x.startswith(b"!")]
      cause = cause or next(iter(failed), None)
      # Whether it is recorded is up to process 0, whatever befell the others.
      if said[0].startswith(b"="):
        self._commit = said[0][1:].decode()
        return True
      if cause is not None:
        self._give_up()
        if (0, said[0]) in failed:
          index, text = cause
          self._error = (
            self._fault
            if index == self._index
            else processes.understand(index, text[1:])
          )
          return True
      elif b"late" in said:
        return False
      pause = min(2 * pause, _LONGEST)

  def _state(self, *, late: bool) -> bytes:
    if not self.done():
      return b"late" if late else b""
    if self._fault is not None:
      return b"!" + processes.spell(self._fault)
    return b"=" + (self._part or "").encode()

  def _give_up(self) -> None:
    """Waits no more for shards that another process could not write."""
    if self._stop is not None:
      self._stop.set()

  def __enter__(self) -> PendingCommit:
    return self

  def __exit__(
    self, kind: Any, error: BaseException | None, trace: Any
  ) -> None:
    if error is None:
      self.result()
      return
    try:
      self.part()  # other processes may have left without an error
    except RepositoryError as failure:
      error.add_note(f"the commit {self.message!r} failed too: {failure}")

  def __repr__(self) -> str:
    known = self._commit or self._part
    state = "running" if not self.done() else known or "done"
    if self._error or self._fault:
      state = "failed"
    return f"PendingCommit({self.message!r}, {state})"


def commit_async(
  repo: Repo,
  value: Any,
  *,
  message: str,
  branch: str | None = "main",
  author: str | None = None,
  time: datetime.datetime | float | None = None,
  parents: Sequence[str] | None = None,
  on: str | None = None,
  recipe: dict[str, Any] | None = None,
  retry: bool | int = False,
  any_base: bool = False,
) -> PendingCommit:
  """Stores a value as `commit` does, in the background.

  The value is captured before this returns: arrays that are donated, deleted
  or written to later do not change what is committed. Commits are made one
  after the other; without `parents` each follows the one before.

  If the process ends without `result()`, a commit that was begun is finished
  as far as Python still allows it, and stderr says for each whether it was
  recorded, and under which id.

  With `jax.distributed` all processes call this together, as `commit`, and
  `result()` in the same order. It takes part in collectives, to digest the
  value and to decide how it is held; writing and recording it does not. A call
  waits for the commit before it. If one process cannot write, all of them
  learn it from `result()`, and nothing is recorded; a program that ends
  without asking may wait minutes for Orbax, which does not tell the others.

  Args:
    repo: the repository.
    value: see `commit`, as for all arguments that are not listed.
    message: what was done.
    branch: see `commit`.
    author: see `commit`.
    time: when; by default now, not when it is written.
    parents: see `commit`.
    on: see `commit`.
    recipe: see `commit`.
    retry: see `commit`.
    any_base: see `commit`.

  Returns:
    The pending commit; `result()` waits and returns its id.

  Raises:
    PatchjaxError: if the value cannot be captured: a leaf that was deleted, a
      tree whose leaves have no names.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   pending = repo.commit_async({"w": np.ones(3)}, message="start")
    ...   pending.result() == repo.resolve("main")
    True
  """
  from patchjax.history.commits import proposals
  from patchjax.history.repo import Repo
  from patchjax.history.storage import layout

  options: dict[str, Any] = {
    "message": message,
    "branch": branch,
    "author": author,
    "time": time if time is not None else datetime.datetime.now(datetime.UTC),
    "parents": parents,
    "on": on,
    "recipe": recipe,
    "retry": retry,
    "any_base": any_base,
  }
  layout.spell_time(options["time"])
  if processes.count() > 1:
    return _begin(repo, value, options)
  originals: Mapping[str, weakref.ref[Any]] = {}
  if proposals.is_patch(value):
    import jax

    captured = jax.tree.map(_copy, value)
  else:
    captured, originals = _capture(repo, value)

  def work() -> str:
    # One of its own: nothing is shared with what the caller does meanwhile.
    own = Repo(repo.path)
    commit = own.commit(captured, **options)
    if originals:
      _remember(own, commit, originals)
    return commit

  return PendingCommit(message, work)


def _begin(repo: Repo, value: Any, options: dict[str, Any]) -> PendingCommit:
  """Begins a commit of several processes, which call this together."""
  from patchjax.history.arrays.writing import Rest
  from patchjax.history.commits import committing
  from patchjax.history.repo import Repo

  # Its parent, and what of it is stored, is up to the one before; and that may
  # have failed in another process only.
  for before in _begun:
    before._settle()
  _begun.clear()
  rest = Rest()
  named, old, draft = committing.drafted(repo, value, **options)
  entries = committing.store(repo, named, old, draft, rest)
  # One of its own: nothing is shared with what the caller does meanwhile.
  own = Repo(repo.path)
  records = not processes.index()

  def work() -> str | None:
    rest.finish()
    return committing.land(own, entries, old, draft) if records else None

  pending = PendingCommit(draft.message, work, rest.stop)
  _begun.append(pending)
  return pending


def _capture(repo: Repo, value: Any) -> tuple[Any, dict[str, weakref.ref[Any]]]:
  """Returns a copy of a value, and the arrays whose digest will be known."""
  import jax

  from patchjax.history.arrays import known, state
  from patchjax.history.arrays.writing import checked
  from patchjax.trees.names import named_leaves, nested

  named = checked(state.arrays(named_leaves(value)))
  entries = {name: known.recall(x) for name, x in named.items()}
  repo.index.refresh()
  stored = repo.index.find(
    {e.digest for e in entries.values() if e is not None}
  )
  captured, originals = {}, {}
  for name, x in named.items():
    entry = entries[name]
    if entry is not None and (stored[entry.digest] or not entry.size):
      captured[name] = entry
      continue
    captured[name] = _copy(x)
    if isinstance(x, jax.Array):
      originals[name] = weakref.ref(x)
  return nested(captured), originals


def _remember(
  repo: Repo, commit: str, originals: Mapping[str, weakref.ref[Any]]
) -> None:
  """Notes what is known of the arrays that live on."""
  from patchjax.history.arrays import known

  tree = repo.tree(commit)
  for name, reference in originals.items():
    x = reference()
    if x is not None and name in tree and not x.is_deleted():
      known.remember(x, tree[name])


def _copy(x: Any) -> Any:
  """Returns a leaf that nobody else can change; a copy on the host."""
  import numpy as np

  from patchjax.history.arrays.parts import parts_of
  from patchjax.trees import dtypes

  if not dtypes.is_array(x):
    return x
  words = np.array(parts_of(x).words())
  return dtypes.device(words, dtypes.dtype_name(x))


def _tell() -> None:
  """Says what became of commits that nobody asked about."""
  for pending in _unasked:
    pending._thread.join()
    commit, error = pending._part, pending._fault
    if error is not None:
      said = f"it FAILED ({type(error).__name__}: {error}): nothing is recorded"
    elif commit is not None:
      said = f"it was recorded as {commit}"
    else:
      said = "this process did its part; process 0 says whether it was recorded"
    print(
      f"patchjax: nobody waited for the commit {pending.message!r}: {said}; "
      "call result(), or use commit_async as a context manager",
      file=sys.stderr,
    )


# After the threads have ended.
atexit.register(_tell)
