"""Patch: the difference between two values of a model, as a value itself."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.trees.digest import Entry, canonical_json
from patchjax.trees.dtypes import dtype_name, is_array
from patchjax.trees.names import named_leaves
from patchjax.trees.renaming import rename_map

if TYPE_CHECKING:
  import os


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
  """Names, shapes and dtypes of a tree's arrays, without their numbers.

  Hashes and compares by its digest, so that it can be static under `jit` at
  the price of a string, and still say which leaf does not fit.

  Attributes:
    leaves: `{text name: Entry}`, the digests empty.
  """

  leaves: Mapping[str, Entry]

  @functools.cached_property
  def digest(self) -> str:
    """Hex SHA-256 of the sorted table of leaves."""
    table = {k: [list(e.shape), e.dtype] for k, e in self.leaves.items()}
    return hashlib.sha256(canonical_json(table)).hexdigest()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Structure) and (
      self is other or self.digest == other.digest
    )

  def __hash__(self) -> int:
    return hash(self.digest)

  def __repr__(self) -> str:
    return f"Structure({len(self.leaves)} leaves, {self.digest[:12]})"

  @classmethod
  def of(cls, named: Mapping[str, Any]) -> Structure:
    """Returns the structure of `{text name: leaf}`; only arrays count.

    Args:
      named: leaves; abstract ones will do.
    """
    return cls(
      {
        name: Entry("", dtype_name(leaf), tuple(leaf.shape))
        for name, leaf in named.items()
        if is_array(leaf)
      }
    )


def structure_of(tree: Any) -> Structure:
  """Returns names, shapes and dtypes of the arrays of a pytree.

  Args:
    tree: any pytree; abstract leaves will do.

  Raises:
    StructureError: if two leaves would get the same name.

  Example:
    >>> import numpy as np
    >>> structure_of({"w": np.zeros((2, 3), np.float32)}).leaves["w"].shape
    (2, 3)
  """
  return Structure.of(named_leaves(tree))


@jax.tree_util.register_pytree_with_keys_class
class Patch:
  """A change of a model's parameters: `{text name: delta}`.

  A patch is a pytree of the arrays of its deltas, so it passes through `jit`,
  `grad`, `vmap` and `scan`. Its only static part is the structure of its
  base. `base`, the digest of the value it was made from, is known at
  boundaries (a file, a repository) and is no part of the pytree: two bases of
  one structure do not compile twice.

  Attributes:
    deltas: `{text name: delta}`; leaves not named stay as they are.
    structure: structure of the base; None fits every base.
    base: tree id of the base, or None if it is not known.
  """

  __slots__ = ("base", "deltas", "structure")

  def __init__(
    self,
    deltas: Mapping[str, AnyDelta],
    structure: Structure | None = None,
    *,
    base: str | None = None,
  ):
    self.deltas = dict(deltas)
    self.structure = structure
    self.base = base

  def tree_flatten_with_keys(self):
    names = tuple(sorted(self.deltas))
    children = [(jax.tree_util.DictKey(n), self.deltas[n]) for n in names]
    return children, (names, self.structure)

  @classmethod
  def tree_unflatten(cls, static, children) -> Patch:
    names, structure = static
    return cls(dict(zip(names, children, strict=True)), structure)

  @property
  def names(self) -> tuple[str, ...]:
    """Text names of the leaves the patch touches, sorted."""
    return tuple(sorted(self.deltas))

  @property
  def nbytes(self) -> int:
    """Bytes of the patch's arrays in a file."""
    return sum(delta.nbytes for delta in self.deltas.values())

  @property
  def structural(self) -> bool:
    """Whether the patch inserts, deletes, renames or grows a leaf."""
    return not all(isinstance(d, Delta) for d in self.deltas.values())

  def replace(
    self, deltas: Mapping[str, AnyDelta] | None = None, **changes: Any
  ) -> Patch:
    """Returns the patch with other deltas, structure or base digest.

    Args:
      deltas: the new deltas; by default the same.
      **changes: `structure=` or `base=`.
    """
    kept = {"structure": self.structure, "base": self.base} | changes
    return Patch(self.deltas if deltas is None else deltas, **kept)

  def result(self) -> Structure | None:
    """Returns the structure of what applying the patch gives."""
    return None if self.structure is None else result_of(self, self.structure)

  def rename(self, rules: Mapping[str, str]) -> Patch:
    """Returns the patch for a tree whose leaves have other names.

    Args:
      rules: `{regular expression: template}`, see `patchjax.trees.rename`.

    Raises:
      SelectionError: if a rule matches nothing.
      StructureError: if two leaves would get the same name.
    """
    table = () if self.structure is None else self.structure.leaves
    targets = [d.to for d in self.deltas.values() if isinstance(d, Rename)]
    new = rename_map(dict.fromkeys([*table, *self.names, *targets]), rules)
    structure = self.structure and Structure(
      {new[name]: entry for name, entry in self.structure.leaves.items()}
    )
    deltas = {
      new[name]: Rename(new[delta.to]) if isinstance(delta, Rename) else delta
      for name, delta in self.deltas.items()
    }
    return Patch(deltas, structure)

  def save(self, path: str | os.PathLike[str], *, base: Any = None) -> None:
    """Writes the patch as one safetensors file; see `patches.files.save`."""
    from patchjax.patches import files

    files.save(self, path, base=base)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Patch:
    """Reads a patch file; see `patches.files.load`."""
    from patchjax.patches import files

    return files.load(path)

  def __add__(self, other: Patch) -> Patch:
    from patchjax.patches import algebra

    return algebra.add(self, other)

  def __mul__(self, number: Any) -> Patch:
    from patchjax.patches import algebra

    return algebra.multiply(self, number)

  __rmul__ = __mul__

  def __repr__(self) -> str:
    # No number is computed or fetched here: it would block, or hang.
    kinds: dict[str, int] = {}
    for delta in self.deltas.values():
      kind = kind_of(delta)
      kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))
    base = f", base {self.base[:12]}" if self.base else ""
    return f"Patch({listed or 'empty'}{base})"


def kind_of(delta: AnyDelta) -> str:
  """Returns what a delta is in a few words, such as `add sparse`.

  Args:
    delta: any delta.
  """
  if isinstance(delta, Delta):
    inner = getattr(delta.code, "values", None)
    nested = f" {type(inner).__name__}" if hasattr(inner, "words") else ""
    return f"{delta.law} {type(delta.code).__name__}{nested}".lower()
  return type(delta).__name__.lower()


def result_of(patch: Patch, structure: Structure) -> Structure:
  """Returns the structure that applying a patch gives.

  Args:
    patch: the patch.
    structure: that of the base.
  """
  leaves = {}
  for name, entry in structure.leaves.items():
    match patch.deltas.get(name):
      case Delete():
        continue
      case Rename(to=to):
        name = to
      case Insert(value=value, axis=int() as axis):
        shape = list(entry.shape)
        shape[axis] += value.shape[axis]
        entry = Entry("", entry.dtype, tuple(shape))
    leaves[name] = entry
  for name, delta in patch.deltas.items():
    if isinstance(delta, Insert) and delta.axis is None:
      value = delta.value
      leaves[name] = Entry("", dtype_name(value), tuple(value.shape))
  return Structure(leaves)
