"""What must hold of deltas before they touch leaves.

The constructors of codes and deltas check nothing. Whoever gets a patch from
somebody else, or hands one on, asks here: `misfit` looks at what a code is
made of and at its leaf, `check_deltas` at a whole patch and the leaves it is
for. Only shapes and dtypes count, so tracers will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from patchjax.patches.codes import (
  Dense,
  LowRank,
  Quantized,
  Sparse,
  number_dtype,
  split_axis,
)
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.trees.digest import Entry
from patchjax.trees.dtypes import KINDS, dtype_name, is_array
from patchjax.trees.errors import MismatchError
from patchjax.trees.names import nested


def entry_of(leaf: Any) -> Entry:
  """Returns dtype and shape of a leaf, as an `Entry` without a digest.

  Args:
    leaf: an array, its tracer, or an `Entry`.
  """
  if isinstance(leaf, Entry):
    return leaf
  return Entry("", dtype_name(leaf), tuple(leaf.shape))


def check_deltas(
  named: Mapping[str, Any], deltas: Mapping[str, AnyDelta]
) -> None:
  """Checks that deltas can act on these leaves, one and all.

  Args:
    named: `{text name: leaf}`, arrays or `Entry`s.
    deltas: `{text name: delta}`.

  Raises:
    MismatchError: lists every delta that has no leaf, does not fit its leaf,
      or puts a leaf where there is one already.
    StructureError: if a leaf would also be the parent of others.
  """
  bad = []
  for name, delta in deltas.items():
    if isinstance(delta, Insert) and delta.axis is None:
      continue
    if name not in named:
      bad.append(f"{name}: the base has no such leaf")
    elif why := misfit(delta, entry_of(named[name])):
      bad.append(f"{name}: {why}")
  if not all(isinstance(delta, Delta) for delta in deltas.values()):
    leaving = {
      name
      for name, delta in deltas.items()
      if isinstance(delta, Delete | Rename)
    }
    after = dict.fromkeys(name for name in named if name not in leaving)
    for name, delta in deltas.items():
      match delta:
        case Rename(to=to):
          put = to
        case Insert(axis=None):
          put = name
        case _:
          continue
      if put in after:
        bad.append(f"{name}: there is a leaf {put!r} already")
      after[put] = None
    if not bad:
      nested(after)
  if bad:
    raise MismatchError(
      f"{len(bad)} of {len(deltas)} deltas do not fit the base:\n"
      + "\n".join(f"  {line}" for line in bad)
      + "\nto mend it: patch.rename(rules), or make the patch for this base"
    )


def misfit(delta: AnyDelta, leaf: Entry | None) -> str | None:
  """Returns why a delta cannot act on a leaf, or None if it can.

  Args:
    delta: any delta.
    leaf: dtype and shape of the leaf; None if they are not known.

  Example:
    >>> import numpy as np
    >>> delta = Delta(Dense(np.zeros((2, 3), np.float32)), "add")
    >>> misfit(delta, Entry("", "float32", (3, 2)))
    'a delta of shape (2, 3) for a leaf of shape (3, 2)'
  """
  match delta:
    case Delta(code=code):
      why = _unsound(code)
      return why or (None if leaf is None else _mismatch(delta, leaf))
    case Insert(value=value, axis=int() as axis) if leaf is not None:
      rows = tuple(value.shape)
      fits = (
        0 <= axis < len(leaf.shape) == len(rows)
        and rows[:axis] == leaf.shape[:axis]
        and rows[axis + 1 :] == leaf.shape[axis + 1 :]
      )
      if not fits:
        return f"rows of shape {rows} for axis {axis} of a leaf of {leaf.shape}"
      if dtype_name(value) != leaf.dtype:
        return f"rows of {dtype_name(value)} for a leaf of {leaf.dtype}"
  return None


def _mismatch(delta: Delta, leaf: Entry) -> str | None:
  """Why a sound delta is not one for this leaf."""
  code = delta.code
  shape, found = leaf.shape, tuple(code.shape)
  # A complex number or a key is several words.
  kind = KINDS.get(leaf.dtype)
  pairs = delta.law == "bits" and (kind is None or kind.words > 1)
  if isinstance(code, Sparse):
    fits = found == shape
  else:
    head = found[:-1] if pairs else found
    fits = len(head) == len(shape) and all(
      size in (1, wanted) for size, wanted in zip(head, shape, strict=True)
    )
  if not fits:
    return f"a delta of shape {found} for a leaf of shape {shape}"
  if isinstance(code, Sparse) and not isinstance(code.values, Quantized):
    if len(code.values.shape) != 1 + pairs:
      return f"values of shape {tuple(code.values.shape)}"
  dtype = number_dtype(code).name
  if delta.law == "bits":
    word = "uint32" if kind is None else kind.word.name
    fits = dtype == word
  elif kind is None or dtype not in KINDS:
    fits = dtype == leaf.dtype
  else:
    # That there is no arithmetic on integer leaves is the law's to say.
    rank = _rank(leaf.dtype)
    fits = _rank(dtype) <= rank or (delta.law != "set" and not rank)
  if not fits:
    return f"a delta of law {delta.law!r} and {dtype} for a {leaf.dtype} leaf"
  return None


def _rank(dtype: str) -> int:
  """What a number can hold: 0 integers, 1 real numbers, 2 complex ones."""
  kind = KINDS[dtype]
  return (kind.words > 1) + kind.floating


def _unsound(code: Any) -> str | None:
  """Why the parts of a code do not fit each other."""
  match code:
    case Dense(values=values):
      return None if is_array(values) else "its values are no array"
    case Sparse(values=values, indices=indices, shape=shape):
      if not (_are_sizes(shape, 0) and is_array(indices)):
        return f"sparse entries of an array of shape {shape}"
      pair = (2,) if split_axis(shape) else ()
      if indices.dtype != "int32" or indices.shape[1:] != pair:
        return (
          f"indices {dtype_name(indices)}{list(indices.shape)}, expected "
          f"int32 [nnz{', 2' * bool(pair)}]"
        )
      if isinstance(values, Quantized) and (why := _unsound(values)):
        return why
      if not (isinstance(values, Quantized) or is_array(values)):
        return "its values are neither an array nor quantized"
      if tuple(values.shape)[:1] != indices.shape[:1]:
        return f"{indices.shape[0]} indices, but values of {values.shape}"
    case LowRank(a=a, b=b, scale=scale, batch=batch):
      if not (all(map(is_array, (a, b))) and _are_sizes((batch,), 0)):
        return "its factors are no arrays"
      sound = (
        min(len(a.shape), len(b.shape)) > batch
        and a.shape[:batch] == b.shape[:batch]
        and a.shape[-1] == b.shape[batch]
        and getattr(scale, "shape", ()) == ()
      )
      if not sound:
        return f"factors of shapes {a.shape} and {b.shape}, {batch} batch axes"
    case Quantized(words=words, scales=scales, bits=bits, block=block):
      if not (is_array(words) and is_array(scales)):
        return "its words or scales are no arrays"
      if words.dtype != "int8" or not (_are_sizes((bits,), 1) and bits <= 8):
        return f"quantized words of {words.dtype} and {bits} bits"
      sound = (
        _are_sizes(block, 1)
        and len(block) == len(words.shape) == len(scales.shape)
        and (0 in words.shape or _blocks(words.shape, block) == scales.shape)
      )
      if not sound:
        return (
          f"scales of shape {scales.shape} for words of {words.shape} in "
          f"blocks of {block}"
        )
    case _:
      return f"{type(code).__name__} is no code"
  return None


def _are_sizes(sizes: Any, least: int) -> bool:
  return isinstance(sizes, tuple) and all(
    isinstance(n, int) and not isinstance(n, bool) and n >= least for n in sizes
  )


def _blocks(shape: Any, block: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))
