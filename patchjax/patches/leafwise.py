"""What is done to one leaf: its task vectors, counts and result; traceable.

The same functions run under the jit of one leaf, under a user's jit of a
whole tree, and over files.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

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
class Plan:
  """What is compiled for a leaf: all that is static.

  Attributes:
    stages: of the transform.
    params: whether they run on parameters, or on task vectors.
    dtype: of the result, which then is a leaf of parameters; None for the
      tuple of deltas or codes after the last stage.
    checked: where to count what is not finite: "all": in the contributors
      and in the result; "result": there alone; None: nowhere.
    opened: whether the result is the pair of the deltas and of what brackets
      hold that the stages leave open.
  """

  stages: Stages
  params: bool = False
  dtype: Any = None
  checked: Literal["all", "result"] | None = None
  opened: bool = False

  def counts(self, index: int) -> tuple[transform.Count, ...]:
    """Returns what a stage counts, one after another."""
    return transform.counts_of(*self.stages[index])


@dataclasses.dataclass(frozen=True)
class Work:
  """One leaf to be worked on.

  Attributes:
    base: the base's leaf; None where only a delta is known, or where nobody
      reads it.
    sources: one a contributor: its leaf, a `Delta` on the base, or None if
      it does not touch the leaf.
    like: what the result is like, where there is no base: an array.
  """

  base: Any
  sources: tuple[Any, ...]
  like: Any = None

  @property
  def template(self) -> Any:
    """An array that has the result's shape, dtype and place, if there is."""
    if self.base is not None or self.like is not None:
      return self.like if self.base is None else self.base
    source = next(s for s in self.sources if s is not None)
    return getattr(source.code, "values", None)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the leaf."""
    if self.base is not None or self.like is not None:
      return tuple(self.template.shape)
    delta = next(s for s in self.sources if s is not None)
    return tuple(delta.code.shape)


def vectors(
  plan: Plan, base: Any, sources: tuple[Any, ...], shape: tuple[int, ...]
) -> tuple[Array, ...]:
  """Returns what the first stage sees of the contributors; traceable.

  Args:
    plan: task vectors or parameters.
    base: the base's leaf, or None.
    sources: as in `Work`.
    shape: of the leaf.
  """
  if plan.params:
    return tuple(_parameters(base, source) for source in sources)
  return task_vectors(base, sources, shape)


def _parameters(base: Any, source: Any) -> Array:
  """Returns one contributor's parameters in one leaf, not rounded."""
  if source is None:
    return widened(base)
  if not isinstance(source, Delta):
    return widened(source)

  def whole(base, delta):
    if delta.law != "add":
      return widened(laws.act(base, delta))
    wide = widened(base)
    dense = delta.code.dense(wide.dtype)
    return wide + transform.rounded(jnp.broadcast_to(dense, wide.shape))

  return on_leaf_mesh(whole, base, base, source)


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


def widened(leaf: Any) -> Any:
  """Returns a leaf in the dtype that its deltas are computed in.

  Args:
    leaf: an array, or None.
  """
  if leaf is None:
    return None
  return jnp.asarray(leaf).astype(laws.compute_dtype(leaf))


def _base_of_steps(plan: Plan, base: Any) -> Any:
  """Returns what the steps get for a base: of parameters, only on request."""
  if plan.params and not any(step.needs_base for step, _ in plan.stages):
    return None
  return widened(base)


def count(
  plan: Plan, index: int, number: int, leaf, base, sources, state, shared
) -> Any:
  """Returns one pass of stage `index` over one leaf, summed over its shards.

  Args:
    plan: what is computed.
    index: of the stage that counts.
    number: of what it counts.
    leaf: where the leaf is.
    base: the base's leaf, or None.
    sources: of the contributors, as in `Work`.
    state: of each stage, resolved for the leaf.
    shared: carry of each stage: final before `index`, current at it.
  """
  if not plan.counts(index)[number].once:
    base, sources, state = lax.stop_gradient((base, sources, state))
  seen: tuple[Any, ...] = ()
  if plan.stages[index][0].kept is not None:
    seen = _kept(plan, index, leaf, base, sources, state, shared)
  if not seen or plan.counts(index)[number].beside:
    seen += _seen(plan, index, leaf, base, sources, state, shared)
  return _count(plan, index, number, leaf, seen, state[index], shared[index])


