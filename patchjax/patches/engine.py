"""Runs the stages of a transform over the leaves of a model.

One set of leaf functions, three ways to run them. Eagerly each leaf has a
jitted function of its own, cached by stages, shape, dtype and sharding: a jit
over a tree of a thousand leaves takes 28 times as long to compile. Under a
user's jit, grad or vmap the same functions run inline. Over files the leaves
are read one at a time, once for each pass. All three give the same bits.

A counting step is run in passes: the stages before it are computed again for
each leaf and pass, so that no copy of the model is kept. Task vectors are the
one expression `f32(x) - f32(base)` in every pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.patches import laws, pinned, placement, selection, transform
from patchjax.patches.codes import Dense, Sparse
from patchjax.patches.deltas import Delta
from patchjax.patches.diff import task_vector
from patchjax.patches.meshes import explicit_sharding, on_leaf_mesh
from patchjax.trees.errors import NonFiniteError, SelectionError

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


Leaves = Mapping[str, Callable[[], Work]]
"""Each leaf's work by name, fetched when it is needed (files are read then)."""


# ---------------------------------------------------------------------------
# Leaf functions: traceable.


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


def _wide(base: Any) -> Any:
  if base is None:
    return None
  return jnp.asarray(base).astype(laws.compute_dtype(base))


def _count(
  stages: Stages, index: int, leaf, base, sources, state, shared
) -> Any:
  """Returns stage `index`'s count over one leaf, summed over its shards."""
  step, options = stages[index]
  base, sources = lax.stop_gradient((base, sources))
  deltas = task_vectors(base, sources, leaf.shape)
  method = transform.Transform(({},) * len(stages), stages)
  deltas = transform.run_prefix(
    method, index, leaf, deltas, _wide(base), state, shared
  )

  def reduce(deltas, leaf, state, carry):
    return step.reduce(leaf, deltas, state, carry, **dict(options))

  return placement.sum_over_shards(
    reduce, deltas, leaf, state[index], shared[index]
  )


def _count_whole(
  stages: Stages, index: int, leaf, base, sources, state, shared
) -> Any:
  """Returns `_count` where earlier stages first count over the leaf alone."""
  shared = _leaf_passes(stages, index, leaf, base, sources, state, shared)
  return _count(stages, index, leaf, base, sources, state, shared)


def _finish(stages: Stages, index: int, total, carry) -> Any:
  step, options = stages[index]
  return step.finish(total, carry, **dict(options))


def _leaf_passes(
  stages: Stages, count: int, leaf, base, sources, state, shared
) -> Any:
  """Runs the passes of those of the first stages that count in a leaf."""
  base, sources, state = lax.stop_gradient((base, sources, state))
  shared = list(shared)
  for index, (step, options) in enumerate(stages[:count]):
    if transform.scope_of(step, options) != "leaf":
      continue
    held = (base, sources, state)

    def body(carry, index=index, held=held, shared=tuple(shared)):
      # Without the barrier the compiler computes the deltas once, before the
      # loop, and keeps them: memory of the leaf's size, and slower.
      held, carry = lax.optimization_barrier((held, carry))
      base, sources, state = held
      now = (*shared[:index], carry[0], *shared[index + 1 :])
      total = _count(stages, index, leaf, base, sources, state, now)
      return _finish(stages, index, total, carry[0])

    shared[index], _ = lax.while_loop(
      lambda carry: ~carry[1], body, (shared[index], jnp.asarray(False))
    )
  return tuple(shared)


def _update(
  stages: Stages,
  as_params: bool,
  checked: bool,
  leaf,
  base,
  sources,
  state,
  shared,
) -> Any:
  """Returns one leaf's result, and how many of its numbers are not finite."""
  shared = _leaf_passes(stages, len(stages), leaf, base, sources, state, shared)
  wide = _wide(base)
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
  return selection.count_true(masks, local=leaf.local)


# ---------------------------------------------------------------------------
# Running them.


def is_traced(*trees: Any) -> bool:
  """Returns whether any leaf is a tracer: jit, grad or vmap is running."""
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def run(
  method: transform.Transform,
  state: Any,
  leaves: Leaves,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  contributors: int,
  as_params: bool,
  donate: bool = False,
  traced: bool = False,
  streamed: bool = False,
) -> Iterator[tuple[str, Any]]:
  """Yields `(name, result)` for each leaf, in the order of `leaves`.

  Args:
    method: the transform.
    state: of each stage; None for the method's own numbers.
    leaves: the leaves to be worked on.
    shapes: shapes of all leaves that count (a tree-wide share is a share of
      them), among them those that nobody touches.
    contributors: k.
    as_params: whether a result is the changed leaf of the base, in its dtype,
      or the tuple of deltas or codes after the last stage.
    donate: whether the base's leaves may be overwritten; eagerly only.
    traced: whether to run inline, for a jit around this call.
    streamed: whether to wait for each leaf before the next is fetched, so
      that only a few are in memory.

  Raises:
    NonFiniteError: eagerly, after the last leaf, if one holds NaN or Inf.
    SelectionError: if the state has the wrong number of parts.
  """
  order = {name: i for i, name in enumerate(sorted(shapes))}
  ordered = [shapes[name] for name in order]
  if state is None:
    sizes = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    state = transform.initial_state(method, sizes)
  if len(state) != len(method.stages):
    raise SelectionError(
      f"the method has {len(method.stages)} steps and the state "
      f"{len(state)} parts; make it with method.init(params)"
    )

  def leaf_of(name: str, work: Work) -> placement.Leaf:
    like: Any = work.base
    if like is None:
      source = next(s for s in work.sources if s is not None)
      like = getattr(source.code, "values", None)
    if not hasattr(like, "ndim") or tuple(like.shape) != work.shape:
      like = jax.ShapeDtypeStruct(work.shape, jnp.float32)
    return placement.leaf_of(
      like, order[name], len(order), placement.identity_of(name)
    )

  runner = _Inline() if traced else _Eager(donate, streamed)
  shared: list[Any] = [None] * len(method.stages)

  def carries(work: Work) -> tuple[Any, ...]:
    return tuple(
      step.start(state[i], [work.shape], contributors, **dict(options))
      if transform.scope_of(step, options) == "leaf"
      else shared[i]
      for i, (step, options) in enumerate(method.stages)
    )

  def works() -> Iterator[tuple[placement.Leaf, Work, tuple[Any, ...]]]:
    for name, fetch in leaves.items():
      work = fetch()
      yield leaf_of(name, work), work, carries(work)

  for index, (step, options) in enumerate(method.stages):
    if leaves and transform.scope_of(step, options) == "tree":
      start = step.start(state[index], ordered, contributors, **dict(options))
      shared[index] = runner.passes(method.stages, index, works, state, start)
  for name, fetch in leaves.items():
    work = fetch()
    leaf = leaf_of(name, work)
    yield (
      name,
      runner.update(
        method.stages, as_params, name, leaf, work, state, carries(work)
      ),
    )
  runner.check()


