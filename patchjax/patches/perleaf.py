"""Numbers of a transform that differ by leaf.

A `PerLeaf` stands where a step has a number. The engine replaces it, for each
leaf, by the number of that leaf, before the step's functions see it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from patchjax.trees.errors import SelectionError
from patchjax.trees.names import flatten
from patchjax.trees.selectors import select_named

_NUMBER = re.compile(r"(?:^|[/._])(\d+)(?=[/._]|$)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLeaf:
  """One number, or one vector of a number a contributor, for each leaf.

  A pytree of its numbers: traced, mapped over and learned like any number.

  Attributes:
    values: by text name; a number, or a pytree of arrays (statistics).
    optional: whether leaves may have none: a step then sees None; static.
    missing: what is said of a leaf that has none and must; static.
  """

  values: dict[str, Any]
  optional: bool = dataclasses.field(
    default=False, metadata={"static": True}, kw_only=True
  )
  missing: str = dataclasses.field(
    default="no number is given for the leaf {name}; make them with "
    "patchjax.merging.per_leaf(params, rules, default=...) of these "
    "parameters",
    metadata={"static": True},
    kw_only=True,
    repr=False,
  )

  def at(self, name: str) -> Any:
    """Returns the number of a leaf, None if it has none and need not.

    Args:
      name: text name.

    Raises:
      SelectionError: if the leaf has none and all must have one.

    Example:
      >>> PerLeaf({"w": 1.0}, optional=True).at("b")
    """
    if name not in self.values:
      if self.optional:
        return None
      raise SelectionError(self.missing.format(name=name))
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
    SelectionError: if the leaf has no number, and needs one.

  Example:
    >>> resolved({"t": PerLeaf({"a": 1.0, "b": 2.0}), "scale": 3.0}, "b")
    {'scale': 3.0, 't': 2.0}
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


def per_leaf(
  params: Any, rules: Mapping[Any, Any], *, default: Any = None
) -> PerLeaf:
  """Returns numbers that differ by leaf, for any number of a merge method.

  The values are used as they are, so that they may be traced and learned.

  Args:
    params: pytree of arrays whose leaves are meant.
    rules: a mapping of selectors (regexes on text names) to numbers; the
      first that picks a leaf decides. A list is a gradient over the layers:
      it is interpolated linearly, its first number at the first and its last
      at the last layer among the leaves picked. A leaf's layer is the first
      integer in its name that stands between `/`, `.` or `_`; leaves without
      one get the first number, and the only layer of all the last, as in
      mergekit. A tuple or an array holds a number a contributor; a gradient
      may be a list of these arrays.
    default: for leaves that no rule picks; None if they are not merged.

  Raises:
    SelectionError: if a rule picks nothing, or has an empty list.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> params = {"layers": [np.zeros(2)] * 3, "head": np.zeros(2)}
    >>> t = per_leaf(params, {"layers/.*": [0.0, 1.0]}, default=0.25)
    >>> [t.at(name) for name in ("head", "layers/0", "layers/1", "layers/2")]
    [0.25, 0.0, 0.5, 1.0]
    >>> method = pj.merging.passthrough(scale=t)
  """
  named, _ = flatten(params)
  values: dict[str, Any] = {}
  for selector, value in rules.items():
    picked = select_named(named, selector)
    places = _places(picked)
    for name in picked:
      if name in values:
        continue
      if isinstance(value, list):
        values[name] = _between(value, places[name], selector)
      else:
        values[name] = _number(value)
  if default is not None:
    values = dict.fromkeys(named, _number(default)) | values
  return PerLeaf(values)


def _places(names: Sequence[str]) -> dict[str, float]:
  """Returns where each leaf's layer is, 0 for the first and 1 for the last."""
  found = {name: _NUMBER.search(name) for name in names}
  layers = {name: int(m.group(1)) for name, m in found.items() if m}
  if not layers:
    return dict.fromkeys(names, 0.0)
  first, last = min(layers.values()), max(layers.values())
  return {
    name: 0.0
    if name not in layers
    else 1.0
    if last == first
    else (layers[name] - first) / (last - first)
    for name in names
  }


def _between(gradient: list[Any], place: float, selector: Any) -> Any:
  """Returns the value of a list of numbers, spread over [0, 1], at a place."""
  if not gradient:
    raise SelectionError(f"the list of numbers for {selector!r} is empty")
  at = place * (len(gradient) - 1)
  low = min(math.floor(at), len(gradient) - 1)
  high = min(low + 1, len(gradient) - 1)
  part = at - low
  if part == 0:
    return _number(gradient[low])
  return _number(gradient[low]) * (1 - part) + _number(gradient[high]) * part


def _number(value: Any) -> Any:
  # Integers are numbers of another type, for which a step compiles again.
  if isinstance(value, list | tuple):
    import jax.numpy as jnp

    return jnp.stack([jnp.asarray(v, jnp.float32) for v in value])
  return float(value) if isinstance(value, int) else value