def _count(plan: Plan, index: int, number: int, leaf, seen, state, carry):
  """Returns one pass over what a stage counts in, summed over shards."""
  _, options = plan.stages[index]
  counted = plan.counts(index)[number]

  def reduce(seen, leaf, state, carry):
    return counted.reduce(leaf, *seen, state, carry, **dict(options))

  return placement.sum_over_shards(reduce, seen, leaf, state, carry)


def _kept(
  plan: Plan, index: int, leaf, base, sources, state, shared
) -> tuple[Any]:
  """Returns the arrays that a stage makes once, to count in."""
  step, options = plan.stages[index]
  seen = _seen(plan, index, leaf, base, sources, state, shared)

  def kept(seen, leaf, state):
    assert step.kept is not None
    return step.kept(leaf, *seen, state, **dict(options))

  seen = lax.stop_gradient(seen)
  return (placement.on_shards(kept, seen, leaf, state[index]),)


def _seen(
  plan: Plan, index: int, leaf, base, sources, state, shared
) -> tuple[Any, ...]:
  """Returns the arrays that a stage's counting functions are given."""
  step, _ = plan.stages[index]
  wide = _base_of_steps(plan, base)
  method = transform.Transform(({},) * len(plan.stages), plan.stages)
  deltas = transform.run_prefix(
    method,
    index,
    leaf,
    vectors(plan, base, sources, leaf.shape),
    wide,
    state,
    shared,
  )
  return (deltas, wide) if step.needs_base else (deltas,)


def keys(plan: Plan, index: int, leaf, base, sources, state, shared) -> Any:
  """Returns the keys of a leaf for each of the cuts by rank of a stage.

  Args:
    plan: what is computed.
    index: of a stage made by `selection.cuts`.
    leaf: see `count`.
    base: see `count`.
    sources: see `count`.
    state: see `count`.
    shared: see `count`.
  """
  shared = _leaf_passes(plan, index, leaf, base, sources, state, shared)
  seen = _seen(plan, index, leaf, base, sources, state, shared)
  step, options = plan.stages[index]
  assert step.keys is not None
  found = step.keys(leaf, *seen, state[index], **dict(options))
  return tuple(key for key in found for _ in range(step.each))


def count_whole(
  plan: Plan, index: int, number: int, leaf, base, sources, state, shared
) -> Any:
  """Returns `count`, once earlier stages have counted over the leaf alone."""
  shared = _leaf_passes(plan, index, leaf, base, sources, state, shared)
  return count(plan, index, number, leaf, base, sources, state, shared)


def finish(plan: Plan, index: int, number: int, total, carry) -> Any:
  """Returns stage `index`'s next carry, and whether its passes are done."""
  return plan.counts(index)[number].finish(total, carry)


def needed(plan: Plan, index: int, number: int, carry) -> Any:
  """Returns whether stage `index` has to make a first pass."""
  counted = plan.counts(index)[number]
  return True if counted.needed is None else counted.needed(carry)


def _leaf_passes(
  plan: Plan, stop: int, leaf, base, sources, state, shared
) -> Any:
  """Runs the passes of those of the first stages that count in a leaf."""
  shared = list(shared)
  for index, (step, options) in enumerate(plan.stages[:stop]):
    if transform.scope_of(step, options) != "leaf":
      continue
    given, kept = (base, sources), ()
    if step.kept is not None:
      behind = lax.optimization_barrier((*given, state, tuple(shared)))
      kept = _kept(plan, index, leaf, *behind)
    for number, counted in enumerate(plan.counts(index)):
      held = kept, (None, ()) if kept and not counted.beside else given
      shared[index] = _passes(
        plan, index, number, leaf, held, state, tuple(shared)
      )
  return tuple(shared)


def _passes(
  plan: Plan, index: int, number: int, leaf, held, state, shared
) -> Any:
  """Returns the carry of a stage after all passes over one leaf."""
  counted = plan.counts(index)[number]

  def one_pass(held, carry):
    (seen, (base, sources)), state, shared = held
    now = (*shared[:index], carry, *shared[index + 1 :])
    if not seen or counted.beside:
      seen += _seen(plan, index, leaf, base, sources, state, now)
    total = _count(plan, index, number, leaf, seen, state[index], carry)
    return finish(plan, index, number, total, carry)

  held = held, state, shared
  first = needed(plan, index, number, shared[index])
  if not counted.once:
    held = lax.stop_gradient(held)
    return repeated(one_pass, held, held[2][index], first)

  def once(held, carry):
    # Behind a barrier, as in `repeated`: what the update computes too would
    # be kept in between.
    return one_pass(lax.optimization_barrier(held), carry)[0]

  if counted.needed is None:
    return once(held, shared[index])
  return lax.cond(first, once, lambda held, carry: carry, held, shared[index])


