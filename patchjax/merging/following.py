"""Sums over a leaf of what another step keeps of it.

A step that scales by a sum over what a selection leaves, and by one over what
was there before, such as L1 norms, holds the selecting step in its options, as
a spec. Its passes are those of the selection, and then one
more, in which the sums of a pass are those of the settled selection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from patchjax.merging.conflict import sums
from patchjax.patches import transform

Array = Any


def spec_of(selection: transform.Transform) -> tuple[Any, ...]:
  """Returns the option `of` that stands for a selecting step.

  Args:
    selection: a single step that counts over leaves, or not at all.

  Raises:
    ValueError: if it is not.
  """
  scopes = {transform.scope_of(*stage) for stage in selection.stages}
  if len(selection.stages) != 1 or not scopes <= {"leaf", "none"}:
    raise ValueError(
      "expected one step that counts over single leaves or not at all, got "
      f"{selection}"
    )
  return selection.spec


def _found(of: tuple[Any, ...]) -> tuple[transform.Step, dict[str, Any], bool]:
  """The step of a spec, its options, and whether it counts."""
  ((step, options),) = transform.from_spec(of, ({},)).stages
  return step, dict(options), transform.scope_of(step, options) != "none"


def kept(leaf, deltas, state, carry, of) -> tuple[Array, ...]:
  """Returns what the selection keeps, once (or as far as) it is settled.

  Args:
    leaf: where the leaf is.
    deltas: of the contributors.
    state: of the step: the numbers of the selection are in it.
    carry: of the step.
    of: its option.
  """
  step, options, counts = _found(of)
  inner = carry[0] if counts else None
  return step.update(leaf, deltas, None, state, inner, **options)


def passes(
  summed: Callable[..., tuple[Array, ...]],
) -> dict[str, Any]:
  """Returns `start`, `counts`, `scope` of a step that sums.

  The step has the option `of`; its carry is a pair of the selection's and the
  sums, an array of `[len(summed(...))]`.

  Args:
    summed: `(deltas, kept)`, the arrays whose sums over the leaf are wanted;
      those of one contributor, as far as they are computed from each other,
      stand in pairs.

  Returns:
    keyword arguments of `Step`.
  """

  def start(state, shapes, k, *, of, **rest):
    del rest
    step, options, counts = _found(of)
    inner = step.start(state, shapes, k, **options) if step.start else ()
    terms = summed(*(((np.zeros(()),) * k,) * 2))
    return inner, np.zeros(len(terms), np.float32)

  def counts(*, of, **rest):
    del rest
    step, options, counts = _found(of)
    inner = transform.counts_of(step, tuple(options.items())) if counts else ()
    return (*(_inner(one, options) for one in inner), sums_of_kept)

  def reduce(leaf, deltas, state, carry, *, of, **rest):
    del rest
    terms = summed(deltas, kept(leaf, deltas, state, carry, of))
    # Two at a time: of more, the compiler on a CPU computes all in full first,
    # for six times as long.
    totals = [
      sums.totals(terms[i : i + 2], local=leaf.local)
      for i in range(0, len(terms), 2)
    ]
    return jnp.concatenate(totals).astype(jnp.float32)

  def finish(total, carry, **options):
    del options
    return (carry[0], total), jnp.asarray(True)

  sums_of_kept = transform.Count(reduce, finish, once=True)
  return {"start": start, "counts": counts, "scope": lambda **_: "leaf"}


def _inner(count: transform.Count, options: dict[str, Any]) -> transform.Count:
  """Returns what the selection counts, with its part of the carry."""

  def reduce(leaf, deltas, state, carry, **rest):
    del rest
    return count.reduce(leaf, deltas, state, carry[0], **options)

  def finish(total, carry, **rest):
    del rest
    inner, done = count.finish(total, carry[0], **options)
    return (inner, carry[1]), done

  def needed(carry, **rest):
    del rest
    return count.needed is None or count.needed(carry[0], **options)

  return transform.Count(reduce, finish, once=count.once, needed=needed)
