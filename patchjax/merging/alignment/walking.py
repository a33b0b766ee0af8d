"""Walking over the equations of a jaxpr, with calls written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from patchjax.statistics.wiring import called


def walk(
  jaxpr: Any,
  consts: Sequence[Any],
  args: Sequence[Any],
  literal: Callable[[Any], Any],
  visit: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
  """Returns the outputs of a jaxpr whose equations are run by `visit`.

  Args:
    jaxpr: an open jaxpr.
    consts: what its constants are.
    args: what its arguments are.
    literal: called with a literal's value.
    visit: called with each equation and its inputs, returns its outputs.
      Equations come in one order, whatever the values are.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> seen = []
    >>> closed = jax.make_jaxpr(lambda x: jax.nn.relu(x) + 1)(2.0)
    >>> walk(closed.jaxpr, [], [2.0], lambda x: x, lambda eqn, ins: (
    ...   seen.append(eqn.primitive.name), ins[:1])[1])
    [2.0]
    >>> seen
    ['max', 'add']
  """
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))

  def read(atom):
    if isinstance(atom, core.Literal):
      aval: Any = atom.aval
      return literal(np.asarray(atom.val, aval.dtype))
    return values[atom]

  for eqn in jaxpr.eqns:
    ins = [read(atom) for atom in eqn.invars]
    inner = called(eqn)
    if inner is None:
      outs = visit(eqn, ins)
    else:
      own = [literal(c) for c in inner.consts]
      outs = walk(inner.jaxpr, own, ins, literal, visit)
    values |= dict(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """Returns a jaxpr and its constants, whether it was closed or not."""
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()
