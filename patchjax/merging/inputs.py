"""What a merge is given: a base and contributors, checked and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from patchjax.patches import engine, laws
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch, Structure
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import (
  KINDS,
  dtype_name,
  host,
  is_array,
  is_key,
  is_wide,
)
from patchjax.trees.errors import DtypeError, MismatchError, StructureError
from patchjax.trees.names import named_leaves
from patchjax.trees.selectors import select_named


def is_float(leaf: Any) -> bool:
  """Returns whether a leaf holds real floating point numbers: is merged."""
  if not is_array(leaf) or is_key(leaf):
    return False
  kind = KINDS[dtype_name(leaf)]
  return kind.floating and kind.words == 1


def sources_of(
  base: Mapping[str, Any], contributors: Sequence[Any], *, same: bool = False
) -> list[dict[str, Any]]:
  """Returns, for each contributor, its leaf or delta by name where it has one.

  Args:
    base: named leaves of the base.
    contributors: pytrees with the leaves of the base, or patches on it.
    same: whether a contributor's leaf that is the base's own object is there
      too, and not left out as no change.

  Raises:
    MismatchError: if a contributor does not fit the base; lists every leaf.
    StructureError: if a patch is structural, or there is no contributor.
  """
  if isinstance(contributors, Patch) or not isinstance(
    contributors, list | tuple
  ):
    raise TypeError(
      "contributors must be a list of pytrees or patches, got "
      f"{type(contributors).__name__}"
    )
  if not contributors:
    raise StructureError("there is nothing to merge: contributors is empty")
  arrays = {name: leaf for name, leaf in base.items() if is_array(leaf)}
  if not arrays:
    raise StructureError("the base holds no arrays, so nothing can be merged")
  found = []
  for i, contributor in enumerate(contributors):
    what = f"contributor {i}"
    if isinstance(contributor, Patch):
      found.append(of_patch(arrays, contributor, what))
      continue
    leaves = named_leaves(contributor)
    check_named(arrays, leaves, what=what)
    changed = [
      name
      for name, leaf in base.items()
      if not is_array(leaf) and leaf != leaves.get(name, leaf)
    ]
    if changed:
      raise MismatchError(
        f"{what} differs in leaves that are no arrays: {', '.join(changed)}; "
        "make them equal"
      )
    found.append(
      {
        name: leaves[name]
        for name, leaf in arrays.items()
        if same or leaves[name] is not leaf
      }
    )
  return found


def of_patch(
  arrays: Mapping[str, Any], patch: Patch, what: str
) -> dict[str, Any]:
  """Returns the deltas of a patch by name, if it fits.

  Args:
    arrays: named leaves of the base.
    patch: the patch.
    what: what it is called, for messages.

  Raises:
    MismatchError: if it does not fit the base; lists every leaf.
    StructureError: if it is structural.
  """
  if patch.structural:
    raise StructureError(
      f"{what} inserts, deletes or renames leaves; such patches are not "
      "averaged: apply it to the base and to the other contributors first"
    )
  if patch.structure is not None and patch.structure != Structure.of(arrays):
    check_named(
      patch.structure.leaves, arrays, what=f"the base that {what} is for"
    )
  absent = [name for name in patch.deltas if name not in arrays]
  if absent:
    raise MismatchError(
      f"{what} changes leaves that the base lacks:\n"
      + "\n".join(f" - {name}" for name in absent)
      + "\nto mend it: patch.rename(rules)"
    )
  return dict(patch.deltas)


def floats_of(base: Mapping[str, Any], only: Any) -> dict[str, Any]:
  """Returns the leaves that are merged: floating point, picked by `only`.

  Args:
    base: named leaves of the base.
    only: a selector, or None for all.

  Raises:
    SelectionError: if `only` picks nothing.
  """
  picked = (
    base
    if only is None
    else dict.fromkeys(
      select_named({n: x for n, x in base.items() if is_array(x)}, only)
    )
  )
  return {name: base[name] for name in picked if is_float(base[name])}


def agreed(
  base: Mapping[str, Any],
  sources: Sequence[Mapping[str, Any]],
  names: Sequence[str],
) -> dict[str, Any]:
  """Returns the leaves on which all contributors must agree, changed or not.

  Integers, booleans, complex numbers and PRNG keys have no mean. Traced
  leaves cannot be compared: of those the base's are kept.

  Args:
    base: named leaves of the base.
    sources: from `sources_of`.
    names: of the leaves that are not merged.

  Raises:
    MismatchError: if contributors differ from each other; lists the leaves.
  """
  result, bad = {}, []
  for name in names:
    given = [source.get(name) for source in sources]
    if all(g is None for g in given):
      continue
    if engine.is_traced(base[name], given):
      continue
    values = [
      base[name]
      if g is None
      else laws.act(base[name], g)
      if isinstance(g, Delta)
      else g
      for g in given
    ]
    words = [host(value)[0] for value in values]
    if all(np.array_equal(words[0], other) for other in words[1:]):
      result[name] = values[0]
    else:
      bad.append(f" - {name}: {dtype_name(base[name])}")
  if bad:
    raise MismatchError(
      "contributors differ in leaves that have no mean:\n"
      + "\n".join(bad)
      + "\nto mend it: make them equal, or leave them out with only="
    )
  return result


def check_narrow(leaves: Mapping[str, Any]) -> None:
  """Refuses 64-bit leaves while JAX would narrow them.

  Args:
    leaves: named leaves to be merged.

  Raises:
    DtypeError: lists them.
  """
  wide = [f" - {n}: {dtype_name(x)}" for n, x in leaves.items() if is_wide(x)]
  if wide:
    raise DtypeError(
      "64-bit leaves cannot be merged while JAX narrows them to 32 bits:\n"
      + "\n".join(wide)
      + "\nto mend it: jax.config.update('jax_enable_x64', True), or cast "
      "them, or leave them out with only="
    )


def changed_of(
  base: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Returns the sources without leaves that are the base's own objects.

  Args:
    base: named leaves of the base.
    sources: from `sources_of`.
  """
  return [
    {name: x for name, x in source.items() if x is not base[name]}
    for source in sources
  ]


