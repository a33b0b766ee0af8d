"""What a store of versions must do to stand beside the others."""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

from experiments.bench.timing import Cost
from experiments.bench.workload import Version


class Peer(Protocol):
  """A store of the versions of one value, in a folder of its own.

  Attributes:
    name: what the tables call it.
  """

  name: str

  def commit(self, version: Version) -> Cost:
    """Stores a version after the others; returns what it took.

    Args:
      version: its value lies in host memory before the clock starts.
    """
    ...

  def checkout(self, number: int) -> Cost:
    """Reads a version.

    Args:
      number: which, by the order of commits.
    """
    ...

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves of a version by name, to be compared.

    Args:
      number: which, by the order of commits.
    """
    ...

  def size(self) -> int:
    """Returns the bytes of everything stored so far."""
    ...

  def close(self) -> None:
    """Ends the processes it has started."""
    ...


def folder_bytes(*paths: pathlib.Path) -> int:
  """Returns the bytes of all files below some folders."""
  return sum(
    file.stat().st_size
    for path in paths
    for file in path.rglob("*")
    if file.is_file()
  )
