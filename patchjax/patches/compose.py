"""compose: one patch that does what two do in turn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import laws, pinned
from patchjax.patches.codes import Dense, LowRank, Sparse, number_dtype
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.patches.meshes import on_leaf_mesh
from patchjax.patches.patch import Patch, kind_of
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import is_traced, is_wide, widened
from patchjax.trees.errors import LawError


def compose(first: Patch, second: Patch) -> Patch:
  """Returns the patch that does what `first` and then `second` do.

  Exact for the laws `bits` and `set`; sums and products of the deltas are
  rounded to float32, where applying one after the other would round to the
  leaf's dtype in between. Low-rank sums stay low-rank (the factors are put
  side by side), sparse ones sparse (outside `jit`, where the union of their
  indices can be had); other pairs become dense.

  Args:
    first: a patch on some base.
    second: a patch on what `first` gives.

  Returns:
    A patch on the base of `first`.

  Raises:
    MismatchError: if `second` was not made for what `first` gives.
    LawError: if one leaf is changed in two ways that no one delta does (such
      as `add` then `mul`, or a rename and a change of numbers).

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b, c = ({"w": np.float32([x])} for x in (1, 2, 5))
    >>> both = pj.compose(pj.diff(a, b), pj.diff(b, c))
    >>> both.deltas["w"].code.values.tolist()
    [4.0]
  """
  middle = first.result()
  if None not in (middle, second.structure) and middle != second.structure:
    assert middle is not None and second.structure is not None
    check_named(
      second.structure.leaves, middle.leaves, what="what the first gives"
    )
  deltas: dict[str, AnyDelta] = {}
  done = set()
  for name, delta in first.deltas.items():
    there = delta.to if isinstance(delta, Rename) else name
    after = second.deltas.get(there)
    done.add(there)
    joined = delta if after is None else _join(name, delta, after)
    if joined is None or joined == Rename(name):
      continue
    if isinstance(joined, tuple):
      name, joined = joined
    _put(deltas, name, joined)
  for name, delta in second.deltas.items():
    if name not in done:
      _put(deltas, name, delta)
  return first.replace(deltas)


def _put(deltas: dict[str, AnyDelta], name: str, delta: AnyDelta) -> None:
  if name in deltas:
    raise LawError(
      f"{name}: the old leaf goes ({kind_of(deltas[name])}) and another takes "
      f"its name ({kind_of(delta)}), which is more than one delta can hold; "
      "apply the patches one after the other"
    )
  deltas[name] = delta


def _join(name: str, first: AnyDelta, second: AnyDelta) -> Any:
  """One delta for two; None if nothing is left, `(name, delta)` if it moved."""
  match first, second:
    case Delta(), Delta():
      return join(name, first, second)
    case ((Delta() | Rename()), Delete()):
      return second
    case Rename(), Rename():
      return second
    case Insert(axis=None), Delete():
      return None
    case Insert(axis=None), Rename(to=to):
      return to, first
    case Insert(axis=None), Delta():
      return Insert(laws.act(first.value, second))
    case _:
      raise LawError(
        f"{name}: {kind_of(first)} and then {kind_of(second)} is more than "
        "one delta can hold; apply the patches one after the other"
      )


def join(name: str, first: Delta, second: Delta) -> Delta:
  """Returns the delta of one leaf that does what two do in turn.

  Args:
    name: the leaf's name, for the message.
    first: the delta that acts first.
    second: the delta that acts on its result.

  Raises:
    LawError: if the laws differ.
  """
  p, q = first.code, second.code
  if second.law == "set" and not isinstance(q, Sparse):
    return second
  if first.law != second.law:
    raise LawError(
      f"{name}: law {first.law!r} and then {second.law!r} cannot be one "
      "delta; apply the patches one after the other"
    )
  law = laws.LAWS[first.law]
  if any(is_wide(leaf) for leaf in jax.tree.leaves((p, q))):
    # JAX would narrow these; numpy does not.
    return _join_wide(first, second)
  if isinstance(p, LowRank) and isinstance(q, LowRank) and p.batch == q.batch:
    if first.law == "add" and p.shape == q.shape:
      return Delta(_side_by_side(p, q), "add")
  if isinstance(p, Sparse) and isinstance(q, Sparse) and _concrete(p, q):
    return Delta(_union(p, q, first.law), first.law)
  if first.law == "set":
    if isinstance(p, Sparse):
      raise LawError(
        f"{name}: two sparse 'set' deltas cannot be composed inside jit: "
        "the union of their indices is not known there"
      )
    old = jnp.broadcast_to(p.dense(), q.shape)
    return Delta(Dense(laws.act(old, second)), "set")
  dtype = None
  if first.law != "bits":
    types = [widened(number_dtype(code)) for code in (p, q)]
    dtype = np.result_type(*types)

  def combine(p, q):
    old, new = (_whole(c, law.identity, dtype) for c in (p, q))
    return law.join(old, new)

  held = p if isinstance(p, Dense) else q
  like = held.values if isinstance(held, Dense) else None
  return Delta(Dense(on_leaf_mesh(combine, like, p, q)), first.law)


def _whole(code: Any, identity: Any, dtype: Any) -> jax.Array:
  if isinstance(code, Sparse):
    return code.dense(dtype, fill=identity)
  return code.dense(dtype)


def _join_wide(first: Delta, second: Delta) -> Delta:
  """What `join` does, on the host."""
  p, q = first.code, second.code
  law = laws.LAWS[first.law]
  if isinstance(p, Sparse) and isinstance(q, Sparse):
    return Delta(_union(p, q, first.law), first.law)
  if first.law == "set":
    old = np.broadcast_to(pinned.numbers(p), q.shape)
    return Delta(Dense(pinned.apply_host(old, second)), "set")
  dtype = np.result_type(number_dtype(p), number_dtype(q))
  parts = []
  for code in (p, q):
    if isinstance(code, Sparse):
      shape = (*code.shape, *code.values.shape[1:])
      empty = np.full(shape, law.identity, dtype)
      parts.append(pinned.apply_host(empty, Delta(code, "set")))
    else:
      parts.append(pinned.numbers(code, dtype))
  return Delta(Dense(law.join(*parts)), first.law)


def _concrete(*codes: Any) -> bool:
  return not any(is_traced(leaf) for leaf in jax.tree.leaves(codes))


def _side_by_side(p: LowRank, q: LowRank) -> LowRank:
  """The sum of two products as one of the summed rank: exact."""
  dtype = widened(p.a.dtype)
  a = [
    jnp.asarray(c.a).astype(dtype) * jnp.asarray(c.scale).astype(dtype)
    for c in (p, q)
  ]
  b = [jnp.asarray(c.b).astype(dtype) for c in (p, q)]
  return LowRank(
    jnp.concatenate(a, axis=-1),
    jnp.concatenate(b, axis=p.batch),
    jnp.ones((), dtype),
    p.batch,
  )


def _union(p: Sparse, q: Sparse, law: str) -> Sparse:
  """Two sparse deltas in turn, as one with the union of their entries."""
  inside = [_held(code) for code in (p, q)]
  indices = np.unique(np.concatenate([i for i, _ in inside]), axis=0)
  order = [_rank(indices, i) for i, _ in inside]
  (_, old), (_, new) = inside
  dtype = np.result_type(old.dtype, new.dtype) if law != "bits" else old.dtype
  identity = laws.LAWS[law].identity or 0
  total = np.full((len(indices), *old.shape[1:]), identity, dtype)
  total[order[0]] = old
  at = order[1]
  mine = total[at]
  joined = laws.LAWS[law].join(mine, new.astype(dtype))
  total[at] = joined.astype(dtype)
  return Sparse(total, indices, p.shape)


def _held(code: Sparse) -> tuple[np.ndarray, np.ndarray]:
  """Indices and values without the padding, on the host."""
  indices, values = np.asarray(code.indices), pinned.numbers(code.values)
  keep = (indices if indices.ndim == 1 else indices[:, 0]) < code.end
  return indices[keep], values[keep]


def _rank(indices: np.ndarray, some: np.ndarray) -> np.ndarray:
  """Where each row of `some` stands in the sorted `indices`."""
  if indices.ndim == 1:
    return np.searchsorted(indices, some)
  every, wanted = (
    i[:, 0].astype(np.int64) << 32 | i[:, 1] for i in (indices, some)
  )
  return np.searchsorted(every, wanted)
