"""The algebra of patches: adding, scaling, norms, stacking, structure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches.codes import Dense, LowRank, Quantized, Sparse
from patchjax.patches.compose import join
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.patches.meshes import number_on_mesh
from patchjax.patches.patch import Patch, Structure, kind_of
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import is_traced, is_wide
from patchjax.trees.errors import (
  BaseMismatchError,
  DtypeError,
  LawError,
  MismatchError,
  StructureError,
)
from patchjax.trees.names import named_leaves


def add(first: Patch, second: Patch) -> Patch:
  """Returns the sum of two additive patches on the same base.

  Args:
    first: deltas of law `add` only.
    second: the same, on the same base.

  Raises:
    BaseMismatchError: if the patches were made for different values.
    MismatchError: if their bases differ in structure.
    LawError: if a delta is not of law `add`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b, c = ({"w": np.float32([x])} for x in (1, 2, 5))
    >>> pj.apply(a, pj.diff(a, b) + pj.diff(a, c))["w"].tolist()
    [6.0]
  """
  if not isinstance(second, Patch):
    return NotImplemented
  if None not in (first.base, second.base) and first.base != second.base:
    raise BaseMismatchError(
      f"patches of different bases cannot be added: {first.base} and "
      f"{second.base}; merge them against a common base instead"
    )
  if None not in (first.structure, second.structure):
    assert first.structure is not None and second.structure is not None
    if first.structure != second.structure:
      check_named(
        first.structure.leaves,
        second.structure.leaves,
        what="the second patch's base",
      )
  deltas, more = _additive(first, "added"), _additive(second, "added")
  for name, delta in more.items():
    deltas[name] = join(name, deltas[name], delta) if name in deltas else delta
  return first.replace(
    deltas,
    structure=first.structure or second.structure,
    base=first.base or second.base,
  )


def multiply(patch: Patch, number: Any) -> Patch:
  """Returns an additive patch scaled by a number, which may be traced.

  Args:
    patch: deltas of law `add` only.
    number: the factor.

  Raises:
    LawError: if a delta is not of law `add`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = ({"w": np.float32([x])} for x in (1, 2))
    >>> pj.apply(a, 0.5 * pj.diff(a, b))["w"].tolist()
    [1.5]
  """
  if isinstance(number, Patch) or np.shape(number) != ():
    return NotImplemented
  deltas = {
    name: dataclasses.replace(delta, code=_scaled(delta.code, number))
    for name, delta in _additive(patch, "scaled").items()
  }
  return patch.replace(deltas)


def _scaled(code: Any, number: Any) -> Any:
  def times(x: Any) -> Any:
    if np.iscomplexobj(number) and not np.iscomplexobj(x):
      raise LawError(f"a complex factor of {x.dtype} numbers; give a real one")
    if is_wide(x) and not is_traced(number):
      return np.asarray(x) * x.dtype.type(number)
    _narrow(x)
    x = jnp.asarray(x)
    return x * jnp.asarray(number).astype(x.dtype)

  match code:
    case Sparse(values=Quantized() as values):
      return dataclasses.replace(code, values=_scaled(values, number))
    case Quantized(scales=scales):
      return dataclasses.replace(code, scales=times(scales))
    case LowRank(scale=scale):
      return dataclasses.replace(code, scale=times(scale))
  return dataclasses.replace(code, values=times(code.values))


def _narrow(x: Any) -> None:
  if is_wide(x):
    raise DtypeError(
      f"{x.dtype} numbers of a patch cannot be traced while JAX narrows them "
      "to 32 bits; set jax_enable_x64"
    )


def _additive(patch: Patch, what: str) -> dict[str, Delta]:
  """The deltas of a patch, all of law `add`."""
  deltas = {
    name: delta
    for name, delta in patch.deltas.items()
    if isinstance(delta, Delta) and delta.law == "add"
  }
  bad = [
    f"{name} ({kind_of(delta)})"
    for name, delta in patch.deltas.items()
    if name not in deltas
  ]
  if bad:
    raise LawError(
      f"only patches of law 'add' can be {what}, found: {', '.join(bad)}; "
      "make an arithmetic one with `diff(base, apply(base, patch))`"
    )
  return deltas


def norm(patch: Patch) -> jax.Array:
  """Returns the Euclidean norm of an additive patch, over all its leaves.

  Low-rank products are not formed: their norm comes from the small Gram
  matrices of the factors.

  Args:
    patch: deltas of law `add` only.

  Returns:
    float32 scalar.

  Raises:
    LawError: if a delta is not of law `add`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([0, 0])}, {"w": np.float32([3, 4])}
    >>> float(pj.norm(pj.diff(a, b)))
    5.0
  """
  deltas = _additive(patch, "measured")
  table = patch.structure.leaves if patch.structure is not None else {}
  total = jnp.zeros((), jnp.float32)
  for name, delta in deltas.items():
    code = delta.code
    square = number_on_mesh(_square, code)
    if isinstance(code, Dense) and name in table and code.values.size:
      # An axis of size 1 stands for equal numbers along that of the leaf.
      square = square * jnp.float32(table[name].size / code.values.size)
    total = total + square
  return jnp.sqrt(total)


def _square(code: Any) -> jax.Array:
  """Sum of squares of a code's numbers."""
  if isinstance(code, LowRank):
    batch = code.batch
    grams = []
    for x, rank in ((code.a, code.a.ndim - 1), (code.b, batch)):
      x = jnp.moveaxis(jnp.asarray(x).astype(jnp.float32), rank, -1)
      axes = tuple(range(batch, x.ndim - 1))
      lead = tuple(range(batch))
      grams.append(
        jax.lax.dot_general(
          x,
          x,
          ((axes, axes), (lead, lead)),
          precision=jax.lax.Precision.HIGHEST,
        )
      )
    scale = jnp.asarray(code.scale).astype(jnp.float32)
    # The true sum is not negative, a rounded one may be.
    return jnp.maximum(jnp.sum(grams[0] * grams[1]) * scale**2, 0)
  if isinstance(code, Sparse):
    return jnp.sum(jnp.square(code.entries(jnp.float32)))
  return jnp.sum(jnp.square(jnp.abs(code.dense())).astype(jnp.float32))


