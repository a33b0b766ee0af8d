"""The activations of a model that have its hidden dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from patchjax.merging.alignment import inferring, specs, tracing, walking
from patchjax.merging.alignment.dimensions import (
  Dimension,
  expand,
  size_of,
)
from patchjax.trees.errors import StructureError
from patchjax.trees.names import named_leaves

Tapped = tuple[
  dict[str, list["str | int"]], dict[str, np.ndarray], dict[str, np.ndarray]
]


def tapped(
  spec: specs.PermutationSpec,
  apply_fn: Callable[..., Any],
  a: Any,
  b: Any,
  inputs: Sequence[Any],
) -> Tapped:
  """Returns what two models' contractions over hidden dimensions read.

  Args:
    spec: of the model.
    apply_fn: the model, `(params, *inputs)`, traceable.
    a: its parameters.
    b: others.
    inputs: arrays it is called with.

  Returns:
    `(factors, arrays of a, arrays of b)`, each by a name of the contraction.

  Raises:
    StructureError: if a dimension is contracted nowhere outside loops.
  """
  closed, arrays = inferring.jaxpr_of(apply_fn, a, inputs)
  labels, trace = inferring.traced(closed, arrays)
  known = _names(spec, labels)
  moving = set(spec.moving)
  chosen = {}
  for tap in trace.taps:
    if any(known.get(d) in moving for d in tracing.roots(tap.summed)):
      chosen[tap.equation, tap.operand] = [
        known.get(f, f.size) if isinstance(f, Dimension) else f
        for label in tap.axes
        for f in expand(label)
      ]
  missing = moving - {f for factors in chosen.values() for f in factors}
  if missing:
    raise StructureError(
      "no contraction outside loops reads the activations of "
      + ", ".join(sorted(missing))
      + "; match by weights"
    )
  names = {key: f"equation {key[0]}, operand {key[1]}" for key in chosen}
  run = jax.jit(lambda arrays, inputs: _run(closed, arrays, inputs, chosen))
  first, second = (
    {
      names[key]: np.asarray(x)
      for key, x in run(named_arrays(tree, arrays), tuple(inputs)).items()
    }
    for tree in (a, b)
  )
  return {names[key]: f for key, f in chosen.items()}, first, second


def named_arrays(tree: Any, like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of a pytree that have these names.

  Args:
    tree: any pytree.
    like: a mapping with the names.
  """
  named = named_leaves(tree)
  return {name: named[name] for name in like}


def _names(spec, labels) -> dict[Dimension, str | int]:
  """Returns what a spec calls the dimensions of a trace."""
  found = {}
  for leaf, axes in spec.axes.items():
    for label, own in zip(labels[leaf], axes, strict=True):
      factors = expand(label) or [1]
      sizes = [spec.size(factor) for factor in own]
      if sizes != [size_of(f) for f in factors]:
        continue  # the spec knows of another way to cut this axis
      pairs = zip(factors, own)
      found |= {d: f for d, f in pairs if isinstance(d, Dimension)}
  return found


def _run(closed, arrays, inputs, chosen) -> dict[tuple[int, int], Any]:
  count = itertools.count()
  taken = {}

  def visit(eqn, ins):
    number = next(count)
    for operand in range(min(2, len(ins))):
      if (number, operand) in chosen:
        taken[number, operand] = ins[operand]
    # Primitives that hold functions are calls, and calls are written out.
    outs = eqn.primitive.bind(*ins, **eqn.params)
    return outs if eqn.primitive.multiple_results else [outs]

  leaves = jax.tree.leaves((arrays, inputs))
  walking.walk(closed.jaxpr, closed.consts, leaves, lambda x: x, visit)
  return taken
