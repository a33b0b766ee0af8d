"""Task vectors of one leaf, each on devices of its own.

A matrix that is cut over devices cannot be decomposed where it lies. The k
task vectors of a leaf are handed round, so that each device has whole ones, k
over the devices of them: a device then decomposes these alone, where each would
decompose all.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from patchjax.patches import placement

Array = Any


def spread(x: Array, leaf: placement.Leaf) -> Array:
  """Returns the task vectors with as many as possible whole on a device.

  Args:
    x: `[k, *shape]`, each laid out as the leaf is.
    leaf: where it is; without a known mesh the compiler decides.
  """
  mesh = _mesh(leaf)
  if mesh is None:
    return x
  used = {name for names in leaf.axes for name in names}
  spare = tuple(name for name in mesh.axis_names if name not in used)
  first: tuple[str, ...] = ()
  rest = list(leaf.axes)
  # An axis at a time: the compiler makes an all-to-all of each, where it would
  # copy all to every device for several at once.
  for axis, names in [(None, spare), *enumerate(leaf.axes)]:
    before = first
    for name in names:
      devices = math.prod(mesh.shape[n] for n in (*first, name))
      if x.shape[0] % devices == 0:
        first = (*first, name)
    if axis is not None:
      rest[axis] = tuple(name for name in names if name not in first)
    if first != before:
      x = _laid(x, mesh, first, *rest)
  return x


def gathered(x: Array, leaf: placement.Leaf) -> Array:
  """Returns an array whole on every device.

  Args:
    x: of any shape.
    leaf: whose mesh is meant.
  """
  mesh = _mesh(leaf)
  return x if mesh is None else _laid(x, mesh)


def side_by_side(
  triplets: tuple[Array, Array, Array], leaf: placement.Leaf
) -> tuple[Array, Array, Array]:
  """Returns the singular triplets of all tasks together, on every device.

  Args:
    triplets: `[k, batch, n, r]`, `[k, batch, r]` and `[k, batch, r, m]`.
    leaf: whose they are.

  Returns:
    `[batch, n, k r]`, `[batch, k r]` and `[batch, k r, m]`.
  """
  u, s, vt = (
    jnp.concatenate(list(gathered(x, leaf)), axis)
    for x, axis in zip(triplets, (-1, -1, -2), strict=True)
  )
  return u, s, vt


def _mesh(leaf: placement.Leaf) -> Any:
  """The mesh to lay things out on, if the compiler is to be told."""
  if leaf.mesh is None:
    return None
  # Inside of what runs on an Explicit mesh its axes are the compiler's, but
  # where only a shape is asked for.
  here = jax.sharding.get_abstract_mesh()
  mesh = leaf.mesh if here.empty else here
  return None if AxisType.Explicit in mesh.axis_types else mesh


def _laid(x: Array, mesh: Any, *axes: tuple[str, ...]) -> Array:
  spec = PartitionSpec(*(names or None for names in axes))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