def stack(patches: Sequence[Patch]) -> Patch:
  """Returns one patch with a new leading axis on every array, for `vmap`.

  Sparse deltas are padded to the largest count with positions past the end,
  which do nothing. `jax.vmap(lambda p: f(pj.apply(base, p)))(stack(patches))`
  then evaluates all of them at once.

  Args:
    patches: patches of the same names, laws, codes, ranks and structure.

  Raises:
    MismatchError: if they differ in more than their numbers.
    LawError: if a patch is structural.
    DtypeError: if JAX would narrow its 64-bit numbers.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> a, b, c = ({"w": np.float32([x])} for x in (1, 2, 5))
    >>> many = pj.stack([pj.diff(a, b), pj.diff(a, c)])
    >>> jax.vmap(lambda p: pj.apply(a, p))(many)["w"].tolist()
    [[2.0], [5.0]]
  """
  patches = list(patches)
  if not patches:
    raise StructureError("stack: expected at least one patch, found none")
  head = patches[0]
  if any(patch.structural for patch in patches):
    raise LawError("structural patches change the tree and cannot be stacked")
  for i, patch in enumerate(patches):
    if patch.names != head.names:
      differ = sorted(set(patch.names) ^ set(head.names))
      raise MismatchError(
        f"patch {i} touches other leaves than patch 0: {', '.join(differ)}"
      )
    for name in head.names:
      if kind_of(patch.deltas[name]) != kind_of(head.deltas[name]):
        raise MismatchError(
          f"{name}: patch {i} is {kind_of(patch.deltas[name])}, patch 0 "
          f"{kind_of(head.deltas[name])}; give them one code and law"
        )
  padded = []
  most = {
    name: max(_nnz(patch.deltas[name]) for patch in patches)
    for name in head.names
  }
  for patch in patches:
    deltas = {n: _padded(d, most[n]) for n, d in patch.deltas.items()}
    padded.append(patch.replace(deltas))
  trees = [jax.tree.structure(patch) for patch in padded]
  shapes = [[x.shape for x in jax.tree.leaves(patch)] for patch in padded]
  for i, (tree, shape) in enumerate(zip(trees, shapes, strict=True)):
    if tree != trees[0] or shape != shapes[0]:
      raise MismatchError(
        f"patch {i} differs from patch 0 in shapes, ranks, block sizes or "
        "the structure of its base, so they cannot be stacked"
      )
  for x in jax.tree.leaves(padded[0]):
    _narrow(x)
  return jax.tree.map(lambda *xs: jnp.stack(xs), *padded)


