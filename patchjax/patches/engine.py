"""Runs the stages of a transform over the leaves of a model.

One set of leaf functions, three ways to run them. Eagerly each leaf has a
jitted function of its own, cached by stages, shape, dtype and sharding: a jit
over a tree of a thousand leaves takes 28 times as long to compile. Under a
user's jit, grad or vmap the same functions run inline. Over files the leaves
are read one at a time, once for each pass. All three give the same bits.

A counting step is run in passes: the stages before it are computed again for
each leaf and pass, so that no copy of the model is kept, unless one of them is
dear (`splitting`). Task vectors are the one expression `f32(x) - f32(base)` in
every pass. In the space of parameters (`transform.Transform.space`) the base
is neither subtracted nor added, and not read unless a step asks for it or a
contributor lacks the leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from patchjax.patches import (
  leafwise,
  perleaf,
  placement,
  splitting,
  transform,
)
from patchjax.patches.codes import Dense
from patchjax.patches.counting import LIMB
from patchjax.trees.errors import (
  NonFiniteError,
  SelectionError,
  StructureError,
)

Leaves = Mapping[str, Callable[[], leafwise.Work]]
"""Each leaf's work by name, fetched when it is needed (files are read then)."""


def is_traced(*trees: Any) -> bool:
  """Returns whether any leaf is a tracer: jit, grad or vmap is running."""
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def in_params(method: transform.Transform, as_params: bool) -> bool:
  """Returns whether a method is run on parameters, not on task vectors.

  Args:
    method: the transform.
    as_params: whether leaves of parameters are wanted, or deltas.
  """
  space = method.space
  return space == "params" or (space == "either" and as_params)


def reads_base(
  method: transform.Transform, sources: Sequence[Any], as_params: bool
) -> bool:
  """Returns whether a leaf's result depends on the base's leaf.

  Args:
    method: the transform.
    sources: of the leaf, one a contributor.
    as_params: whether leaves of parameters are wanted, or deltas.
  """
  if not as_params or not in_params(method, as_params) or method.needs_base:
    return True
  return _changes_base(sources)


