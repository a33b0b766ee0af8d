"""Several processes that act as one: what they tell each other.

With `jax.distributed`, every process calls the same verbs in the same order.
Each works on the shards that it holds; small facts are exchanged, process 0
decides and writes, and what goes wrong anywhere is raised everywhere: nobody
waits for a process that has given up. In a single process all of this costs
nothing and starts no device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TypeVar

from patchjax.trees import errors
from patchjax.trees.errors import PatchjaxError, RepositoryError

_Out = TypeVar("_Out")

_BLOCK = 4088  # bytes of most messages, with their length 4 KiB


def count() -> int:
  """Returns how many processes act as one: those of `jax.distributed`."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return 1
  return jax.process_count()


def index() -> int:
  """Returns which of them this is."""
  return sys.modules["jax"].process_index() if count() > 1 else 0


def gather(data: bytes) -> list[bytes]:
  """Returns what every process says, in their order.

  Args:
    data: what this one says.
  """
  if count() == 1:
    return [data]
  # Every length is a program to compile: most of what is said fits into one
  # block, and what does not is rounded up to a power of two.
  head = len(data).to_bytes(8, "little") + data[:_BLOCK]
  rows = _allgather(head, 8 + _BLOCK)
  sizes = [int.from_bytes(row[:8], "little") for row in rows]
  longest = max(sizes) - _BLOCK
  if longest <= 0:
    return [row[8 : 8 + size] for row, size in zip(rows, sizes)]
  rests = _allgather(data[_BLOCK:], 1 << (longest - 1).bit_length())
  return [
    (row[8:] + rest)[:size] for row, rest, size in zip(rows, rests, sizes)
  ]


def _allgather(data: bytes, size: int) -> list[bytes]:
  import numpy as np
  from jax.experimental import multihost_utils

  padded = np.zeros(size, np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return [row.tobytes() for row in multihost_utils.process_allgather(padded)]


def share(function: Callable[[], bytes]) -> list[bytes]:
  """Calls a function in every process; returns what each of them returns.

  Args:
    function: exchanges nothing with the other processes.

  Raises:
    PatchjaxError: where one process fails, all raise.
  """
  if count() == 1:
    return [function()]
  failure: BaseException | None = None
  try:
    said = b"=" + function()
  except BaseException as error:  # told to the others, then raised
    failure = error
    said = spell(error)
  told = gather(said)
  if failure is not None:
    raise failure
  for number, text in enumerate(told):
    if not text.startswith(b"="):
      raise understand(number, text)
  return [text[1:] for text in told]


def together(function: Callable[[], _Out]) -> _Out:
  """Calls a function in every process; where one fails, all raise.

  Args:
    function: exchanges nothing with the other processes.

  Raises:
    PatchjaxError: what went wrong in the first process that failed.
  """
  if count() == 1:
    return function()
  found: list[_Out] = []

  def call() -> bytes:
    found.append(function())
    return b""

  share(call)
  return found[0]


def first(function: Callable[[], _Out]) -> _Out:
  """Returns in every process what a function returns in process 0.

  Args:
    function: called in process 0 alone; what it returns must be JSON.

  Raises:
    PatchjaxError: what went wrong there.
  """
  if count() == 1:
    return function()
  if index():
    said = gather(b"")[0]
    if not said.startswith(b"="):
      raise understand(0, said)
    return json.loads(said[1:])
  try:
    found = function()
    said = b"=" + json.dumps(found).encode()
  except BaseException as error:  # told to the others, then raised
    gather(spell(error))
    raise
  gather(said)
  return found


def spell(error: BaseException) -> bytes:
  """Returns an error as another process will `understand` it.

  Args:
    error: what went wrong here.
  """
  return json.dumps([type(error).__name__, str(error)]).encode()


def understand(process: int, text: bytes) -> PatchjaxError:
  """Returns the error that another process ran into.

  Args:
    process: which one.
    text: what it said; see `spell`.
  """
  name, message = json.loads(text)
  kind = getattr(errors, name, None)
  if isinstance(kind, type) and issubclass(kind, PatchjaxError):
    return kind(message)
  return RepositoryError(f"process {process} failed: {name}: {message}")
