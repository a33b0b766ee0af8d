"""Running a leaf function where the leaf lives.

On a mesh with Explicit axes every operation must say how its output is
sharded, and gathers, scatters and dots of sharded arrays are refused when it
is not plain. The functions here act on one leaf and give back that leaf, so
the compiler may partition them itself, towards the leaf's own sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from patchjax.trees.dtypes import is_key


def explicit_sharding(leaf: Any) -> NamedSharding | None:
  """Returns the sharding of a leaf on an Explicit mesh, else None.

  Args:
    leaf: an array or its tracer.
  """
  if not isinstance(leaf, jax.Array):
    return None
  sharding = jax.typeof(leaf).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return sharding


def on_leaf_mesh(function: Callable[..., Any], leaf: Any, *args: Any) -> Any:
  """Returns `function(*args)`, one array laid out as `leaf` is.

  Args:
    function: of arrays and pytrees of them; the result has the axes of `leaf`
      (and perhaps more at the end, which stay whole).
    leaf: sets the sharding of the result.
    *args: arguments of `function`.
  """
  sharding = explicit_sharding(leaf)
  if sharding is None:
    return function(*args)
  # Without shardings: the function need not run on an Explicit mesh as it is.
  shape = jax.eval_shape(
    function,
    *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args),
  )
  extra = 0 if is_key(shape) else len(shape.shape) - leaf.ndim
  spec = PartitionSpec(*sharding.spec, *(None,) * extra)
  return _partitioned(function, sharding, spec)(*args)


def number_on_mesh(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)`, small, whole on each device of any mesh.

  Args:
    function: of arrays and pytrees of them, with a number or small arrays
      for a result.
    *args: arguments of `function`.
  """
  shardings = (explicit_sharding(leaf) for leaf in jax.tree.leaves(args))
  sharding = next(filter(None, shardings), None)
  if sharding is None:
    return function(*args)
  return _partitioned(function, sharding, PartitionSpec())(*args)


def _partitioned(
  function: Callable[..., Any], sharding: NamedSharding, spec: PartitionSpec
) -> Callable[..., Any]:
  mesh = sharding.mesh
  explicit = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  )
  return jax.sharding.auto_axes(
    function, axes=explicit, out_sharding=NamedSharding(mesh, spec)
  )
