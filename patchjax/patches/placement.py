"""Where a leaf is: in the model, and on the devices.

A step of a transform sees one leaf at a time. What it may need to know beyond
the numbers is a `Leaf`: the leaf's stable identity for random numbers, its
position in the model, the index of each entry. On a mesh `sum_over_shards`
runs a counting function on every shard and adds the results up in one
all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.trees.errors import SelectionError

Array = Any
Axes = tuple[tuple[str, ...], ...]

ROW_LIMIT = 1 << 31
"""Leaves of as many entries are numbered by rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf as a step of a transform sees it.

  The text name is not here: it would be static, and every leaf would compile
  on its own. Leaves of one shape and placement share a program.

  Attributes:
    identity: two words of a stable hash of the name, `uint32[2]`, to fold
      into a key: independent of other leaves, of order and of process.
    after: how many leaves come after this one in order of names, `uint32[]`.
    shape: global shape, static.
    mesh: the mesh the leaf is known to lie on, static; else None.
    axes: mesh axes of each dimension there, static.
    manual: whether the arrays seen are this device's shard, static.
    single: whether the leaf is known to lie on one device, static.
  """

  identity: Array
  after: Array
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  mesh: Any = dataclasses.field(default=None, metadata={"static": True})
  axes: Axes = dataclasses.field(default=(), metadata={"static": True})
  manual: bool = dataclasses.field(default=False, metadata={"static": True})
  single: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def local(self) -> bool:
    """Whether the arrays lie on one device, and reshape freely."""
    return self.manual or self.single

  @property
  def size(self) -> int:
    """Number of entries."""
    return math.prod(self.shape)

  def index(self, within: Any = ()) -> tuple[Array, Array]:
    """Returns each entry's (row, index in the row), `uint32` of the shape.

    All of a leaf of fewer than `2**31` entries is one row; a larger one has
    as many rows as its first axis is long. Indices are global on every mesh.

    Args:
      within: integers below 2**31 that change in the loop that this is called
        in. Otherwise the compiler takes indices for a constant of the loop,
        which it computes before, and keeps, whether the loop is entered or
        not.
    """
    if self.mesh is not None and not self.manual:
      manual = dataclasses.replace(self, manual=True)
      specs = (_spec(self), _spec(self))
      none = jax.sharding.PartitionSpec()
      return _shard_map(manual.index, self, none, specs)(within)
    first = 0 if self.size < ROW_LIMIT else 1
    shape = list(self.shape)
    if self.manual:
      for d, names in enumerate(self.axes):
        shape[d] //= math.prod(lax.axis_size(name) for name in names)
    row = column = jnp.zeros(tuple(shape), jnp.uint32)
    one = _one_of(within)
    stride = 1
    for d in range(len(shape) - 1, -1, -1):
      along = lax.broadcasted_iota(jnp.uint32, tuple(shape), d)
      if self.manual and self.axes[d]:
        start = lax.axis_index(self.axes[d]).astype(jnp.uint32)
        along = along + start * jnp.uint32(shape[d])
      if d >= first:
        column = column + along * (one * jnp.uint32(stride))
        stride *= self.shape[d]
      else:
        row = along
    return row, column


def _one_of(within: Any) -> Array:
  """Returns 1, computed from a number that changes in a loop, if there is."""
  words = jax.tree.leaves(within)
  if not words:
    return jnp.uint32(1)
  word = words[0].reshape(-1)[0].astype(jnp.uint32)
  # No compiler knows that it is less: an optimization barrier is removed
  # before loops are looked at.
  return jnp.uint32(1) + (word >> jnp.uint32(31))


def extents(shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns how many rows `Leaf.index` gives a shape, and their length."""
  size = math.prod(shape)
  rows, columns = (1, size)
  if size >= ROW_LIMIT:
    rows, columns = shape[0], size // shape[0]
  if max(rows, columns) > 1 << 31:
    raise SelectionError(
      f"cannot number the entries of a leaf of shape {shape}: give it a "
      "first axis that leaves rows of at most 2**31 entries"
    )
  return max(rows, 1), max(columns, 1)


def leaf_of(x: Array, order: int = 0, count: int = 1, identity=None) -> Leaf:
  """Returns the `Leaf` of an array.

  Args:
    x: an array or tracer.
    order: position in the model, in order of names.
    count: number of leaves of the model.
    identity: hash words of its name.
  """
  mesh, axes = mesh_axes(x)
  return Leaf(
    identity=np.zeros(2, np.uint32) if identity is None else identity,
    after=np.uint32(count - 1 - order),
    shape=tuple(x.shape),
    mesh=mesh,
    axes=axes,
    single=on_one_device(x),
  )


