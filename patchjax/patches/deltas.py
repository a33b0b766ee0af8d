"""Deltas: what is done to one leaf.

A numeric delta is a law (how its numbers act) and a code (how they are held).
The structural ones insert, delete or rename leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from patchjax.patches.codes import Code, Dense

_static: dict[str, Any] = {"metadata": {"static": True}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
  """A change of the numbers of one leaf.

  Attributes:
    code: how the numbers are held.
    law: `add` (`x + d`), `mul` (`x * d`), `set` (`d`), or `bits` (the bit
      pattern of `x` plus `d`, modulo the word: exact and invertible).
  """

  code: Code
  law: str = dataclasses.field(**_static)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return self.code.nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Insert:
  """A new leaf, or new rows at the end of one axis of a leaf.

  Attributes:
    value: the leaf, or the rows.
    axis: the axis the rows are appended on; None for a new leaf.
  """

  value: Any
  axis: int | None = dataclasses.field(default=None, **_static)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return Dense(self.value).nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delete:
  """The leaf goes."""

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rename:
  """The leaf gets another name; its numbers stay.

  Attributes:
    to: the new text name.
  """

  to: str = dataclasses.field(**_static)

  @property
  def nbytes(self) -> int:
    """Bytes in a patch file."""
    return 0


AnyDelta = Delta | Insert | Delete | Rename
