"""PermutationSpec: which axes of which leaves are permuted together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import meshes
from patchjax.trees.errors import MismatchError, StructureError
from patchjax.trees.names import flatten, named_leaves

Permutations = dict[str, np.ndarray]
"""For each hidden dimension, where its entries come from: `y[i] = x[p[i]]`.

The last axis is the dimension's; axes before it are those it lies `within`.
"""

Axis = tuple["str | int", ...]


@dataclasses.dataclass(frozen=True)
class Hidden:
  """A hidden dimension of a model.

  Attributes:
    size: how many units.
    within: dimensions for each of whose entries this one may be in another
      order: the numbers of a head within the heads, a layer's units within
      scan-stacked layers.
    moves: whether units may change places; else it only numbers others.
  """

  size: int
  within: tuple[str, ...] = ()
  moves: bool = True


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
  """Which axes of which leaves share a hidden dimension.

  Permuting a dimension wherever it occurs leaves the model's function as it
  is. Made by `infer_permutations`, or by `given_permutations`; both check it.

  Attributes:
    dimensions: the hidden dimensions by name: that of a leaf and axis.
    axes: for each leaf, the factors of each axis, the slowest first: names of
      dimensions, or integers for runs of entries that keep their order.
    reasons: why axes keep their order, by leaf and axis (`"out/kernel:1"`).
    error: by how much outputs differed when all were permuted at random,
      relative to what moving the parameters changes; None if it was not
      checked.
    tolerance: that of the check, if one was given.
    unseen: by dimension, leaves that the check says nothing of: permuting
      them alone did not change the outputs. It is so with biases of keys,
      which a softmax forgets, and with what the inputs leave unused.
  """

  dimensions: Mapping[str, Hidden]
  axes: Mapping[str, tuple[Axis, ...]]
  reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
  error: float | None = None
  tolerance: float | None = None
  unseen: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def moving(self) -> tuple[str, ...]:
    """Names of the dimensions whose units may change places."""
    return tuple(n for n, d in self.dimensions.items() if d.moves)

  def where(self, dimension: str) -> tuple[str, ...]:
    """Returns the names of the leaves that have a dimension.

    Args:
      dimension: its name.
    """
    return tuple(
      leaf
      for leaf, axes in self.axes.items()
      if any(dimension in axis for axis in axes)
    )

  def table(self, dimension: str) -> tuple[int, ...]:
    """Returns the shape of a dimension's permutation.

    Args:
      dimension: its name.
    """
    hidden = self.dimensions[dimension]
    outer = (self.dimensions[name].size for name in hidden.within)
    return (*outer, hidden.size)

  def size(self, factor: str | int) -> int:
    """Returns how many entries a factor of an axis has.

    Args:
      factor: the name of a dimension, or a number of entries.
    """
    return self.dimensions[factor].size if isinstance(factor, str) else factor

  def shape(self, leaf: str) -> tuple[int, ...]:
    """Returns the shape of a leaf.

    Args:
      leaf: its name.
    """
    return tuple(math.prod(map(self.size, axis)) for axis in self.axes[leaf])

  def __repr__(self) -> str:
    rows = []
    for name in self.moving:
      hidden = self.dimensions[name]
      inside = f", within {', '.join(hidden.within)}" if hidden.within else ""
      rows.append(f"  {name}: {hidden.size} units{inside}")
      rows.append(f"    in {', '.join(self.where(name))}")
      if name in self.unseen:
        rows.append(
          f"    the check sees nothing of {', '.join(self.unseen[name])}"
        )
    for key, reason in self.reasons.items():
      rows.append(f"  {key} keeps its order: {reason}")
    return "\n".join(["PermutationSpec", *rows])


def random_permutations(spec: PermutationSpec, seed: Any) -> Permutations:
  """Returns permutations of all dimensions, drawn at random.

  Args:
    spec: of the model.
    seed: a seed or a `numpy.random.Generator`.

  Example:
    >>> spec = PermutationSpec({"w:1": Hidden(3)}, {"w": ((2,), ("w:1",))})
    >>> sorted(random_permutations(spec, 0)["w:1"].tolist())
    [0, 1, 2]
  """
  rng = np.random.default_rng(seed)
  identity = identities(spec)
  return {n: rng.permuted(identity[n], axis=-1) for n in spec.moving}


def identities(spec: PermutationSpec) -> Permutations:
  """Returns the permutations that change nothing.

  Args:
    spec: of the model.
  """
  return {
    name: np.broadcast_to(
      np.arange(spec.dimensions[name].size, dtype=np.int32), spec.table(name)
    ).copy()
    for name in spec.moving
  }


def permute(
  spec: PermutationSpec, permutations: Permutations, tree: Any
) -> Any:
  """Returns a pytree with its hidden units in another order.

  Args:
    spec: of the model.
    permutations: by dimension; those left out stay.
    tree: pytree of arrays with the leaves of the model, its parameters or
      what has their shapes (an optimizer's moments, a Fisher diagonal).
      Patches: `permute_patch`.

  Returns:
    A pytree of the same structure, dtypes and shardings: the same numbers in
    other places.

  Raises:
    MismatchError: if leaves or permutations do not fit; lists them.

  Example:
    >>> spec = PermutationSpec({"w:1": Hidden(2)}, {"w": ((2,), ("w:1",))})
    >>> w = np.float32([[1, 2], [3, 4]])
    >>> permute(spec, {"w:1": np.int32([1, 0])}, {"w": w})["w"].tolist()
    [[2.0, 1.0], [4.0, 3.0]]
  """
  check_permutations(spec, permutations)
  named, treedef = flatten(tree)
  check_leaves(spec, named)
  moved = {
    name: permuted_leaf(spec, permutations, spec.axes[name], leaf)
    if name in spec.axes
    else leaf
    for name, leaf in named.items()
  }
  return jax.tree.unflatten(treedef, moved.values())


def permuted_leaf(
  spec: PermutationSpec,
  permutations: Permutations,
  axes: Sequence[Axis],
  leaf: Any,
) -> Any:
  """Returns one array with its hidden units in another order.

  Args:
    spec: of the model.
    permutations: by dimension.
    axes: the factors of each axis of the array.
    leaf: the array.
  """
  factors = [factor for axis in axes for factor in axis]
  if not any(factor in permutations for factor in factors):
    return leaf
  if not isinstance(leaf, jax.Array):
    return permuted_array(spec, permutations, factors, np.asarray(leaf), np)
  return meshes.on_leaf_mesh(
    lambda x: permuted_array(spec, permutations, factors, x, jnp), leaf, leaf
  )


def permuted_array(
  spec: PermutationSpec,
  permutations: Permutations,
  factors: Sequence[str | int],
  array: Any,
  xp: Any = np,
) -> Any:
  """Returns an array, permuted along the factors of its entries.

  Args:
    spec: of the model.
    permutations: by dimension.
    factors: of all entries, row by row.
    array: of any shape with that many entries.
    xp: `numpy` or `jax.numpy`.
  """
  sizes = [spec.size(factor) for factor in factors]
  full = array.reshape(sizes)
  for place in in_order(spec, factors):
    name = factors[place]
    if name not in permutations:
      continue
    table = permutations[name]
    within = spec.dimensions[name].within
    if not within:
      full = xp.take(full, table, axis=place)
      continue
    # Outer dimensions have been permuted: the table's rows are as they are.
    places = [*(factors.index(outer) for outer in within), place]
    order = np.argsort(places)
    shape = [1] * len(sizes)
    for axis in places:
      shape[axis] = sizes[axis]
    index = np.transpose(table, order).reshape(shape)
    full = xp.take_along_axis(full, xp.asarray(index), axis=place)
  return full.reshape(array.shape)


def in_order(spec: PermutationSpec, factors: Sequence[str | int]) -> list[int]:
  """Returns the places of named factors, outer dimensions first.

  Args:
    spec: of the model.
    factors: names and sizes.
  """
  places = [i for i, f in enumerate(factors) if isinstance(f, str)]
  return sorted(places, key=lambda i: depth(spec, str(factors[i])))


def depth(spec: PermutationSpec, name: str) -> int:
  """Returns how many dimensions a dimension lies within.

  Args:
    spec: of the model.
    name: of the dimension.
  """
  return len(spec.dimensions[name].within)


def composed(
  spec: PermutationSpec, first: Permutations, then: Permutations
) -> Permutations:
  """Returns the permutations that do what two do one after the other.

  Args:
    spec: of the model.
    first: done first; dimensions left out stay.
    then: done after; dimensions left out stay.

  Returns:
    One for each dimension.

  Example:
    >>> spec = PermutationSpec({"w:0": Hidden(3)}, {"w": (("w:0",),)})
    >>> turn = {"w:0": np.int32([1, 2, 0])}
    >>> composed(spec, turn, turn)["w:0"].tolist()
    [2, 0, 1]
  """
  # A table is itself an array whose axes are the dimension and those outside.
  return {
    name: permuted_array(
      spec, then, (*spec.dimensions[name].within, name), table
    )
    for name, table in (identities(spec) | first).items()
  }


def check_permutations(spec: PermutationSpec, permutations: Permutations):
  """Raises MismatchError unless these are permutations of these dimensions.

  Args:
    spec: of the model.
    permutations: by dimension.
  """
  bad = []
  for name, table in permutations.items():
    if name not in spec.moving:
      bad.append(f" - {name}: no dimension of the model that moves")
    elif np.shape(table) != spec.table(name):
      bad.append(
        f" - {name}: expected shape {spec.table(name)}, got {np.shape(table)}"
      )
    elif (np.sort(table, -1) != np.arange(spec.dimensions[name].size)).any():
      bad.append(f" - {name}: not every unit occurs once")
  if bad:
    raise MismatchError("permutations do not fit:\n" + "\n".join(bad))


def check_leaves(spec: PermutationSpec, named: Mapping[str, Any]) -> None:
  """Raises MismatchError unless leaves have the sizes that a spec says.

  Args:
    spec: of the model.
    named: the leaves by text name.
  """
  bad = []
  for name in spec.axes:
    shape = spec.shape(name)
    if name not in named:
      bad.append(f" - {name}: missing, expected shape {shape}")
    elif tuple(np.shape(named[name])) != shape:
      bad.append(
        f" - {name}: expected shape {shape}, got {np.shape(named[name])}"
      )
  if bad:
    raise MismatchError("leaves do not fit the spec:\n" + "\n".join(bad))


def from_axes(
  params: Any, axes: Mapping[str, Sequence[Any]], within: Mapping[str, Any]
) -> PermutationSpec:
  """Returns the spec that somebody wrote down, unchecked.

  Args:
    params: pytree of arrays, or of their shapes.
    axes: for leaves by text name, one entry an axis: None, the name of a
      dimension, or a tuple of names and sizes, the slowest first.
    within: for dimensions, the names of those they may differ within.

  Raises:
    MismatchError: if sizes do not fit; lists them.
    StructureError: if a leaf is not there.
  """
  named = named_leaves(params)
  sizes: dict[str, int] = {}
  found: dict[str, tuple[Axis, ...]] = {}
  bad = []
  for leaf, entries in axes.items():
    if leaf not in named:
      raise StructureError(
        f"no leaf is named {leaf!r}; there are {', '.join(named)}"
      )
    shape = np.shape(named[leaf])
    if len(entries) != len(shape):
      bad.append(f" - {leaf}: {len(entries)} entries for shape {shape}")
      continue
    own = []
    for entry, size in zip(entries, shape):
      if entry is None:
        own.append((size,))
      elif isinstance(entry, str):
        own.append((entry,))
        if sizes.setdefault(entry, size) != size:
          bad.append(f" - {leaf}: {entry} is {sizes[entry]} and {size}")
      else:
        own.append(tuple(entry))
    found[leaf] = tuple(own)
  _solve_products(named, found, sizes, bad)
  if bad:
    raise MismatchError("sizes do not fit:\n" + "\n".join(bad))
  wide = {d: tuple(outer) for d, outer in within.items()}
  dimensions = {
    name: Hidden(size, wide.get(name, ())) for name, size in sizes.items()
  }
  spec = PermutationSpec(dimensions, found)
  check_leaves(spec, named)
  return spec


def _solve_products(named, found, sizes, bad):
  """Finds sizes that are given only as what is left of an axis."""
  cut = [
    (leaf, axis, size)
    for leaf, axes in found.items()
    for axis, size in zip(axes, np.shape(named[leaf]))
  ]

  def unknown(axis):
    return [f for f in axis if isinstance(f, str) and f not in sizes]

  before = -1
  while len(sizes) > before:  # what one axis tells may be what another lacks
    before = len(sizes)
    for _, axis, size in cut:
      match unknown(axis):
        case [name]:
          known = (sizes.get(f, f) for f in axis if f != name)
          sizes[name] = size // max(math.prod(known), 1)
  bad += [
    f" - {leaf}: the sizes of {', '.join(names)} are not known; name one of "
    "them where it is alone on an axis, or give it as a number"
    for leaf, axis, _ in cut
    if (names := unknown(axis))
  ]
