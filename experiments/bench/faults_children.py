"""Forked children: what may crash, hang or be killed runs in one.

The parent has imported everything and started nothing: a child of it is ready
within milliseconds, where a new process takes two seconds to import.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any


class Child:
  """A forked process that says things, and ends.

  Attributes:
    pid: its process id.
    said: the JSON values it has said so far.
    status: None while it lives; then its exit code, or minus the signal.
  """

  def __init__(self, work: Callable[[Callable[[Any], None]], None]):
    """Forks.

    Args:
      work: what the child does; called with `say`, which takes JSON values.
    """
    reading, writing = os.pipe()
    self.pid = os.fork()
    self.said: list[Any] = []
    self.status: int | None = None
    if self.pid:
      os.close(writing)
      self._reading = reading
      self._rest = b""
      return
    code = 1
    try:
      os.close(reading)

      def say(value: Any) -> None:
        os.write(writing, json.dumps(value).encode() + b"\n")

      work(say)
      code = 0
    except BaseException:
      with contextlib.suppress(BaseException):
        text = traceback.format_exc()
        os.write(writing, json.dumps({"traceback": text}).encode() + b"\n")
    finally:
      # Without the farewells of jax and TensorStore: they are not at stake.
      os._exit(code)

  def hear(self, timeout: float) -> bool:
    """Waits for the next word.

    Args:
      timeout: for how many seconds at most.

    Returns:
      Whether one came; False at the end of the child, too.
    """
    end = time.monotonic() + timeout
    while b"\n" not in self._rest:
      left = end - time.monotonic()
      ready = select.select([self._reading], [], [], max(left, 0))[0]
      if not ready:
        return False
      piece = os.read(self._reading, 1 << 16)
      if not piece:
        return False
      self._rest += piece
    line, _, self._rest = self._rest.partition(b"\n")
    self.said.append(json.loads(line))
    return True

  def kill(self) -> None:
    """Sends SIGKILL; no harm if it has ended already."""
    if self.status is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, signal.SIGKILL)

  def wait(self, timeout: float) -> int | None:
    """Waits for the end and what is said until then; kills at a timeout.

    Args:
      timeout: for how many seconds at most.

    Returns:
      The exit code, or minus the signal; None if it had to be killed.
    """
    end = time.monotonic() + timeout
    while self.hear(max(end - time.monotonic(), 0)):
      pass
    while True:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        self.status = os.waitstatus_to_exitcode(status)
        break
      if time.monotonic() > end:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reading)
        return None
      # Python has no wait for a child with a time limit.
      time.sleep(0.001)
    while self.hear(0):
      pass
    os.close(self._reading)
    return self.status

  @property
  def trouble(self) -> str:
    """The traceback it ended with, if it did."""
    for word in self.said:
      if isinstance(word, dict) and "traceback" in word:
        return word["traceback"]
    return ""


def call(work: Callable[[], Any], *, timeout: float = 120) -> Any:
  """Runs something in a child and returns its JSON result.

  Args:
    work: what to do.
    timeout: seconds after which it counts as hanging.

  Raises:
    RuntimeError: if it raised, crashed or hung.
  """
  child = Child(lambda say: say({"result": work()}))
  status = child.wait(timeout)
  if status == 0:
    return child.said[-1]["result"]
  raise RuntimeError(
    child.trouble or ("hung" if status is None else f"ended with {status}")
  )
