"""What is done to one leaf: its task vectors, counts and result; traceable.

The same functions run under the jit of one leaf, under a user's jit of a
whole tree, and over files.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import counting, laws, pinned, placement, transform
from patchjax.patches.codes import Dense, Sparse
from patchjax.patches.deltas import Delta
from patchjax.patches.diff import task_vector
from patchjax.patches.meshes import explicit_sharding, on_leaf_mesh

Array = Any
Stages = tuple[tuple[transform.Step, transform.Options], ...]


@dataclasses.dataclass(frozen=True)
class Work:
  """One leaf to be worked on.

  Attributes:
    base: the base's leaf; None where only a delta is known.
    sources: one a contributor: its leaf, a `Delta` on the base, or None if
      it does not touch the leaf.
  """

  base: Any
  sources: tuple[Any, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the leaf."""
    if self.base is not None:
      return tuple(self.base.shape)
    delta = next(s for s in self.sources if s is not None)
    return tuple(delta.code.shape)


def task_vectors(
  base: Any, sources: tuple[Any, ...], shape: tuple[int, ...]
) -> tuple[Array, ...]:
  """Returns the contributors' task vectors on one leaf; traceable.

  Args:
    base: the base's leaf; None where all sources are sums.
    sources: as in `Work`.
    shape: of the leaf.
  """
  return tuple(_delta(base, source, shape) for source in sources)


def _delta(base: Any, source: Any, shape: tuple[int, ...]) -> Array:
  """Returns the task vector of one contributor on one leaf."""
  if source is None:
    if base is None:
      return jnp.zeros(shape, jnp.float32)
    return jnp.zeros_like(base, laws.compute_dtype(base))
  if not isinstance(source, Delta):
    if explicit_sharding(base) == explicit_sharding(source):
      return task_vector(source, base)
    return on_leaf_mesh(task_vector, base, source, base)
  wide = jnp.float32 if base is None else laws.compute_dtype(base)

  def whole(base, delta):
    if delta.law == "add":
      return jnp.broadcast_to(delta.code.dense(wide), shape)
    return task_vector(laws.act(base, delta), base)

  return on_leaf_mesh(whole, base, base, source)


def _widened(base: Any) -> Any:
  """Returns the base's leaf in the dtype of its deltas."""
  if base is None:
    return None
  return jnp.asarray(base).astype(laws.compute_dtype(base))


def count(
  stages: Stages, index: int, leaf, base, sources, state, shared
) -> Any:
  """Returns stage `index`'s count over one leaf, summed over its shards.

  Args:
    stages: of the transform.
    index: of the stage that counts.
    leaf: where the leaf is.
    base: the base's leaf, or None.
    sources: of the contributors, as in `Work`.
    state: of each stage.
    shared: carry of each stage: final before `index`, current at it.
  """
  step, options = stages[index]
  base, sources = lax.stop_gradient((base, sources))
  deltas = task_vectors(base, sources, leaf.shape)
  method = transform.Transform(({},) * len(stages), stages)
  deltas = transform.run_prefix(
    method, index, leaf, deltas, _widened(base), state, shared
  )

  def reduce(deltas, leaf, state, carry):
    return step.reduce(leaf, deltas, state, carry, **dict(options))

  return placement.sum_over_shards(
    reduce, deltas, leaf, state[index], shared[index]
  )


def count_whole(
  stages: Stages, index: int, leaf, base, sources, state, shared
) -> Any:
  """Returns `count`, once earlier stages have counted over the leaf alone."""
  shared = _leaf_passes(stages, index, leaf, base, sources, state, shared)
  return count(stages, index, leaf, base, sources, state, shared)


def finish(stages: Stages, index: int, total, carry) -> Any:
  """Returns stage `index`'s next carry, and whether its passes are done."""
  step, options = stages[index]
  return step.finish(total, carry, **dict(options))


def _leaf_passes(
  stages: Stages, stop: int, leaf, base, sources, state, shared
) -> Any:
  """Runs the passes of those of the first stages that count in a leaf."""
  base, sources, state = lax.stop_gradient((base, sources, state))
  shared = list(shared)
  for index, (step, options) in enumerate(stages[:stop]):
    if transform.scope_of(step, options) != "leaf":
      continue
    held = (base, sources, state)

    def body(carry, index=index, held=held, shared=tuple(shared)):
      # Without the barrier the compiler computes the deltas once, before the
      # loop, and keeps them: memory of the leaf's size, and slower.
      held, carry = lax.optimization_barrier((held, carry))
      base, sources, state = held
      now = (*shared[:index], carry[0], *shared[index + 1 :])
      total = count(stages, index, leaf, base, sources, state, now)
      return finish(stages, index, total, carry[0])

    shared[index], _ = lax.while_loop(
      lambda carry: ~carry[1], body, (shared[index], jnp.asarray(False))
    )
  return tuple(shared)


def update(
  stages: Stages,
  as_params: bool,
  checked: bool,
  leaf,
  base,
  sources,
  state,
  shared,
) -> Any:
  """Returns one leaf's result, and how many of its numbers are not finite.

  Args:
    stages: of the transform.
    as_params: whether the result is the base's leaf, changed, or the tuple
      of deltas or codes after the last stage.
    checked: whether to count what is not finite.
    leaf: where the leaf is.
    base: the base's leaf, or None.
    sources: of the contributors, as in `Work`.
    state: of each stage.
    shared: carry of each stage; for those that count over a leaf, of their
      first pass.
  """
  shared = _leaf_passes(stages, len(stages), leaf, base, sources, state, shared)
  wide = _widened(base)
  deltas = task_vectors(base, sources, leaf.shape)
  method = transform.Transform(({},) * len(stages), stages)
  out = transform.run_prefix(
    method, len(stages), leaf, deltas, wide, state, shared
  )
  if as_params:
    (total,) = out
    total = total if hasattr(total, "at") else total.dense()
    total = transform.rounded(total.astype(wide.dtype))
    out = (wide + total).astype(base.dtype)
  bad = jnp.zeros((2, 2), jnp.int32)
  if checked:
    given = functools.reduce(jnp.logical_or, (~jnp.isfinite(d) for d in deltas))
    made = ~jnp.isfinite(out) if as_params else given
    bad = placement.sum_over_shards(_count_bad, (given, made), leaf)
  return out, bad


def _count_bad(masks, leaf):
  return counting.count_true(masks, local=leaf.local)


@functools.partial(jax.jit, static_argnums=(2,))
def _whole(base, delta, shape):
  return _delta(base, delta, shape)


def held_dense(base: Any, delta: Delta) -> Delta:
  """Returns a delta as a dense sum, so that passes need not decode it again.

  Args:
    base: the base's leaf, or None.
    delta: a delta of any law and code.
  """
  if delta.law == "add" and isinstance(delta.code, Dense):
    return delta
  shape = tuple(delta.code.shape if base is None else base.shape)
  if delta.law == "add" and isinstance(delta.code, Sparse):
    # On the host: a compiled scatter for each number of entries would take
    # longer than all passes over them.
    wide = np.float32 if base is None else laws.compute_dtype(base)
    whole = pinned.apply_host(np.zeros(shape, wide), delta)
    like = getattr(base, "sharding", None)
    return Delta(Dense(jax.device_put(whole, like)), "add")
  return Delta(Dense(_whole(base, delta, shape)), "add")