def grouped(
  leaves: Mapping[str, Any], methods: Mapping[Any, Any]
) -> list[tuple[Any, dict[str, Any]]]:
  """Returns the leaves that fall to each selector; the first that fits wins.

  Args:
    leaves: named leaves.
    methods: a mapping whose keys are selectors.

  Returns:
    `(key, its leaves)` for each key; leaves of no group are left out.

  Raises:
    SelectionError: if a selector picks nothing at all.
  """
  left, groups = dict(leaves), []
  for selector in methods:
    names = leaves if selector is None else select_named(leaves, selector)
    picked = [name for name in names if name in left]
    groups.append((selector, {name: left.pop(name) for name in picked}))
  return groups


def on_device(leaf: Any, like: Any = None) -> Any:
  """Returns a leaf where passes can read it again and again.

  Args:
    leaf: array, on the host or on devices.
    like: the base's leaf: another placement than its own is moved there.
  """
  if isinstance(leaf, Tracer) or isinstance(like, Tracer):
    return leaf
  if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
    if not isinstance(leaf, jax.Array) or leaf.sharding != like.sharding:
      return jax.device_put(leaf, like.sharding)
    return leaf
  return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)


def abstract(entry: Any) -> jax.ShapeDtypeStruct:
  """Returns the abstract leaf of an entry of a patch's structure.

  Args:
    entry: name of the dtype, and shape.
  """
  if entry.dtype not in KINDS:  # PRNG keys; only that it is no float matters
    return jax.ShapeDtypeStruct(entry.shape, np.uint32)
  return jax.ShapeDtypeStruct(entry.shape, KINDS[entry.dtype].dtype)