def _changes_base(sources: Sequence[Any]) -> bool:
  """Returns whether a source is told as a change of the base, or none."""
  return any(s is None or isinstance(s, leafwise.Delta) for s in sources)


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
  dtype: Any = None,
  shared: Sequence[Any] | None = None,
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
    dtype: of changed leaves, if not that of the base's.
    shared: what `count` found over all leaves, where `leaves` are some only.

  Raises:
    NonFiniteError: eagerly, after the last leaf, if one holds NaN or Inf.
    SelectionError: if the state has the wrong number of parts.
    StructureError: if there is no base for a step that needs it.
  """
  job = _Job.of(method, state, shapes, contributors, as_params)
  cut = None if streamed or job.plan.params else splitting.cut_of(method)
  if cut is not None:
    job, leaves = _second_part(job, cut, leaves, as_params, traced)
  runner = _Inline() if traced else _Eager(donate, streamed)
  if shared is None:
    shared = job.count(runner, leaves)
  for it in job.items(leaves, shared):
    here = job.plan
    if as_params:
      own = np.dtype(it.work.template.dtype if dtype is None else dtype)
      here = _for_dtype(here, own)
    yield it.name, runner.update(here, it)
  runner.check(lambda name: job.item(name, leaves[name], shared))


def _second_part(
  job: _Job, cut: int, leaves: Leaves, as_params: bool, traced: bool
) -> tuple[_Job, Leaves]:
  """Makes the stages before a cut, and returns what is left to be done."""
  method, shapes, k = job.method, job.shapes, job.contributors
  first = splitting.first_part(method, cut)
  before = _Job.of(first, job.state[:cut], shapes, k, False)
  plan = dataclasses.replace(before.plan, opened=True)
  runner = _Inline() if traced else _Eager(False, False)
  shared = before.count(runner, leaves)
  made, held = {}, {}
  for it in before.items(leaves, shared):
    deltas, held[it.name] = runner.update(plan, it)
    sources = tuple(leafwise.Delta(Dense(d), "add") for d in deltas)
    work = dataclasses.replace(it.work, sources=sources)
    made[it.name] = lambda work=work: work
  runner.check(lambda name: before.item(name, leaves[name], shared))
  second, state = splitting.second_part(method, job.state, cut, held)
  return _Job.of(second, state, shapes, k, as_params), made


def count(
  method: transform.Transform,
  state: Any,
  leaves: Leaves,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  contributors: int,
  as_params: bool,
  find: Callable[..., Any] | None = None,
) -> list[Any]:
  """Returns what each stage counts over the tree, eagerly and streamed.

  Args:
    method: see `run`.
    state: see `run`.
    leaves: all leaves that are worked on.
    shapes: see `run`.
    contributors: k.
    as_params: see `run`.
    find: `(plan, index, items, start, passes) -> carry`, finds what the stage
      `index` counts in another way: `items()` goes over the leaves once,
      `start` is the first carry, `passes(carry)` goes on in the usual way.

  Returns:
    the last carry of each stage; None for those that do not count over the
    tree.
  """
  job = _Job.of(method, state, shapes, contributors, as_params)
  return job.count(_Eager(False, True), leaves, find)


@dataclasses.dataclass(frozen=True)
class _Job:
  """A method, and all that it needs to know of the model but the arrays."""

  method: transform.Transform
  state: Any
  shapes: Mapping[str, tuple[int, ...]]
  order: Mapping[str, int]
  contributors: int
  plan: leafwise.Plan
  varies: bool
  reads_base: bool
  starts: dict[Any, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, method, state, shapes, contributors, as_params) -> _Job:
    order = {name: i for i, name in enumerate(sorted(shapes))}
    if state is None:
      sizes = {
        n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()
      }
      state = transform.initial_state(method, sizes)
    if len(state) != len(method.stages):
      raise SelectionError(
        f"the method has {len(method.stages)} steps and the state "
        f"{len(state)} parts; make it with method.init(params)"
      )
    plan = leafwise.Plan(method.stages, in_params(method, as_params))
    differ = perleaf.varies(state)
    reads = reads_base(method, (), as_params)
    return cls(method, state, shapes, order, contributors, plan, differ, reads)

  def item(
    self,
    name: str,
    fetch: Callable[[], leafwise.Work],
    shared: Sequence[Any],
  ) -> Item:
    method, work = self.method, fetch()
    reads = self.reads_base or _changes_base(work.sources)
    if reads and work.base is None:
      _check_baseless(method, self.plan, name)
    elif not reads and work.base is not None:
      work = leafwise.Work(None, work.sources, work.base)
    like = work.template
    if not isinstance(like, jax.Array):
      arrays = (s for s in work.sources if isinstance(s, jax.Array))
      like = next(arrays, like)
    if not hasattr(like, "ndim") or tuple(like.shape) != work.shape:
      like = jax.ShapeDtypeStruct(work.shape, jnp.float32)
    leaf = placement.leaf_of(
      like, self.order[name], len(self.order), placement.identity_of(name)
    )
    own = perleaf.resolved(self.state, name) if self.varies else self.state
    carries = list(shared)
    for i, (step, options) in enumerate(method.stages):
      if transform.scope_of(step, options) == "leaf":
        carries[i] = self.start_of_leaf(i, own, work.shape)
    return Item(name, leaf, work, own, tuple(carries))

  def start(self, index: int, state: Any, shapes: list[Any]) -> Any:
    """Returns the first carry of a stage that counts over these shapes."""
    step, options = self.method.stages[index]
    assert step.start is not None
    for before, own in self.method.stages[:index]:
      if before.counted is not None:
        shapes = before.counted(shapes, self.contributors, **dict(own))
    return step.start(state[index], shapes, self.contributors, **dict(options))

  def start_of_leaf(self, index: int, state: Any, shape: Any) -> Any:
    """Returns the first carry of a stage that counts over one leaf.

    Made once for all leaves of a shape: it takes longer than to look at a
    small leaf.
    """
    if self.varies:
      return self.start(index, state, [shape])
    known = self.starts.get((index, shape))
    if known is None:
      known = self.starts[index, shape] = self.start(index, state, [shape])
    return known

  def items(self, leaves: Leaves, shared: Sequence[Any]) -> Iterator[Item]:
    for name, fetch in leaves.items():
      yield self.item(name, fetch, shared)

  def count(self, runner, leaves: Leaves, find=None) -> list[Any]:
    shared: list[Any] = [None] * len(self.method.stages)
    ordered = [self.shapes[name] for name in self.order]
    for index, (step, options) in enumerate(self.method.stages):
      if not leaves or transform.scope_of(step, options) != "tree":
        continue
      start = self.start(index, self.state, ordered)
      items = functools.partial(self.items, leaves, shared)
      passes = functools.partial(runner.passes, self.plan, index, items)
      shared[index] = (
        passes(start)
        if find is None
        else find(self.plan, index, items, start, passes)
      )
    return shared


@functools.lru_cache(maxsize=512)
def _for_dtype(plan: leafwise.Plan, dtype: Any) -> leafwise.Plan:
  return dataclasses.replace(plan, dtype=dtype)


@functools.lru_cache(maxsize=512)
def _checking(plan: leafwise.Plan) -> leafwise.Plan:
  """Returns the plan that also looks for what is not finite."""
  carried = all(step.carries_nonfinite for step, _ in plan.stages)
  where = "result" if carried and plan.dtype is not None else "all"
  return dataclasses.replace(plan, checked=where)


@dataclasses.dataclass(frozen=True)
class Item:
  """A leaf with all that its functions are called with."""

  name: str
  leaf: placement.Leaf
  work: leafwise.Work
  state: Any
  carries: tuple[Any, ...]

  def carrying(self, index: int, carry: Any) -> tuple[Any, ...]:
    """The carries, with that of one stage replaced."""
    return (*self.carries[:index], carry, *self.carries[index + 1 :])


def _check_baseless(
  method: transform.Transform, plan: leafwise.Plan, name: str
) -> None:
  """Raises StructureError where there is no base and somebody reads it."""
  asking = [step.name for step, _ in method.stages if step.needs_base]
  if asking or plan.params:
    why = f"the step {asking[0]}" if asking else "what works on parameters"
    raise StructureError(
      f"the base is needed for {name} by {why}: merge(base, ...), or "
      "combine(..., base=params)"
    )


class _Inline:
  """Everything in the trace of a transformation of the user's."""

  def passes(self, plan, index, items, start):
    held = [
      (i.leaf, i.work.base, i.work.sources, i.state, i.carries) for i in items()
    ]

    def one_pass(number, held, carry):
      total = None
      for leaf, base, sources, state, carries in held:
        now = (*carries[:index], carry, *carries[index + 1 :])
        one = leafwise.count_whole(
          plan, index, number, leaf, base, sources, state, now
        )
        total = one if total is None else jax.tree.map(jnp.add, total, one)
      return leafwise.finish(plan, index, number, total, carry)

    carry = start
    for number, counted in enumerate(plan.counts(index)):
      if counted.once:
        carry, _ = one_pass(number, held, carry)
        continue
      carry = leafwise.repeated(
        functools.partial(one_pass, number),
        lax.stop_gradient(held),
        carry,
        leafwise.needed(plan, index, number, carry),
      )
    return carry

  def update(self, plan, item):
    out, _ = leafwise.update(
      plan,
      item.leaf,
      item.work.base,
      item.work.sources,
      item.state,
      item.carries,
    )
    return out

  def check(self, again):
    pass