def on_one_device(x: Array) -> bool:
  """Returns whether an array is known to lie on a single device."""
  if isinstance(x, Tracer):
    return False
  return not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1


def mesh_axes(x: Array) -> tuple[Any, Axes]:
  """Returns the mesh an array is known to lie on, and its axes by dimension.

  Known are concrete arrays with a NamedSharding over several devices, and
  tracers on a mesh with Explicit axes (by their type). A tracer on a mesh of
  Auto axes does not tell: `(None, ())`.

  Args:
    x: an array or tracer.
  """
  if isinstance(x, Tracer):
    sharding = jax.typeof(x).sharding
    kinds = dict(
      zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    )
    explicit = jax.sharding.AxisType.Explicit
    if explicit not in kinds.values():
      return None, ()
  elif isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
    sharding = x.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
      return None, ()
  else:
    return None, ()
  return sharding.mesh, _axes(sharding.spec, x.ndim)


def _axes(spec: Any, ndim: int) -> Axes:
  entries = tuple(spec) + (None,) * (ndim - len(spec))
  return tuple(
    () if e is None else (e,) if isinstance(e, str) else tuple(e)
    for e in entries
  )


def _spec(leaf: Leaf) -> jax.sharding.PartitionSpec:
  return jax.sharding.PartitionSpec(*(names or None for names in leaf.axes))


def _shard_map(f: Callable, leaf: Leaf, in_specs: Any, out_specs: Any):
  # Integers only go through here, and no derivative: the check of which
  # values are equal on all devices would ask users' counting functions for
  # annotations.
  return jax.shard_map(
    f,
    mesh=leaf.mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=frozenset(leaf.mesh.axis_names),
    check_vma=False,
  )


def sum_over_shards(f: Callable, x: Any, leaf: Leaf, *rest: Any) -> Any:
  """Returns `f(x, leaf, *rest)`, summed over the shards of a leaf.

  Args:
    f: counts something in the arrays it sees, e.g. `count_keys`.
    x: an array of the leaf's shape, or a pytree of such arrays.
    leaf: where they are; without a known mesh f is called as it is, and the
      compiler distributes it.
    *rest: further arrays, the same everywhere.

  Returns:
    what f returns, added up by one `psum`.
  """
  if leaf.mesh is None:
    return f(x, leaf, *rest)
  manual = dataclasses.replace(leaf, manual=True)
  names = tuple(name for names in leaf.axes for name in names)

  def shard(x, identity, after, rest):
    here = dataclasses.replace(manual, identity=identity, after=after)
    out = f(x, here, *rest)
    return lax.psum(out, names) if names else out

  none = jax.sharding.PartitionSpec()
  mapped = _shard_map(shard, leaf, (_spec(leaf), none, none, none), none)
  return mapped(x, leaf.identity, leaf.after, rest)


def on_shards(f: Callable, x: Any, leaf: Leaf, *rest: Any) -> Any:
  """Returns `f(x, leaf, *rest)`, an array of the leaf's shape, by shards.

  Args:
    f: of one shard, with the shard's `Leaf` (`manual`), what it returns has
      the shard's shape; integers or booleans, since no derivative goes
      through.
    x: an array of the leaf's shape, or a pytree of such arrays.
    leaf: where they are; without a known mesh f is called as it is.
    *rest: further arrays, the same everywhere.
  """
  if leaf.mesh is None:
    return f(x, leaf, *rest)
  manual = dataclasses.replace(leaf, manual=True)

  def shard(x, identity, after, rest):
    here = dataclasses.replace(manual, identity=identity, after=after)
    return f(x, here, *rest)

  none = jax.sharding.PartitionSpec()
  specs = (_spec(leaf), none, none, none)
  mapped = _shard_map(shard, leaf, specs, _spec(leaf))
  return mapped(x, leaf.identity, leaf.after, rest)


@functools.lru_cache(maxsize=65536)
def identity_of(name: str) -> np.ndarray:
  """Returns two words of a stable hash of a leaf's name, `uint32[2]`.

  Example:
    >>> identity_of("dense/kernel").shape
    (2,)
  """
  import hashlib

  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return np.frombuffer(digest, "<u4").astype(np.uint32)
