"""infer_permutations: the hidden dimensions of a model, from its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from patchjax.merging.alignment import checking, specs, tracing
from patchjax.merging.alignment.dimensions import (
  Dimension,
  expand,
  fixed,
  pin,
)
from patchjax.trees.dtypes import is_array
from patchjax.trees.errors import StructureError
from patchjax.trees.names import flatten


def infer_permutations(
  apply_fn: Callable[..., Any],
  params: Any,
  *inputs: Any,
  on_doubt: Literal["refuse", "fix"] = "refuse",
  seed: int = 0,
  tolerance: float | None = None,
) -> specs.PermutationSpec:
  """Returns which axes of which leaves can be permuted together.

  Follows the axes of every leaf through the equations of the model's jaxpr:
  through contractions, elementwise functions, sums and norms, transposes,
  reshapes into heads and back, loops over stacked layers, and calls. Axes
  that meet share a dimension; the model's inputs and outputs, and whatever is
  read by its place (a row of an embedding, a slice, a causal mask), keep
  their order. What remains is proven by the rules (`rules.RULES`), and then
  checked: permuted at random, the model must still compute the same.

  Where an axis holds heads, the numbers of a head may be in another order in
  each head, if the model never mixes heads; the same holds for the units of
  layers that are stacked for a scan. Both are found (`Hidden.within`).

  Args:
    apply_fn: the model, `(params, *inputs)`, traceable.
    params: pytree of arrays.
    *inputs: arrays it is called with; a few examples that differ are enough.
    on_doubt: what to do with dimensions that meet a primitive without a rule:
      "refuse", or "fix": let them keep their order, which is always right.
    seed: of the check.
    tolerance: of the check, relative to what moving the parameters at random
      changes; by default 1e-3 for float32, less for float64, more for half
      precision.

  Returns:
    The spec. Print it: it says why what does not move does not, and of which
    leaves the check sees nothing, since these inputs do not show them (one
    step alone hides queries and keys): give others, or trust the rules.

  Raises:
    MismatchError: if the check fails: a rule would be wrong.
    NonFiniteError: if the model gives NaN in the check.
    StructureError: if a primitive has no rule (it is named, with the leaves
      whose axes it reads), nothing can be permuted, or outputs do not depend
      on the parameters.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> shapes = {"w1": (4, 8), "b1": (8,), "w2": (8, 3)}
    >>> params = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    >>> def mlp(p, x):
    ...   return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]
    >>> spec = pj.merging.infer_permutations(mlp, params, np.ones((2, 4), "f"))
    >>> spec
    PermutationSpec
      b1:0: 8 units
        in b1, w1, w2
      w1:0 keeps its order: the model's input
      w2:1 keeps its order: the model's output
  """
  if on_doubt not in ("refuse", "fix"):
    raise ValueError(f"on_doubt must be 'refuse' or 'fix', got {on_doubt!r}")
  labels, trace = traced(*jaxpr_of(apply_fn, params, inputs))
  spec = _spec(labels, trace, on_doubt)
  if not spec.moving:
    raise StructureError(
      "no hidden dimension can be permuted:\n"
      + "\n".join(f" - {key}: {why}" for key, why in spec.reasons.items())
    )
  return checking.checked(
    spec, apply_fn, params, *inputs, seed=seed, tolerance=tolerance
  )


def jaxpr_of(
  apply_fn: Callable[..., Any], params: Any, inputs: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
  """Returns the closed jaxpr of a model, and its arguments by text name.

  Args:
    apply_fn: the model, `(params, *inputs)`.
    params: pytree of arrays.
    inputs: arrays it is called with.
  """
  named, treedef = flatten(params)
  arrays = {name: leaf for name, leaf in named.items() if is_array(leaf)}

  def call(arrays, inputs):
    leaves = (named | arrays).values()
    return apply_fn(jax.tree.unflatten(treedef, leaves), *inputs)

  return jax.make_jaxpr(call)(arrays, tuple(inputs)), arrays


def traced(
  closed: Any, arrays: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, ...]], tracing.Trace]:
  """Returns the labels of the leaves' axes, and the trace of the model.

  Args:
    closed: its closed jaxpr.
    arrays: its first arguments, by text name.
  """
  jaxpr = closed.jaxpr
  used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
  used |= {id(v) for v in jaxpr.outvars}
  names = sorted(arrays)  # jax sorts the keys of a dict
  values, labels = [], {}
  for name, var in zip(names, jaxpr.invars):
    value = tracing.Value(
      tuple(
        ()
        if size == 1
        else (Dimension(size, None if id(var) in used else _UNUSED),)
        for size in np.shape(arrays[name])
      )
    )
    values.append(value)
    labels[name] = value.axes
  for var in jaxpr.invars[len(names) :]:
    shape = getattr(var.aval, "shape", ())
    axes = tuple(fixed(size, "the model's input") for size in shape)
    values.append(tracing.Value(axes, live=True))
  trace = tracing.Trace()
  consts = [tracing.literal_value(c) for c in closed.consts]
  for out in trace.run(jaxpr, consts, values):
    for label in out.axes:
      pin(label, "the model's output")
  return labels, trace


_UNUSED = "the model does not read it"


def _spec(
  labels: Mapping[str, tuple[Any, ...]], trace: tracing.Trace, on_doubt: str
) -> specs.PermutationSpec:
  places: dict[Dimension, list[str]] = {}
  for leaf, axes in labels.items():
    for i, label in enumerate(axes):
      factors = expand(label)
      for j, factor in enumerate(factors):
        if isinstance(factor, Dimension):
          part = f".{j}" if len(factors) > 1 else ""
          places.setdefault(factor, []).append(f"{leaf}:{i}{part}")
  if on_doubt == "refuse":
    _check_doubts(places)
  moving = [d for d in places if not (d.reason or d.doubt)]
  within = _within(moving, list(places), trace)
  outer = {d for found in within.values() for d in found}
  known = {d: places[d][0] for d in places if d in within or d in outer}
  dimensions = {
    name: specs.Hidden(
      d.size, tuple(known[p] for p in within.get(d, ())), d in within
    )
    for d, name in known.items()
  }
  found = {
    leaf: tuple(
      tuple(
        known.get(f, f.size) if isinstance(f, Dimension) else f
        for f in expand(label)
      )
      or (1,)
      for label in axes
    )
    for leaf, axes in labels.items()
  }
  reasons = {
    place: d.reason or d.doubt or ""
    for d, own in places.items()
    if d not in within
    for place in own
  }
  return specs.PermutationSpec(dimensions, found, reasons)


def _check_doubts(places: Mapping[Dimension, Sequence[str]]) -> None:
  doubts: dict[str, list[str]] = {}
  for dimension, own in places.items():
    if dimension.doubt and not dimension.reason:
      doubts.setdefault(dimension.doubt, []).extend(own)
  if doubts:
    raise StructureError(
      "it cannot be proven which axes may be permuted:\n"
      + "\n".join(
        f" - {why}; it reads what depends on {', '.join(own)}"
        for why, own in doubts.items()
      )
      + "\nto mend it: keep these axes in their order (on_doubt='fix'), or "
      "write the spec down (given_permutations)"
    )


def _within(
  moving: Sequence[Dimension],
  known: Sequence[Dimension],
  trace: tracing.Trace,
) -> dict[Dimension, list[Dimension]]:
  """Returns, for each dimension that moves, those it may differ within.

  Dimension d may be in another order for each entry of h if no array has d
  without h, or h twice, and no contraction aligns d of its operands without
  aligning h too: else entries of d of different h would meet. So they would if
  h stood for an axis along which an array with d was put in another order.
  """
  candidates = {d: [h for h in known if h is not d] for d in moving}
  for value in trace.arrays:
    own = tracing.roots(value.axes)
    around = set(tracing.roots([tuple(value.around)]))
    counts = {h: own.count(h) + (h in around) for h in (*own, *around)}
    for d in {d for d in own if d in candidates}:
      candidates[d] = [h for h in candidates[d] if counts.get(h, 0) == 1]
      if counts[d] > 1:
        candidates[d] = []
  for met, around in trace.meetings:
    together = {*tracing.roots(met), *tracing.roots([tuple(around)])}
    for d in together & candidates.keys():
      candidates[d] = [h for h in candidates[d] if h in together]
  for new, old in trace.made:
    # By now it may be the same as the dimension of the axis that was read.
    apart = set(tracing.roots([new]))
    for d in {*tracing.roots([old])} & candidates.keys():
      candidates[d] = [h for h in candidates[d] if h not in apart]
  # Of two that may each differ within the other, the first is the outer one.
  place = {h: i for i, h in enumerate(known)}
  return {
    d: [
      h for h in found if d not in candidates.get(h, ()) or place[h] < place[d]
    ]
    for d, found in candidates.items()
  }
