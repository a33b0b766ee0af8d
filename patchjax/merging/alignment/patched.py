"""Patches whose hidden units are put in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from patchjax.merging.alignment import specs
from patchjax.patches.codes import Code, Dense, LowRank, Quantized, Sparse
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.trees.errors import MismatchError, StructureError


def permute_patch(
  spec: specs.PermutationSpec, permutations: specs.Permutations, patch: Patch
) -> Patch:
  """Returns the patch that does to permuted parameters what this one did.

  `apply(permute(base), permute_patch(patch))` is
  `permute(apply(base, patch))`. So a patch made for one model is carried to
  another that was aligned with it.

  Args:
    spec: of the model.
    permutations: by dimension; those left out stay.
    patch: of numeric deltas. Low-rank factors stay low-rank, sparse entries
      sparse; quantized numbers become dense ones, since blocks with one scale
      are torn apart.

  Returns:
    A patch for the permuted base, with that base's digest unknown.

  Raises:
    MismatchError: if permutations or deltas do not fit; lists them.
    StructureError: if the patch inserts, deletes or renames leaves.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> from patchjax.merging.alignment import Hidden, PermutationSpec
    >>> spec = PermutationSpec({"w:0": Hidden(3)}, {"w": (("w:0",),)})
    >>> base, tuned = {"w": np.zeros(3, "f")}, {"w": np.float32([1, 2, 3])}
    >>> turned = pj.merging.permute_patch(
    ...   spec, {"w:0": np.int32([2, 0, 1])}, pj.diff(base, tuned))
    >>> turned.deltas["w"].code.values.tolist()
    [3.0, 1.0, 2.0]
  """
  specs.check_permutations(spec, permutations)
  if patch.structural:
    raise StructureError(
      "a patch that inserts, deletes or renames leaves cannot be permuted: "
      "apply it, and permute the parameters"
    )
  deltas, bad = {}, []
  for name, delta in patch.deltas.items():
    axes = spec.axes.get(name)
    if axes is None or not _moves(permutations, axes):
      deltas[name] = delta
      continue
    assert isinstance(delta, Delta)
    misfit = _misfit(spec, name, delta.code)
    if not misfit:
      code = _code(spec, permutations, name, delta.code)
      deltas[name] = Delta(code, delta.law)
    bad += misfit
  if bad:
    raise MismatchError("deltas do not fit the spec:\n" + "\n".join(bad))
  return Patch(deltas, patch.structure)


def _moves(permutations, axes: Sequence[specs.Axis]) -> bool:
  return any(factor in permutations for axis in axes for factor in axis)


def _misfit(spec, leaf: str, code: Code) -> list[str]:
  """Returns what is wrong with the shape of a delta, if anything."""
  expected, found = spec.shape(leaf), tuple(code.shape)
  # Numbers may be equal along an axis, and held once; factors and places not.
  once = isinstance(code, Dense | Quantized) and len(found) == len(expected)
  if found == expected or (
    once and all(n in (1, size) for n, size in zip(found, expected))
  ):
    return []
  return [f" - {leaf}: expected shape {expected}, got {found}"]


def _code(spec, permutations, leaf: str, code: Code) -> Code:
  axes = spec.axes[leaf]
  match code:
    case LowRank():
      last = code.a.ndim - 1
      batch, rank = axes[: code.batch], ((code.rank,),)
      sides = ((*axes[:last], *rank), (*batch, *rank, *axes[last:]))
      if all(_whole(spec, permutations, side) for side in sides):
        a, b = (
          specs.permuted_leaf(spec, permutations, side, factor)
          for side, factor in zip(sides, (code.a, code.b))
        )
        return LowRank(a, b, code.scale, code.batch)
    case Sparse() if code.indices.ndim == 1:
      return _sparse(spec, permutations, axes, code)
  values: Any = code.dense()
  # An axis of size 1 stands for equal numbers, in any order.
  own = [
    (1,) if size == 1 else axis
    for size, axis in zip(values.shape, axes, strict=True)
  ]
  if not _whole(spec, permutations, own):
    own = axes
    values = np.broadcast_to(np.asarray(values), spec.shape(leaf))
  return Dense(specs.permuted_leaf(spec, permutations, own, values))


def _whole(spec, permutations, axes) -> bool:
  """Whether dimensions come together with those they lie within."""
  here = {factor for axis in axes for factor in axis}
  return all(
    set(spec.dimensions[f].within) <= here for f in here if f in permutations
  )


def _sparse(spec, permutations, axes, code: Sparse) -> Code:
  """Moves positions: entry x[p[i]] is now at i."""
  shape = tuple(code.shape)
  places = np.arange(int(np.prod(shape)), dtype=np.int32)
  source = specs.permuted_leaf(spec, permutations, axes, places.reshape(shape))
  target = np.empty_like(places)
  target[np.ravel(source)] = places
  indices = np.asarray(code.indices)
  held = indices < places.size
  moved = np.where(held, target[np.where(held, indices, 0)], indices)
  order = np.argsort(moved, kind="stable")
  values: Any = code.values
  if isinstance(values, Quantized):
    values = values.dense()
  return Sparse(np.asarray(values)[order], moved[order].astype(np.int32), shape)
