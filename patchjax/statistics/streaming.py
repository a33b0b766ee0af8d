"""Examples in pieces: what statistics are taken over, a little at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from patchjax.trees.errors import StructureError


def size_of(batch: Any) -> int:
  """Returns how many examples a batch has.

  Args:
    batch: pytree of arrays with examples along their first axis.

  Raises:
    ValueError: if the arrays have not one first axis.
  """
  sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "the arrays of the data need one first axis, that of the examples; "
      f"found first axes {sorted(sizes)}"
    )
  return sizes.pop()[0]


def check_chunk(chunk: int) -> None:
  """Raises ValueError for a number of examples that nothing can hold.

  Args:
    chunk: examples that are held at once.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")


def pieces(
  data: Any, chunk: int | None, what: str
) -> Iterator[tuple[int, int, Any]]:
  """Yields `(index of the first example, how many, the examples)`.

  What lies on several devices is not cut: there a batch is one piece.

  Args:
    data: a batch, or an iterator over batches of any sizes.
    chunk: how many examples at most are in a piece; None: batches are pieces.
    what: is taken of them, for messages.

  Raises:
    StructureError: if there is no example.
    ValueError: if a batch has no first axis, or the chunk is less than 1.

  Example:
    >>> batches = iter([np.zeros((3, 2)), np.zeros((1, 2))])
    >>> [(i, n, x.shape) for i, n, x in pieces(batches, 2, "the mean")]
    [(0, 2, (2, 2)), (2, 1, (1, 2)), (3, 1, (1, 2))]
  """
  if chunk is not None:
    check_chunk(chunk)
  start = 0
  for batch in data if isinstance(data, Iterator) else iter([data]):
    size = size_of(batch)
    step = size if chunk is None else chunk
    if any(map(_spread, jax.tree.leaves(batch))):
      step = size
    for first in range(0, size, max(step, 1)):
      n = min(step, size - first)
      piece = batch if n == size else part(batch, first, first + n)
      yield start + first, n, piece
    start += size
  if not start:
    raise StructureError(f"{what} needs at least one example, got none")


def part(batch: Any, first: int, last: int) -> Any:
  """Returns some examples of a batch.

  Args:
    batch: pytree of arrays with examples along their first axis.
    first: index of the first.
    last: and of what comes after the last.
  """
  return jax.tree.map(lambda x: x[first:last], batch)


def _spread(x: Any) -> bool:
  return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
