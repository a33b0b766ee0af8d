"""What the recipes of methods do with their arguments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def numbers(value: Any) -> Any:
  """Returns a list of numbers as one array, a leaf of the method's pytree.

  Args:
    value: a number, an array, a `PerLeaf`, None, or a list of numbers.

  Example:
    >>> numbers([1, 2]).tolist(), numbers(0.5)
    ([1.0, 2.0], 0.5)
  """
  if isinstance(value, list | tuple):
    return jnp.stack([jnp.asarray(v, jnp.float32) for v in value])
  return value


def check(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises ValueError unless an option has one of its values.

  Args:
    name: of the option.
    value: that was given.
    allowed: values.

  Example:
    >>> check("flavour", "papers", ("paper", "mergekit"))
    Traceback (most recent call last):
    ...
    ValueError: flavour must be 'paper' or 'mergekit', got 'papers'
  """
  if value not in allowed:
    raise ValueError(
      f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}"
    )


def check_flavour(flavour: str) -> None:
  """Raises ValueError unless it is "paper" or "mergekit"."""
  check("flavour", flavour, ("paper", "mergekit"))
