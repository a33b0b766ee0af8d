"""Numbers of a transform that differ by leaf.

A `PerLeaf` stands where a step has a number. The engine replaces it, for each
leaf, by the number of that leaf, before the step's functions see it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from patchjax.trees.errors import SelectionError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLeaf:
  """One number, or one vector of a number a contributor, for each leaf.

  A pytree of its numbers: traced, mapped over and learned like any number.

  Attributes:
    values: by text name.
  """

  values: dict[str, Any]

  def at(self, name: str) -> Any:
    """Returns the number of a leaf.

    Args:
      name: text name.

    Raises:
      SelectionError: if the leaf has none.
    """
    if name not in self.values:
      raise SelectionError(
        f"no number is given for the leaf {name}; make them with "
        "patchjax.merging.per_leaf(params, rules, default=...) of these "
        "parameters"
      )
    return self.values[name]


def _is_per_leaf(x: Any) -> bool:
  return isinstance(x, PerLeaf)


def varies(state: Any) -> bool:
  """Returns whether any number of a state differs by leaf.

  Args:
    state: a pytree of numbers.
  """
  return any(map(_is_per_leaf, jax.tree.leaves(state, is_leaf=_is_per_leaf)))


def resolved(state: Any, name: str) -> Any:
  """Returns a state with the numbers of one leaf.

  Args:
    state: a pytree of numbers, some of them `PerLeaf`.
    name: text name of the leaf.

  Raises:
    SelectionError: if the leaf has no number.

  Example:
    >>> resolved({"t": PerLeaf({"a": 1.0, "b": 2.0}), "scale": 3.0}, "b")
    {'t': 2.0, 'scale': 3.0}
  """
  return jax.tree.map(
    lambda x: x.at(name) if _is_per_leaf(x) else x, state, is_leaf=_is_per_leaf
  )


def refuse(value: Any) -> None:
  """Raises SelectionError for numbers that differ by leaf.

  Args:
    value: what a step takes for a number where it sees no single leaf.
  """
  if _is_per_leaf(value):
    raise SelectionError(
      "a number that differs by leaf was given where all leaves are counted "
      "together; use scope='leaf', or one number for all"
    )
