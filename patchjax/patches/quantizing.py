"""quantize and ternarize: fewer bits a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import transform
from patchjax.patches.codes import Quantized, spread
from patchjax.patches.meshes import explicit_sharding

Array = Any
Blocks = Literal["channel", "tensor"] | int | tuple[int, ...]


def quantized(x: Array, *, bits: int, per: Blocks = "channel") -> Quantized:
  """Returns an array rounded to integers of a few bits, times block scales.

  Symmetric, to the nearest: the scale is the block's largest magnitude over
  `2**(bits-1) - 1`. With one bit it is the mean magnitude, which is the
  nearest in squares (BitDelta, Liu et al. 2024,
  https://arxiv.org/abs/2402.10193).

  Args:
    x: floating point array.
    bits: 1 to 8.
    per: what shares a scale: "channel": an index of the last axis; "tensor":
      everything; an integer: so many neighbours on the last axis; a tuple:
      the block's size on each axis.

  Raises:
    ValueError: if `bits` or `per` is not one of these.

  Example:
    >>> import numpy as np
    >>> code = quantized(np.float32([[1, -2], [3, 4]]), bits=3)
    >>> code.words.tolist(), code.scales.tolist()
    ([[1, -2], [3, 3]], [[1.0, 1.3333333730697632]])
  """
  if not 1 <= bits <= 8:
    raise ValueError(f"bits must be 1 to 8, got {bits}")
  x = jnp.asarray(x)
  block = block_of(per, x.shape)
  size = math.prod(block)
  magnitudes = jnp.abs(x)
  if bits == 1:
    total = _per_block(magnitudes, block, jnp.sum)
    ones = jnp.ones(x.shape, x.dtype)
    count = _per_block(ones, block, jnp.sum) if size else total
    scales = total / jnp.maximum(count, jnp.ones_like(count))
    words = jnp.where(x > jnp.zeros_like(x), 1, -1).astype(jnp.int8)
    return Quantized(words, scales, bits, block)
  top = (1 << (bits - 1)) - 1
  scales = _per_block(magnitudes, block, jnp.max) / jnp.asarray(top, x.dtype)
  safe = jnp.where(
    scales > jnp.zeros_like(scales), scales, jnp.ones_like(scales)
  )
  words = jnp.round(x / jnp.broadcast_to(spread(safe, block, x.shape), x.shape))
  words = jnp.clip(words, -top, top).astype(jnp.int8)
  return Quantized(words, scales, bits, block)


def block_of(per: Blocks, shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the size of a block on each axis; see `quantized`.

  Args:
    per: what shares a scale.
    shape: of the array.

  Example:
    >>> block_of("channel", (4, 6)), block_of(2, (4, 6))
    ((4, 1), (1, 2))
  """
  shape = tuple(max(size, 1) for size in shape)
  if per == "tensor" or not shape:
    return shape
  if per == "channel":
    return (*shape[:-1], 1) if len(shape) > 1 else shape
  if isinstance(per, int) and per >= 1:
    return (*(1,) * (len(shape) - 1), min(per, shape[-1]))
  if isinstance(per, tuple) and len(per) == len(shape) and min(per) >= 1:
    return tuple(min(b, n) for b, n in zip(per, shape, strict=True))
  raise ValueError(
    "per must be 'channel', 'tensor', a size, or a size for each of "
    f"{len(shape)} axes, got {per!r}"
  )


def _per_block(x: Array, block: tuple[int, ...], reduce: Any) -> Array:
  """Reduces each block to one number; the last may be incomplete."""
  whole = tuple(
    d for d, (b, n) in enumerate(zip(block, x.shape, strict=True)) if b == n
  )
  if x.size and whole:
    x = reduce(x, axis=whole, keepdims=True)
  for d, (b, n) in enumerate(zip(block, x.shape, strict=True)):
    if b == 1 or d in whole:
      continue
    pad = [(0, -n % b) if e == d else (0, 0) for e in range(x.ndim)]
    # Magnitudes are not negative: zeros change neither sum nor maximum.
    x = jnp.pad(x, pad)
    shape = (*x.shape[:d], x.shape[d] // b, b, *x.shape[d + 1 :])
    x = reduce(x.reshape(shape), axis=d + 1)
  return x


def gathered(x: Array) -> Array:
  """Returns an array of an Explicit mesh whole on every device."""
  sharding = explicit_sharding(x)
  if sharding is None:
    return x
  whole = jax.sharding.PartitionSpec()
  return jax.sharding.reshard(
    x, jax.sharding.NamedSharding(sharding.mesh, whole)
  )


def quantize(
  *, bits: int, per: Blocks | list[int] = "channel"
) -> transform.Transform:
  """Returns the transform that rounds deltas to a few bits; see `quantized`.

  Args:
    bits: 1 (sign times mean magnitude: BitDelta) to 8.
    per: what shares a scale.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> patch = pj.diff({"w": np.zeros((64, 8), np.float32)},
    ...                 {"w": np.ones((64, 8), np.float32)})
    >>> pj.compress(patch, pj.quantize(bits=4)).nbytes, patch.nbytes
    (288, 2048)
  """
  if not 1 <= bits <= 8:
    raise ValueError(f"bits must be 1 to 8, got {bits}")
  if isinstance(per, list):
    per = tuple(per)
  return transform.Transform.of(_QUANTIZE, {}, bits=bits, per=per)


def _quantize(leaf, deltas, base, state, shared, *, bits, per):
  del leaf, base, state, shared
  return tuple(quantized(gathered(d), bits=bits, per=per) for d in deltas)


_QUANTIZE = transform.register_step(
  transform.Step(name="quantize", update=_quantize)
)


def ternarize(
  *, alpha: Any = 1.0, scope: Literal["leaf", "tree"] = "leaf"
) -> transform.Transform:
  """Returns the transform that keeps of each entry its sign, or zero.

  Entries become -s, 0 or s, where s is alpha times the mean magnitude of
  those that are not zero; alpha 1 is nearest in squares. After `trim` this is
  ComPEFT (Yadav et al. 2023, https://arxiv.org/abs/2311.13171), which takes
  the standard deviation of the delta instead of the mean and tunes alpha.

  Args:
    alpha: factor; traced, differentiable.
    scope: whether s is one a leaf or one for the tree.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> patch = pj.diff({"w": np.zeros(4, np.float32)},
    ...                 {"w": np.float32([1, -4, 0, 1])})
    >>> small = pj.compress(patch, pj.ternarize())
    >>> small.deltas["w"].code.dense().tolist()
    [2.0, -2.0, 0.0, 2.0]
  """
  if scope not in ("tree", "leaf"):
    raise ValueError(f"scope must be 'tree' or 'leaf', got {scope!r}")
  return transform.Transform.of(_TERNARIZE, {"alpha": alpha}, scope=scope)


def _ternarize_start(state, shapes, k, *, scope):
  del state, shapes, scope
  return np.zeros((k,), np.float32)


def _ternarize_reduce(leaf, deltas, state, carry, *, scope):
  del leaf, state, carry, scope
  sums = [jnp.sum(jnp.abs(d)).astype(jnp.float32) for d in deltas]
  # A count in float32 is inexact from 2**24 on, in the eighth digit.
  counts = [jnp.sum((d != 0).astype(jnp.float32)) for d in deltas]
  return jnp.stack([jnp.stack(sums), jnp.stack(counts)])


def _ternarize_finish(total, carry):
  del carry
  mean = total[0] / jnp.maximum(total[1], jnp.float32(1))
  return mean, jnp.asarray(True)


def _ternarize(leaf, deltas, base, state, shared, *, scope):
  del leaf, base, scope
  alphas = transform.per_contributor(state["alpha"], len(deltas))
  return tuple(
    jnp.sign(d)
    * (jnp.asarray(alpha).astype(d.dtype) * shared[i].astype(d.dtype))
    for i, (d, alpha) in enumerate(zip(deltas, alphas, strict=True))
  )


_TERNARIZE = transform.register_step(
  transform.Step(
    name="ternarize",
    update=_ternarize,
    start=_ternarize_start,
    counts=transform.one_count(_ternarize_reduce, _ternarize_finish),
    scope=lambda *, scope: scope,
  )
)
