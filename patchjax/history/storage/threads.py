"""A few threads for work that waits for the disk or leaves Python's lock."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")

_MOST = 8


@functools.cache
def _pool(pid: int) -> concurrent.futures.ThreadPoolExecutor:
  """The threads of a process (a fork must not inherit them)."""
  del pid
  return concurrent.futures.ThreadPoolExecutor(
    _MOST, thread_name_prefix="history"
  )


def each(function: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
  """Returns the function of each item, computed side by side, in order.

  Args:
    function: called in several threads; must not call `each` itself.
    items: its arguments.

  Raises:
    BaseException: the first one that a call raised.

  Example:
    >>> each(len, ["a", "bc"])
    [1, 2]
  """
  items = list(items)
  if len(items) < 2:
    return [function(item) for item in items]
  futures = [_pool(os.getpid()).submit(function, item) for item in items]
  # All must have ended before an error is passed on: no write comes late.
  concurrent.futures.wait(futures)
  return [future.result() for future in futures]
