"""LoRA: zero low-rank patches to train (Hu et al. 2021)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import placement
from patchjax.patches.codes import LowRank
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch, Structure
from patchjax.statistics.fisher import picked_floats
from patchjax.trees.errors import SelectionError
from patchjax.trees.names import named_leaves

AxisCount = int | Mapping[str, int]


def lora(
  key: jax.Array,
  base: Any,
  *,
  rank: int,
  alpha: float | None = None,
  only: Any = None,
  in_axes: AxisCount = 1,
  batch_axes: AxisCount = 0,
  sharding: Literal["inherit", "replicate"] = "inherit",
  dtype: Any = jnp.float32,
) -> Patch:
  """Returns a zero patch of low rank, to be trained.

  Each leaf gets `alpha / rank * a @ b` with a Gaussian `a` and a zero `b`
  (Hu et al. 2021, https://arxiv.org/abs/2106.09685): the patched model is the
  base until it is trained. A leaf's axes are, in order, batch axes, input
  axes and output axes; the factors keep them: `a[*batch, *inputs, rank]`,
  `b[*batch, rank, *outputs]`.

  Args:
    key: PRNG key; folded with the name of each leaf, so that a leaf's factors
      do not depend on the other leaves.
    base: pytree of arrays.
    rank: of each product.
    alpha: the numerator of the scale; by default the rank: a scale of 1.
    only: selector of the leaves; by default every floating point leaf with at
      least two axes besides batch axes.
    in_axes: how many axes of a leaf are inputs: a number, or `{regex: number}`
      on text names (first match; 1 if none). An attention's
      output kernel `[heads, head_dim, out]` has 2.
    batch_axes: how many leading axes only number layers or experts (1 for
      scan-stacked layers): a number or `{regex: number}` (0 if none matches).
    sharding: "inherit": on a mesh, factors are sharded along the axes they
      share with their leaf; "replicate": every device holds them whole.
    dtype: of the factors.

  Returns:
    A patch of law `add`; `pj.trainable` gives its factors.

  Raises:
    SelectionError: if a selected leaf has no input or no output axis, or the
      rank is not positive.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> base = {"kernel": np.zeros((4, 6), np.float32)}
    >>> patch = pj.tuning.lora(jax.random.key(0), base, rank=2)
    >>> code = patch.deltas["kernel"].code
    >>> code.a.shape, code.b.shape
    ((4, 2), (2, 6))
  """
  if rank < 1:
    raise SelectionError(f"rank must be at least 1, got {rank}")
  if sharding not in ("inherit", "replicate"):
    raise ValueError(
      f"sharding must be 'inherit' or 'replicate', got {sharding!r}"
    )
  named = named_leaves(base)
  names = picked_floats(named, only)
  inputs = {name: _count(in_axes, name, 1) for name in names}
  batches = {name: _count(batch_axes, name, 0) for name in names}
  if only is None:
    names = tuple(n for n in names if named[n].ndim - batches[n] >= 2)
  wrong = [
    f" - {name}: shape {tuple(named[name].shape)}, {batches[name]} batch and "
    f"{inputs[name]} input axes"
    for name in names
    if not 1 <= inputs[name] < named[name].ndim - batches[name]
  ]
  if wrong or not names:
    raise SelectionError(
      "a low-rank patch needs leaves with input and output axes:\n"
      + "\n".join(wrong or [" - found none"])
      + "\nto mend it: narrow only=, or set in_axes= and batch_axes="
    )
  scale = (rank if alpha is None else alpha) / rank
  deltas = {}
  for name in names:
    own = key
    for word in placement.identity_of(name):
      own = jax.random.fold_in(own, word)
    make = _factors(
      tuple(named[name].shape),
      inputs[name],
      batches[name],
      rank,
      np.dtype(dtype),
      *_shardings(named[name], inputs[name], batches[name], sharding),
    )
    a, b = make(own)
    code = LowRank(a, b, jnp.asarray(scale, dtype), batches[name])
    deltas[name] = Delta(code, "add")
  return Patch(deltas, Structure.of(named))


def _count(axes: AxisCount, name: str, default: int) -> int:
  if isinstance(axes, int):
    return axes
  for pattern, count in axes.items():
    if re.fullmatch(pattern, name):
      return count
  return default


def _shardings(leaf: Any, inputs: int, batch: int, policy: str):
  """Returns the shardings of both factors, None for one device."""
  mesh, axes = placement.mesh_axes(leaf)
  if mesh is None:
    return None, None
  spec = [names or None for names in axes]
  whole = [*spec[:batch], *spec[batch : batch + inputs], None]
  other = [*spec[:batch], None, *spec[batch + inputs :]]
  specs = (whole, other) if policy == "inherit" else ([], [])
  return tuple(
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))
    for parts in specs
  )


@functools.lru_cache(maxsize=1024)
def _factors(
  shape, inputs, batch, rank, dtype, a_sharding, b_sharding
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
  split = batch + inputs
  fan_in = max(1, math.prod(shape[batch:split]))  # a leaf may have no rows

  def make(key):
    a = jax.random.normal(key, (*shape[:split], rank), dtype)
    b = jnp.zeros((*shape[:batch], rank, *shape[split:]), dtype)
    return a * jnp.asarray(fan_in**-0.5, dtype), b

  return jax.jit(make, out_shardings=(a_sharding, b_sharding))