def _nnz(delta: AnyDelta) -> int:
  code = getattr(delta, "code", None)
  return code.indices.shape[0] if isinstance(code, Sparse) else 0


def _padded(delta: AnyDelta, count: int) -> AnyDelta:
  code = getattr(delta, "code", None)
  if not isinstance(code, Sparse) or _nnz(delta) == count:
    return delta
  more = count - _nnz(delta)
  # Earlier padding may already stand at the first positions past the end.
  past = jnp.arange(more, dtype=jnp.int32) + jnp.int32(code.end + _nnz(delta))
  if code.indices.ndim == 2:
    past = jnp.stack([past, jnp.zeros_like(past)], axis=1)

  def pad(x: Any) -> jax.Array:
    return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))

  values = code.values
  if isinstance(values, Quantized):
    step, scales = values.block[0], values.scales
    if scales.shape[0] > 1:
      blocks = -(-count // step) - scales.shape[0]
      scales = jnp.pad(scales, (0, blocks))
    else:
      step = max(step, count)
    values = dataclasses.replace(
      values, words=pad(values.words), scales=scales, block=(step,)
    )
  else:
    values = pad(values)
  indices = jnp.concatenate([jnp.asarray(code.indices), past])
  assert isinstance(delta, Delta)
  return dataclasses.replace(delta, code=Sparse(values, indices, code.shape))


def restructure(
  base: Any,
  *,
  insert: Mapping[str, Any] | None = None,
  delete: Iterable[str] = (),
  rename: Mapping[str, str] | None = None,
) -> Patch:
  """Returns the structural patch that adds, removes or renames leaves.

  Args:
    base: pytree of arrays, or its abstract form.
    insert: `{text name: leaf}` to add.
    delete: text names of leaves to remove.
    rename: `{old text name: new text name}`.

  Raises:
    MismatchError: if a name is not there, or is taken.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([1])}
    >>> pj.apply(base, pj.patches.restructure(base, rename={"w": "kernel"}))
    {'kernel': array([1.], dtype=float32)}
  """
  structure = Structure.of(named_leaves(base))
  insert, rename, delete = insert or {}, rename or {}, tuple(delete)
  absent = [n for n in (*delete, *rename) if n not in structure.leaves]
  if absent:
    raise MismatchError(
      f"the base has no leaf {', '.join(map(repr, absent))}; it has "
      f"{', '.join(sorted(structure.leaves))}"
    )
  leaving = {*delete, *rename}
  kept = [n for n in structure.leaves if n not in leaving]
  counts = collections.Counter([*kept, *rename.values(), *insert])
  twice = sorted({n for n in counts if counts[n] > 1} | leaving & {*insert})
  if twice:
    raise MismatchError(
      f"the base or the patch already has {', '.join(twice)}; use another "
      "name, or a delta of law 'set' to replace a leaf"
    )
  deltas: dict[str, AnyDelta] = {n: Insert(x) for n, x in insert.items()}
  deltas |= {name: Delete() for name in delete}
  deltas |= {name: Rename(to) for name, to in rename.items()}
  return Patch(deltas, structure)
