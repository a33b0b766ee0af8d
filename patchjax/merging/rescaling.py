"""keep_l1: sparsify, and scale every leaf back to its L1 norm.

mergekit's `rescale`: one number a leaf and contributor, where DARE and DELLA
divide by probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from patchjax.merging import dropping, dropping_by_rank
from patchjax.merging.conflict import sums
from patchjax.patches import placement, transform

Array = Any
Spec = tuple[Any, ...]

_MASKS = {
  "drop": dropping.masked,
  "drop_by_rank": dropping_by_rank.masked,
}
"""What makes the masks, of steps that do nothing but mask."""


def keep_l1(selection: transform.Transform) -> transform.Transform:
  """Returns the step that sparsifies and keeps the L1 norm of every leaf.

  `s d'` with d' what the selection makes of d and `s = |d|_1 / |d'|_1`; left
  alone where either norm is below 1e-7. mergekit 0.1.5
  (https://github.com/arcee-ai/mergekit) does so for `rescale: true`. A norm
  that is not finite leaves no entry of the leaf finite.

  Args:
    selection: a single step that counts over leaves or not at all:
      `drop(..., rescale=False)`, `trim(..., scope="leaf")`.

  Raises:
    ValueError: if it is a chain, or counts over the tree, or counts something
      else than task vectors.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0, 0, 0], [1, 2, -3]))
    >>> half = pj.trim(density=0.4, scope="leaf")
    >>> step = pj.merging.keep_l1(half)
    >>> pj.merge(base, [tuned], step)["w"].tolist()
    [0.0, 0.0, -6.0]
  """
  scopes = {transform.scope_of(*stage) for stage in selection.stages}
  if len(selection.stages) != 1 or not scopes <= {"leaf", "none"}:
    raise ValueError(
      "expected one step that counts over single leaves or not at all, got "
      f"{selection}"
    )
  ((step, _),) = selection.stages
  if step.kept is not None:
    raise ValueError(
      f"expected a step that counts task vectors, got {step.name}"
    )
  (numbers,) = selection.numbers
  return transform.Transform.of(_KEEP_L1, numbers, of=selection.spec)


@functools.lru_cache(maxsize=512)
def _stage(of: Spec) -> tuple[transform.Step, transform.Options]:
  """The selecting step of a spec, and its options."""
  (stage,) = transform.from_spec(of, ({},)).stages
  return stage


def _scope(*, of: Spec) -> str:
  return transform.scope_of(*_stage(of))


def _start(state, shapes, k, *, of):
  step, options = _stage(of)
  assert step.start is not None
  return step.start(state, shapes, k, **dict(options))


@functools.lru_cache(maxsize=512)
def _counts(*, of: Spec) -> tuple[transform.Count, ...]:
  """What the selection counts: with its options, not with this step's."""
  step, options = _stage(of)

  def own(f):
    return lambda *args, of: f(*args, **dict(options))

  return tuple(
    dataclasses.replace(count, reduce=own(count.reduce))
    for count in transform.counts_of(step, options)
  )


def _rescaled(leaf, deltas, base, state, carry, *, of):
  del base
  step, options = _stage(of)
  options = dict(options)

  def kept(deltas, state, carry):
    return step.update(leaf, deltas, None, state, carry, **options)

  # Here and below the sums read behind a barrier, or the compiler would store
  # for the update what is faster to compute again.
  make = None if options.get("rescale") else _MASKS.get(step.name)
  if make is None:
    seen, *rest = lax.optimization_barrier((deltas, state, carry))
    factors = _factors(leaf, seen, kept(seen, *rest))
    found = kept(deltas, state, carry)
  else:
    # The masks are not made twice: some are dear, the others are fused.
    rest = {k: v for k, v in options.items() if k != "rescale"}
    masks = make(leaf, deltas, state, **rest)
    seen = lax.optimization_barrier(deltas)
    factors = _factors(leaf, seen, tuple(map(_where, masks, seen)))
    found = map(_where, masks, deltas)
  return tuple(
    transform.rounded(d * f.astype(d.dtype)) for d, f in zip(found, factors)
  )


def _where(mask, delta):
  return jnp.where(mask, delta, jnp.zeros_like(delta))


def _factors(leaf, deltas, kept):
  """What to multiply the entries of each contributor by."""
  norms = placement.sum_over_shards(_norms, (deltas, kept), leaf)
  before, after = norms.astype(jnp.float32).reshape(-1, 2).T
  least = jnp.float32(1e-7)
  usable = (before >= least) & (after >= least)
  one = jnp.ones_like(after)
  factors = jnp.where(usable, before / jnp.where(usable, after, one), one)
  return jnp.where(jnp.isfinite(before), factors, jnp.float32(jnp.nan))


def _norms(held, leaf):
  pairs = zip(*held, strict=True)
  terms = [abs(x) for pair in pairs for x in pair]
  return sums.totals(terms, local=leaf.local, together=2)


_KEEP_L1 = transform.register_step(
  transform.Step(
    name="keep_l1",
    update=_rescaled,
    start=_start,
    counts=_counts,
    scope=_scope,
    carries_nonfinite=True,
  )
)
