"""A row of the battery of merge methods, and what many rows say."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

SHAPE = (32, 16)
"""Of every leaf: they share a program."""

# One for each of three contributors.
WEIGHTS = [0.5, 1.25, 0.75]
OTHER = [1.0, 0.25, 0.5]


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to call a method.

  Attributes:
    options: keyword options of the method and of its reference.
    only_method: further options of the method alone (a key, rng).
    swept: other values for some of the options: numbers, which must not
      compile anything.
    base: whether there is a base.
    contributors: how many.
    masks: of a random method, `(base, models, options) -> masks`: what the
      reference is given, one `{leaf: bool array or None}` a contributor.
    exact: whether the result has the same bits however it is run. Not so for
      methods that sum floats over a leaf.
    symmetric: whether contributors may be permuted (with those options that
      are lists of one number a contributor).
    local: whether a leaf's result depends on that leaf alone: not so for
      methods that count or measure whole models.
    alone: options under which a single contributor is the result; None if
      there are none.
    agreed: options under which contributors that are all equal are the
      result; None if there are none.
    heavy: whether it takes long to compile; calls of mergekit are then run on
      leaves of one shape.
    close: in float32, the largest error as a share of a leaf's largest number.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only_method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  swept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: bool = True
  contributors: int = 3
  masks: Callable[..., list[dict[str, Any]]] | None = None
  exact: bool = True
  symmetric: bool = True
  local: bool = True
  alone: Mapping[str, Any] | None = None
  agreed: Mapping[str, Any] | None = None
  heavy: bool = False
  close: float = 1e-6
