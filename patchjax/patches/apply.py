"""apply and revert: a patch and a value give a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import laws, pinned
from patchjax.patches.checks import check_deltas
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.patches.meshes import on_leaf_mesh
from patchjax.patches.patch import Patch, Structure
from patchjax.trees.check import check_named
from patchjax.trees.digest import tree_id
from patchjax.trees.dtypes import is_array, is_traced, is_wide
from patchjax.trees.errors import (
  BaseMismatchError,
  DtypeError,
  LawError,
  MismatchError,
  StructureError,
)
from patchjax.trees.names import flatten, named_leaves, split


def apply(
  base: Any,
  patch: Patch,
  *,
  missing: Literal["error", "keep"] = "error",
  extra: Literal["error", "ignore"] = "error",
  dtype: Any = None,
  like: Any = None,
  donate: bool = False,
) -> Any:
  """Returns a value with a patch applied.

  Works inside `jit`, `grad`, `vmap` (over `stack`ed patches), `scan`,
  `remat` and `shard_map`, and on any mesh. Outside `jit` each leaf runs in a
  compiled function of its own, cached by shape, dtype and sharding.

  Args:
    base: pytree of arrays.
    patch: the patch.
    missing: "error", or "keep" to skip deltas whose leaf `base` lacks.
    extra: "error", or "ignore" to allow leaves that the patch's base did not
      have; they are passed through.
    dtype: dtype of the floating point leaves that the patch touches; by
      default their own. `jnp.float32` keeps small updates of a bfloat16 base
      that rounding would swallow.
    like: for patches that insert, delete or rename leaves: a pytree of the
      structure of the result. Without it nested dicts and lists are rebuilt.
    donate: whether the touched leaves of `base` may be overwritten: the fast
      path outside `jit` (inside, donate at the outer `jit`).

  Returns:
    A pytree of the same structure, shapes, dtypes and shardings as `base`,
    unless the patch is structural or `dtype` is given. Leaves the patch does
    not touch are the same objects.

  Raises:
    MismatchError: if `base` does not have the leaves the patch was made for;
      lists every one.
    DtypeError: if a 64-bit leaf would be narrowed inside `jit`.
    StructureError: if the result's containers cannot be told without `like`.
    TypeError: if `patch` is no `Patch`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([1, 2])}
    >>> patch = pj.diff(base, {"w": np.float32([1, 4])})
    >>> pj.apply(base, patch)["w"].tolist()
    [1.0, 4.0]
  """
  if not isinstance(patch, Patch):
    raise TypeError(
      f"expected a Patch, found {type(patch).__name__}; make one of two "
      "values with pj.diff(base, tuned)"
    )
  named, treedef = flatten(base)
  arrays = _check(named, patch.structure, missing, extra, "the base")
  deltas = patch.deltas
  if missing == "keep":
    deltas = {n: d for n, d in deltas.items() if n in arrays or _is_new(d)}
  check_deltas(arrays, deltas)
  changed = {}
  for name, leaf in named.items():
    match deltas.get(name):
      case None:
        changed[name] = leaf
      case Delta() as delta:
        changed[name] = _numeric(name, leaf, delta, dtype, donate)
      case Rename(to=to):
        changed[to] = leaf
      case Insert(value=value, axis=int() as axis):
        changed[name] = _grow(leaf, value, axis)
  if all(isinstance(delta, Delta) for delta in deltas.values()):
    return jax.tree.unflatten(treedef, changed.values())
  changed |= {n: d.value for n, d in deltas.items() if _is_new(d)}
  return _rebuild(base, changed, like)


def revert(
  params: Any, patch: Patch, *, like: Any = None, donate: bool = False
) -> Any:
  """Returns the value that a patch was applied to.

  Exact for law `bits` (`diff(..., exact=True)`); `add` and `mul` round, and
  what was multiplied by zero comes back as NaN.

  Args:
    params: what `apply(base, patch)` gave.
    patch: the patch.
    like: pytree of the base's structure, for structural patches.
    donate: whether the touched leaves of `params` may be overwritten.

  Returns:
    A pytree of the structure, dtypes and shardings of `params` (of the
    patch's base, if it is structural).

  Raises:
    LawError: if the old numbers are not in the patch: law `set`, `Delete`.
    MismatchError: if `params` is not what the patch gives.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([0.1, 2])}
    >>> patch = pj.diff(base, {"w": np.float32([7, 4])}, exact=True)
    >>> bool((pj.revert(pj.apply(base, patch), patch)["w"] == base["w"]).all())
    True
  """
  named, treedef = flatten(params)
  lost = [
    name
    for name, delta in patch.deltas.items()
    if isinstance(delta, Delete)
    or (isinstance(delta, Delta) and laws.LAWS[delta.law].undo is None)
  ]
  if lost:
    raise LawError(
      "the patch does not hold the old numbers of "
      f"{', '.join(lost)} (law 'set', or deleted), so it cannot be "
      "reverted; make it with `diff(old, new, exact=True)`, or check the "
      "old value out of its history"
    )
  arrays = _check(named, patch.result(), "error", "error", "the value")
  # What was renamed goes by its new name, and by its old one afterwards.
  old = {d.to: n for n, d in patch.deltas.items() if isinstance(d, Rename)}
  numeric = {n: d for n, d in patch.deltas.items() if isinstance(d, Delta)}
  absent = [
    n for n in patch.deltas if n not in arrays and n not in old.values()
  ]
  absent += [n for n in old if n not in arrays]
  if absent:
    raise MismatchError(
      f"the value lacks leaves that the patch gives: {', '.join(absent)}"
    )
  check_deltas(arrays, numeric)
  changed = {}
  for name, leaf in named.items():
    if name in old:
      changed[old[name]] = leaf
      continue
    match patch.deltas.get(name):
      case Delta() as delta:
        changed[name] = _numeric(name, leaf, delta, None, donate, True)
      case Insert(axis=None):
        pass
      case Insert(value=value, axis=int() as axis):
        keep = leaf.shape[axis] - value.shape[axis]
        changed[name] = jax.lax.slice_in_dim(leaf, 0, keep, axis=axis)
      case _:
        changed[name] = leaf
  if not patch.structural:
    return jax.tree.unflatten(treedef, changed.values())
  return _rebuild(params, changed, like)


def check_base(base: Any, patch: Patch) -> None:
  """Checks that a patch was made for this very value, to the bit.

  Args:
    base: pytree of fully addressable arrays.
    patch: a patch; its `base` digest is compared if it has one.

  Raises:
    MismatchError: if names, shapes or dtypes differ.
    BaseMismatchError: if the numbers differ, or the patch does not say for
      which value it was made.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([1, 2])}
    >>> patch = pj.diff(base, base)
    >>> pj.check_base(base, patch.replace(base=pj.trees.tree_id(base)))
  """
  named = named_leaves(base)
  _check(named, patch.structure, "error", "error", "the base")
  if patch.base is None:
    raise BaseMismatchError(
      "the patch does not say for which value it was made; save it with "
      "`patch.save(path, base=params)`"
    )
  found = tree_id(base)
  if found != patch.base:
    raise BaseMismatchError(
      f"wrong base: the patch was made for {patch.base[:12]}, found "
      f"{found[:12]} (same structure, other numbers); apply it to its own "
      "base, or merge it"
    )


def _check(
  named: dict[str, Any],
  structure: Structure | None,
  missing: Literal["error", "keep"],
  extra: Literal["error", "ignore"],
  what: str,
) -> dict[str, Any]:
  """Checks names, shapes and dtypes; returns the leaves that are arrays."""
  arrays = {name: leaf for name, leaf in named.items() if is_array(leaf)}
  # The digests agree nearly always; the table is for the message.
  if structure is not None and structure != Structure.of(arrays):
    check_named(
      structure.leaves, arrays, missing=missing, extra=extra, what=what
    )
  return arrays


def _is_new(delta: AnyDelta) -> TypeGuard[Insert]:
  return isinstance(delta, Insert) and delta.axis is None


def _numeric(
  name: str,
  leaf: Any,
  delta: Delta,
  dtype: Any,
  donate: bool,
  undo: bool = False,
) -> Any:
  if is_wide(leaf):
    return _wide(name, leaf, delta, dtype, undo)
  if dtype is not None and not jnp.issubdtype(leaf.dtype, jnp.inexact):
    dtype = None
  function = _UNDO if undo else _ACT
  try:
    return function[donate and isinstance(leaf, jax.Array)](leaf, delta, dtype)
  except LawError as error:
    raise LawError(f"{name}: {error}") from None


def _leaf(
  function: Callable[..., jax.Array], leaf: Any, delta: Delta, dtype: Any
) -> jax.Array:
  return on_leaf_mesh(
    lambda x, d: function(x, d, dtype) if dtype else function(x, d),
    leaf,
    leaf,
    delta,
  )


def _act(leaf: Any, delta: Delta, dtype: Any) -> jax.Array:
  return _leaf(laws.act, leaf, delta, dtype)


def _undo(leaf: Any, delta: Delta, dtype: Any) -> jax.Array:
  return _leaf(laws.undo, leaf, delta, dtype)


# One compiled function a leaf shape: a jit over a tree of 1,000 leaves takes
# 28 times as long to compile. Indexed by whether the leaf is donated.
_ACT = tuple(
  jax.jit(_act, static_argnums=2, donate_argnums=donated)
  for donated in ((), (0,))
)
_UNDO = tuple(
  jax.jit(_undo, static_argnums=2, donate_argnums=donated)
  for donated in ((), (0,))
)


def _wide(name: str, leaf: Any, delta: Delta, dtype: Any, undo: bool) -> Any:
  """64-bit leaves while JAX is set to 32: on the host, or not at all."""
  if any(is_traced(x) for x in jax.tree.leaves(delta)):
    raise DtypeError(
      f"{name}: {leaf.dtype} leaves cannot be traced while JAX narrows them "
      "to 32 bits; set jax_enable_x64, or patch them outside jit"
    )
  out = pinned.apply_host(leaf, delta, undo=undo)
  return out if dtype is None else np.asarray(out).astype(dtype)


def _grow(leaf: Any, rows: Any, axis: int) -> Any:
  def concatenate(leaf, rows):
    return jnp.concatenate([jnp.asarray(leaf), jnp.asarray(rows)], axis=axis)

  if is_wide(leaf):
    return np.concatenate([leaf, rows], axis=axis)
  return on_leaf_mesh(concatenate, leaf, leaf, rows)


def _rebuild(base: Any, named: dict[str, Any], like: Any) -> Any:
  """The containers of a changed tree, around its leaves."""
  if like is not None:
    wanted, treedef = flatten(like)
    check_named(
      {k: v for k, v in wanted.items() if is_array(v)},
      {k: v for k, v in named.items() if is_array(v)},
      what="the patched value, compared with `like`,",
    )
    return jax.tree.unflatten(treedef, [named[name] for name in wanted])
  leaves = {split(name): leaf for name, leaf in named.items()}
  return _containers(base, leaves, ())


def _containers(old: Any, leaves: dict[Any, Any], path: Any) -> Any:
  """Rebuilds dicts and lists below `path`, keys of the old kinds kept."""
  if path in leaves:
    return leaves[path]
  parts = dict.fromkeys(p[len(path)] for p in leaves if p[: len(path)] == path)
  # Empty containers and None hold no leaf, and stay where they were.
  if not parts and not jax.tree.leaves(old):
    return old
  if old is not None and type(old) not in (dict, list):
    raise StructureError(
      "a structural patch rebuilds nested dicts and lists only, found "
      f"{type(old).__name__} at {'/'.join(path) or 'the top'}; pass like= "
      "with the structure of the result"
    )
  children = dict(enumerate(old)) if type(old) is list else old or {}
  parts |= {str(k): None for k, v in children.items() if not jax.tree.leaves(v)}
  if type(old) is list:
    wanted = [str(i) for i in range(len(parts))]
    if set(parts) != set(wanted):
      raise StructureError(
        f"the patch leaves a gap in the list at {'/'.join(path) or 'the top'}"
        f": items {', '.join(parts)}; pass like= with the wanted structure"
      )
    return [
      _containers(old[i] if i < len(old) else None, leaves, (*path, part))
      for i, part in enumerate(wanted)
    ]
  keys = {str(key): key for key in children}
  return {
    keys.get(part, part): _containers(
      children.get(keys.get(part, part)), leaves, (*path, part)
    )
    for part in parts
  }
