"""diff: the patch between two values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import words
from patchjax.patches.codes import Dense
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert
from patchjax.patches.laws import compute_dtype
from patchjax.patches.meshes import on_leaf_mesh
from patchjax.patches.patch import Patch, Structure
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import (
  KINDS,
  dtype_name,
  host,
  is_array,
  is_key,
  is_traced,
  is_wide,
)
from patchjax.trees.errors import MismatchError, StructureError
from patchjax.trees.names import named_leaves
from patchjax.trees.selectors import select_named


def task_vector(leaf: Any, base: Any) -> Any:
  """Returns `f32(leaf) - f32(base)`, the task vector of one leaf.

  This very expression is used wherever a task vector is counted, trimmed or
  merged: counted in one precision and cut in another, a threshold would not
  keep the entries it was chosen for.

  Args:
    leaf: leaf of the tuned value.
    base: the same leaf of the base.

  Returns:
    float32 (float64 for 64-bit leaves), of the leaf's shape and sharding.
  """
  wide = compute_dtype(base)
  if is_wide(base):
    return np.asarray(leaf).astype(wide) - np.asarray(base).astype(wide)
  return jnp.asarray(leaf).astype(wide) - jnp.asarray(base).astype(wide)


def diff(
  base: Any,
  tuned: Any,
  *,
  exact: bool = False,
  only: Any = None,
  structural: bool = False,
) -> Patch:
  """Returns the patch that turns one value into another.

  By default the patch is arithmetic: each floating point leaf gets a dense
  task vector `f32(tuned) - f32(base)` of law `add`, which can be scaled,
  compressed and merged, and which *rounds*: `base + (tuned - base)` differs
  from `tuned` in the last bit of up to a fifth of float32 entries. Leaves
  that are not floating point get an exact delta if they differ.

  Args:
    base: pytree of arrays.
    tuned: pytree with the same leaves; its container may differ.
    exact: whether to take the difference of the bit patterns instead (law
      `bits`): `apply(base, patch)` is then `tuned` bit for bit, for every
      dtype, and `revert` undoes it.
    only: selector of the leaves to compare (see `patchjax.select`); by
      default all.
    structural: whether leaves that only one side has become `Insert` and
      `Delete`; by default they are an error.

  Returns:
    A `Patch`; its arrays have the leaves' shapes and shardings.

  Raises:
    MismatchError: if leaves are missing, extra, or of another shape or
      dtype; lists every one.
    SelectionError: if `only` picks nothing.
    StructureError: if there is no array to compare.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1, 2])}, {"w": np.float32([1, 4])}
    >>> pj.diff(a, b).deltas["w"].code.values.tolist()
    [0.0, 2.0]
    >>> pj.apply(a, pj.diff(a, b, exact=True))["w"].tolist()
    [1.0, 4.0]
  """
  old, new = named_leaves(base), named_leaves(tuned)
  _check_passengers(old, new)
  old = {name: leaf for name, leaf in old.items() if is_array(leaf)}
  new = {name: leaf for name, leaf in new.items() if is_array(leaf)}
  if not old:
    raise StructureError("diff: the base holds no arrays, so there is no patch")
  structure = Structure.of(old)
  if only is not None:
    picked = set(select_named(old | new, only))
    old = {name: leaf for name, leaf in old.items() if name in picked}
    new = {name: leaf for name, leaf in new.items() if name in picked}
  shared = check_named(
    old,
    new,
    missing="keep" if structural else "error",
    extra="ignore" if structural else "error",
    what="the tuned value",
  )
  deltas: dict[str, AnyDelta] = {}
  for name in shared:
    if exact or is_key(old[name]) or not KINDS[dtype_name(old[name])].floating:
      if exact or not _known_equal(old[name], new[name]):
        deltas[name] = Delta(
          Dense(_words_between(old[name], new[name])), "bits"
        )
    else:
      vector = on_leaf_mesh(task_vector, old[name], new[name], old[name])
      deltas[name] = Delta(Dense(vector), "add")
  if structural:
    deltas |= {name: Delete() for name in old if name not in new}
    deltas |= {n: Insert(leaf) for n, leaf in new.items() if n not in old}
  return Patch(deltas, structure)


def _check_passengers(old: dict[str, Any], new: dict[str, Any]) -> None:
  """Leaves that are no arrays cannot be patched, so they must agree."""
  changed = [
    f"  {name}: {leaf!r} -> {new[name]!r}"
    for name, leaf in old.items()
    if name in new
    and not (is_array(leaf) and is_array(new[name]))
    and (is_array(leaf) or is_array(new[name]) or leaf != new[name])
  ]
  if changed:
    raise MismatchError(
      "leaves that are not arrays differ, and a patch cannot hold them:\n"
      + "\n".join(changed)
      + "\nmake them arrays (numpy.asarray), or equal"
    )


def _known_equal(old: Any, new: Any) -> bool:
  """Whether two leaves are concrete and have the same bits."""
  if is_traced(old) or is_traced(new):
    return False
  if isinstance(old, jax.ShapeDtypeStruct):
    return False
  return bool(np.array_equal(host(old)[0], host(new)[0]))


def _words_between(old: Any, new: Any) -> Any:
  if not is_key(old) and is_wide(old):
    # JAX would narrow these; numpy does not.
    return host(new)[0] - host(old)[0]
  return on_leaf_mesh(
    lambda x, y: words.to_words(y) - words.to_words(x), old, old, new
  )