class _Inline:
  """Everything in the trace of a transformation of the user's."""

  def passes(self, stages, index, works, state, start):
    held = [(leaf, w.base, w.sources, now) for leaf, w, now in works()]
    held = lax.stop_gradient((held, state))

    def body(carry):
      (items, state_), carry = lax.optimization_barrier((held, carry))
      total = None
      for leaf, base, sources, now in items:
        now = (*now[:index], carry[0], *now[index + 1 :])
        one = _count_whole(stages, index, leaf, base, sources, state_, now)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
      return _finish(stages, index, total, carry[0])

    carry, _ = lax.while_loop(
      lambda carry: ~carry[1], body, (start, jnp.asarray(False))
    )
    return carry

  def update(self, stages, as_params, name, leaf, work, state, shared):
    del name
    out, _ = _update(
      stages, as_params, False, leaf, work.base, work.sources, state, shared
    )
    return out

  def check(self):
    pass


class _Eager:
  """Leaf by leaf, without waiting for any; finiteness is checked at the end."""

  def __init__(self, donate: bool, streamed: bool):
    self._donate = donate
    self._streamed = streamed
    self._bad = {}

  def passes(self, stages, index, works, state, start):
    count, finish = _count_jit(stages, index), _finish_jit(stages, index)
    carry, done = start, False
    while not done:
      # Leaves of one set of devices are summed there, the sets on the host.
      totals: dict[Any, Any] = {}
      for leaf, work, now in works():
        now = (*now[:index], carry, *now[index + 1 :])
        where = _devices(work.base)
        totals[where] = count(
          leaf, work.base, work.sources, state, now, totals.get(where)
        )
        if self._streamed:
          jax.block_until_ready(totals[where])
      parts = jax.device_get(list(totals.values()))
      total = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)
      carry, done = jax.device_get(finish(total, carry))
    return carry

  def update(self, stages, as_params, name, leaf, work, state, shared):
    donate = self._donate and as_params and isinstance(work.base, jax.Array)
    sharding = None
    if as_params and leaf.mesh is not None:
      sharding = work.base.sharding
    function = _update_jit(stages, as_params, donate, sharding)
    out, self._bad[name] = function(
      work.base, leaf, work.sources, state, shared
    )
    return out

  def check(self):
    bad = jax.device_get(self._bad)
    lines = []
    for name, counts in bad.items():
      given, made = (int(c[0]) << 12 | int(c[1]) for c in counts.T)
      if given or made:
        what = (
          f"{given} entries of the contributors' changes"
          if given
          else f"{made} entries of the result (overflow, or the base's own)"
        )
        lines.append(f"  {name}: {what}")
    if lines:
      raise NonFiniteError(
        "NaN or Inf in\n" + "\n".join(lines) + "\nmend or leave out these "
        "leaves (only=...); a result that overflows needs a smaller scale "
        "or a wider dtype"
      )


def _devices(x: Any) -> Any:
  if isinstance(x, jax.Array):
    return frozenset(x.sharding.device_set)
  return None


@functools.lru_cache(maxsize=512)
def _count_jit(stages: Stages, index: int) -> Callable[..., Any]:
  @jax.jit
  def count(leaf, base, sources, state, shared, total):
    one = _count_whole(stages, index, leaf, base, sources, state, shared)
    return one if total is None else jax.tree.map(jnp.add, total, one)

  return count


@functools.lru_cache(maxsize=512)
def _finish_jit(stages: Stages, index: int) -> Callable[..., Any]:
  return jax.jit(functools.partial(_finish, stages, index))


@functools.lru_cache(maxsize=4096)
def _update_jit(
  stages: Stages, as_params: bool, donate: bool, sharding: Any
) -> Callable[..., Any]:
  def update(base, leaf, sources, state, shared):
    return _update(stages, as_params, True, leaf, base, sources, state, shared)

  options: dict[str, Any] = {"donate_argnums": (0,)} if donate else {}
  if sharding is not None:
    options["out_shardings"] = (sharding, None)
  return jax.jit(update, **options)


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
