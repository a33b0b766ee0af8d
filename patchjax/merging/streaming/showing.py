"""A progress bar of bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Bar:
  """Bytes read so far, of those that will be.

  Attributes:
    read: bytes so far.
  """

  def __init__(self, bar):
    self._bar = bar
    self._planned = 0
    self.read = 0

  def plan(self, count: int) -> None:
    """Says that so many bytes more will be read.

    Args:
      count: bytes.
    """
    self._planned += count
    self._bar.total = self._planned

  def say(self, what: str) -> None:
    """Says what is going on.

    Args:
      what: a few words.
    """
    self._bar.set_description(what)

  def moved(self, count: int) -> None:
    """Says that bytes were read.

    Args:
      count: bytes.
    """
    self.read += count
    if self.read > self._planned:
      self.plan(self.read - self._planned)
    self._bar.update(count)


@contextlib.contextmanager
def bar(progress: bool | None) -> Iterator[Bar]:
  """Yields a progress bar on stderr.

  Args:
    progress: whether it is shown; None: on a terminal.
  """
  from tqdm import tqdm

  with tqdm(
    desc="checking",
    unit="B",
    unit_scale=True,
    disable=None if progress is None else not progress,
    mininterval=0.5,
  ) as shown:
    yield Bar(shown)
