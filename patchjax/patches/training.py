"""trainable: the numbers of a patch that an optimizer may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch

Values = dict[str, dict[str, Any]]


def trainable(
  patch: Patch, *, scales: bool = False
) -> tuple[Values, Callable[[Values], Patch]]:
  """Returns the trainable numbers of a patch, and how to put them back.

  Differentiate and optimize these, never the patch: it also holds indices,
  and integers have no gradient. Everything else (the base, indices, words)
  stays as it is by construction, and optimizer state is of the patch's size.

  Args:
    patch: the patch to train.
    scales: whether the scales of `LowRank` (alpha / rank) and `Quantized`
      codes are trained too.

  Returns:
    `(values, rebuild)`: `{name: {field: array}}` of the floating point fields
    that codes declare trainable (dense and sparse values, both factors), and
    the function from such values to the patch that has them. Deltas of law
    `bits` and structural ones have none.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.float32([1, 2]), "n": np.int32(3)}
    >>> values, rebuild = pj.trainable(pj.diff(base, base))
    >>> sorted(values)
    ['w']
    >>> pj.apply(base, rebuild({"w": {"values": np.float32([1, 1])}}))["w"]
    Array([2., 3.], dtype=float32)
  """
  values = {}
  for name, delta in patch.deltas.items():
    if isinstance(delta, Delta) and delta.law != "bits":
      fields = dict(_fields(delta.code, scales))
      if fields:
        values[name] = fields

  def rebuild(values: Values) -> Patch:
    deltas = dict(patch.deltas)
    for name, fields in values.items():
      delta = deltas[name]
      assert isinstance(delta, Delta)
      code = delta.code
      for field, value in fields.items():
        code = _with(code, field.split("."), value)
      deltas[name] = dataclasses.replace(delta, code=code)
    return patch.replace(deltas)

  return values, rebuild


def _fields(code: Any, scales: bool, prefix: str = ""):
  """Yields `(dotted field, array)` of what may be trained."""
  fields = code.TRAINABLE + (getattr(code, "SCALES", ()) if scales else ())
  for field in fields:
    value = getattr(code, field)
    if hasattr(value, "TRAINABLE"):
      yield from _fields(value, scales, f"{prefix}{field}.")
    elif jnp.issubdtype(value.dtype, jnp.inexact):
      yield prefix + field, value


def _with(code: Any, path: list[str], value: Any) -> Any:
  field, *rest = path
  if rest:
    value = _with(getattr(code, field), rest, value)
  return dataclasses.replace(code, **{field: value})