def repeated(one_pass: Any, held: Any, carry: Any, needed: Any) -> Any:
  """Returns the last carry of passes over what is held, none if not needed.

  Args:
    one_pass: `(held, carry) -> (carry, done)`.
    held: the arrays that every pass reads.
    carry: the first.
    needed: whether a pass is needed.
  """

  def body(carry):
    # Without the barrier the compiler computes the deltas once, before the
    # loop, and keeps them: memory of the leaf's size, and slower.
    held_, carry = lax.optimization_barrier((held, carry))
    return one_pass(held_, carry[0])

  carry, _ = lax.while_loop(
    lambda carry: ~carry[1], body, (carry, ~jnp.asarray(needed))
  )
  return carry


def update(plan: Plan, leaf, base, sources, state, shared) -> Any:
  """Returns one leaf's result, and how many of its numbers are not finite.

  Args:
    plan: what is computed.
    leaf: where the leaf is.
    base: the base's leaf, or None.
    sources: of the contributors, as in `Work`.
    state: of each stage, resolved for the leaf.
    shared: carry of each stage; for those that count over a leaf, of their
      first pass.

  Returns:
    the result, and counts of entries of the contributors and of the result.
  """
  stages = plan.stages
  shared = _leaf_passes(plan, len(stages), leaf, base, sources, state, shared)
  given = vectors(plan, base, sources, leaf.shape)
  method = transform.Transform(({},) * len(stages), stages)
  out, held = transform.run_opened(
    method,
    len(stages),
    leaf,
    given,
    _base_of_steps(plan, base),
    state,
    shared,
  )
  if plan.params or plan.dtype is not None:
    (total,) = out
    total = total if hasattr(total, "at") else total.dense()
    out = _result(plan, base, total)
  bad = jnp.zeros((2, 2), jnp.int32)
  if plan.checked is not None:
    masks = (~jnp.isfinite(out),) if plan.dtype is not None else ()
    if plan.checked == "all" or not masks:
      unfit = functools.reduce(
        jnp.logical_or, (~jnp.isfinite(x) for x in given)
      )
      masks = (unfit, *(masks or (unfit,)))
    counts = placement.sum_over_shards(_count_bad, masks, leaf)
    bad = bad.at[:, 2 - len(masks) :].set(counts)
  return ((out, held) if plan.opened else out), bad


def _result(plan: Plan, base: Any, total: Array) -> Any:
  """Returns the merged leaf or, of parameters, the tuple of its delta."""
  if plan.dtype is None:
    return (total - widened(base).astype(total.dtype),)
  if plan.params:
    return total.astype(plan.dtype)
  wide = widened(base)
  total = transform.rounded(total.astype(wide.dtype))
  return (wide + total).astype(plan.dtype)


def _count_bad(masks, leaf):
  return counting.count_true(masks, local=leaf.local)


@functools.partial(jax.jit, static_argnums=(2,))
def _whole(base, delta, shape):
  return _delta(base, delta, shape)


_act = jax.jit(laws.act)


def held_dense(base: Any, delta: Delta, *, params: bool = False) -> Any:
  """Returns a delta so that passes need not decode it again.

  Args:
    base: the base's leaf, or None.
    delta: a delta of any law and code.
    params: whether parameters are wanted.

  Returns:
    a dense sum; where parameters are wanted and the delta is no sum, the
    changed leaf.
  """
  if delta.law == "add" and isinstance(delta.code, Dense):
    return delta
  if params and delta.law != "add":
    return _act(base, delta)
  shape = tuple(delta.code.shape if base is None else base.shape)
  if delta.law == "add" and isinstance(delta.code, Sparse):
    # On the host: a compiled scatter for each number of entries would take
    # longer than all passes over them.
    wide = np.float32 if base is None else laws.compute_dtype(base)
    whole = pinned.apply_host(np.zeros(shape, wide), delta)
    like = getattr(base, "sharding", None)
    return Delta(Dense(jax.device_put(whole, like)), "add")
  return Delta(Dense(_whole(base, delta, shape)), "add")
