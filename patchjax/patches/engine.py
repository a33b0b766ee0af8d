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

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from patchjax.patches import leafwise, placement, transform
from patchjax.patches.counting import LIMB
from patchjax.trees.errors import NonFiniteError, SelectionError

Leaves = Mapping[str, Callable[[], leafwise.Work]]
"""Each leaf's work by name, fetched when it is needed (files are read then)."""


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

  def leaf_of(name: str, work: leafwise.Work) -> placement.Leaf:
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

  def carries(work: leafwise.Work) -> tuple[Any, ...]:
    return tuple(
      step.start(state[i], [work.shape], contributors, **dict(options))
      if transform.scope_of(step, options) == "leaf"
      else shared[i]
      for i, (step, options) in enumerate(method.stages)
    )

  def works() -> Iterator[
    tuple[placement.Leaf, leafwise.Work, tuple[Any, ...]]
  ]:
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
        one = leafwise.count_whole(
          stages, index, leaf, base, sources, state_, now
        )
        total = one if total is None else jax.tree.map(jnp.add, total, one)
      return leafwise.finish(stages, index, total, carry[0])

    carry, _ = lax.while_loop(
      lambda carry: ~carry[1], body, (start, jnp.asarray(False))
    )
    return carry

  def update(self, stages, as_params, name, leaf, work, state, shared):
    del name
    out, _ = leafwise.update(
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
      given, made = ((int(c[0]) << LIMB) + int(c[1]) for c in counts.T)
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
def _count_jit(stages: leafwise.Stages, index: int) -> Callable[..., Any]:
  @jax.jit
  def count(leaf, base, sources, state, shared, total):
    one = leafwise.count_whole(
      stages, index, leaf, base, sources, state, shared
    )
    return one if total is None else jax.tree.map(jnp.add, total, one)

  return count


@functools.lru_cache(maxsize=512)
def _finish_jit(stages: leafwise.Stages, index: int) -> Callable[..., Any]:
  return jax.jit(functools.partial(leafwise.finish, stages, index))


@functools.lru_cache(maxsize=4096)
def _update_jit(
  stages: leafwise.Stages, as_params: bool, donate: bool, sharding: Any
) -> Callable[..., Any]:
  def update(base, leaf, sources, state, shared):
    return leafwise.update(
      stages, as_params, True, leaf, base, sources, state, shared
    )

  options: dict[str, Any] = {"donate_argnums": (0,)} if donate else {}
  if sharding is not None:
    options["out_shardings"] = (sharding, None)
  return jax.jit(update, **options)