class _Eager:
  """Leaf by leaf, without waiting for any; finiteness is checked at the end."""

  def __init__(self, donate: bool, streamed: bool):
    self._donate = donate
    self._streamed = streamed
    self._bad: dict[str, Any] = {}
    self._plans: dict[str, leafwise.Plan] = {}

  def passes(self, plan, index, items, start):
    carry = start
    for number, counted in enumerate(plan.counts(index)):
      done = not leafwise.needed(plan, index, number, carry)
      while not done:
        total = self._pass(plan, index, number, items, carry)
        carry, done = jax.device_get(_finish_jit(counted.finish)(total, carry))
        done = done or counted.once
    return carry

  def _pass(self, plan, index, number, items, carry):
    # Leaves of one set of devices are summed there, the sets on the host.
    totals: dict[Any, Any] = {}
    for item in items():
      work = item.work
      where = _devices(work.template)
      totals[where] = _count_jit(plan, index, number)(
        item.leaf,
        work.base,
        work.sources,
        item.state,
        item.carrying(index, carry),
        totals.get(where),
      )
      if self._streamed:
        jax.block_until_ready(totals[where])
    parts = jax.device_get(list(totals.values()))
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)

  def update(self, plan, item):
    plan = _checking(plan)
    out, self._bad[item.name] = self._call(plan, item, self._donate)
    self._plans[item.name] = plan
    return out

  def _call(self, plan, item, donate):
    work, like = item.work, item.work.template
    sharding = None
    if plan.dtype is not None and item.leaf.mesh is not None:
      sharding = like.sharding
    base, sources, spare = work.base, work.sources, None
    if donate and isinstance(like, jax.Array) and like.dtype == plan.dtype:
      # What the result may be written over: the base's leaf, whether it is
      # read or not, or without a base the first contributor's.
      uses = sum(s is like for s in sources)
      if not uses:
        spare, base = "base", like
      elif uses == 1 and sources[0] is like and base is None:
        spare = "first"
    function = _update_jit(plan, spare, sharding)
    first, rest = sources[0], sources[1:]
    return function(base, first, rest, item.leaf, item.state, item.carries)

  def _seen_again(self, item):
    """Counts what is not finite in contributors too, if they still exist."""
    held = jax.tree.leaves((item.work.base, item.work.sources))
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in held):
      return None
    plan = dataclasses.replace(self._plans[item.name], checked="all")
    return jax.device_get(self._call(plan, item, False)[1])

  def check(self, again):
    bad = jax.device_get(self._bad)
    lines = []
    for name, counts in bad.items():
      if not counts.any():
        continue
      if self._plans[name].checked == "result":
        seen = self._seen_again(again(name))
        counts = counts if seen is None else seen
      given, made = ((int(c[0]) << LIMB) + int(c[1]) for c in counts.T)
      what = (
        f"{given} entries of the contributors"
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
def _count_jit(
  plan: leafwise.Plan, index: int, number: int
) -> Callable[..., Any]:
  @jax.jit
  def count(leaf, base, sources, state, shared, total):
    one = leafwise.count_whole(
      plan, index, number, leaf, base, sources, state, shared
    )
    return one if total is None else jax.tree.map(jnp.add, total, one)

  return count


@functools.lru_cache(maxsize=512)
def _finish_jit(finish: Callable[..., Any]) -> Callable[..., Any]:
  return jax.jit(finish)


@functools.lru_cache(maxsize=4096)
def _update_jit(
  plan: leafwise.Plan, spare: str | None, sharding: Any
) -> Callable[..., Any]:
  def update(base, first, rest, leaf, state, shared):
    return leafwise.update(plan, leaf, base, (first, *rest), state, shared)

  # A buffer that is given away is kept as an argument even where nobody
  # reads it: the result is written there, which spares fresh memory.
  options: dict[str, Any] = {}
  if spare is not None:
    at = ("base", "first").index(spare)
    options = {"donate_argnums": (at,), "keep_unused": True}
  if sharding is not None:
    options["out_shardings"] = (sharding, None)
  return jax.jit(update, **options)
