"""The abstract run of a model: which axes of what share a dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchjax.merging.alignment import rules
from patchjax.merging.alignment.dimensions import (
  Dimension,
  Label,
  expand,
  fixed,
  free,
  pin,
)
from patchjax.merging.alignment.walking import opened, walk

# Consts larger than this are taken to differ along every axis.
_LARGEST_CONST = 1 << 24


@dataclasses.dataclass(frozen=True)
class Value:
  """An array that is not there: the labels of its axes.

  Attributes:
    axes: one label an axis.
    around: the steps of the scans around it that it differs between.
    live: whether it depends on the model's inputs.
  """

  axes: tuple[Label, ...]
  around: frozenset[Dimension] = frozenset()
  live: bool = False


@dataclasses.dataclass(frozen=True)
class Tap:
  """An operand of a contraction that depends on the inputs.

  Attributes:
    equation: the number of its equation in the walk.
    operand: which operand.
    axes: the labels of its axes.
    summed: the labels of those that are summed over.
  """

  equation: int
  operand: int
  axes: tuple[Label, ...]
  summed: tuple[Label, ...]


class Trace:
  """What an abstract run found.

  Attributes:
    arrays: axes and surrounding steps of all arrays.
    meetings: of each contraction, the labels of the axes that it aligns, and
      the steps around it.
    made: of each array with dimensions that no operand has, since an axis is
      read by place: these, and its others.
    taps: the activations that contractions read, outside loops.
  """

  def __init__(self):
    self.arrays: list[Value] = []
    self.meetings: list[tuple[list[Label], frozenset[Dimension]]] = []
    self.made: list[tuple[Label, Label]] = []
    self.taps: list[Tap] = []
    self._count = 0
    self._depth = 0

  def run(
    self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]
  ) -> list[Value]:
    """Returns the outputs of a jaxpr.

    Args:
      jaxpr: an open jaxpr.
      consts: its constants.
      args: its arguments.
    """
    self.arrays += [*consts, *args]
    return walk(jaxpr, consts, args, literal_value, self._visit)

  def _visit(self, eqn: Any, ins: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    number = self._count
    if not self._depth:
      self._count += 1
    around = frozenset().union(*(value.around for value in ins))
    live = any(value.live for value in ins)
    labels = [value.axes for value in ins]
    if name in _CONTROL:
      self._depth += 1
      outs = _CONTROL[name](self, eqn, ins)
      self._depth -= 1
    else:
      rule = rules.RULES.get(name, _no_rule)
      outs = [Value(axes, around, live) for axes in rule(eqn, labels)]
      self._note_made(labels, outs)
    met = rules.met_axes(eqn, 0)
    if met:
      self.meetings.append(([labels[0][i] for i in met], around))
    if rules.summed_axes(eqn, 0):
      self._tap(eqn, number, ins)
    self.arrays += outs
    return outs

  def _note_made(self, ins: list[rules.Labels], outs: list[Value]) -> None:
    known = {d for axes in ins for d in roots(axes)}
    for value in outs:
      own = roots(value.axes)
      new = tuple(d for d in own if d not in known)
      if new:
        self.made.append((new, tuple(d for d in own if d in known)))

  def _tap(self, eqn: Any, number: int, ins: list[Value]) -> None:
    if self._depth:
      return
    for i, value in enumerate(ins[:2]):
      if value.live:
        summed = rules.summed_axes(eqn, i)
        own = tuple(value.axes[axis] for axis in summed)
        self.taps.append(Tap(number, i, value.axes, own))


def literal_value(value: Any) -> Value:
  """Returns the labels of a constant: axes along which it does not vary.

  Args:
    value: an array or a number.
  """
  shape = np.shape(value)
  if not shape:
    return Value(())
  reason = "a constant in the model differs along it"
  known = None
  if int(np.prod(shape)) <= _LARGEST_CONST and hasattr(value, "dtype"):
    known = _equal_along(value)
  return Value(
    tuple(
      free(size) if known and known[i] else fixed(size, reason)
      for i, size in enumerate(shape)
    )
  )


def _equal_along(value: Any) -> list[bool] | None:
  try:
    array = np.asarray(value)
  except TypeError:  # keys of random numbers are no plain array
    return None
  if array.dtype == object or not array.size:
    return None
  return [
    bool((array == np.take(array, [0], axis=axis)).all())
    for axis in range(array.ndim)
  ]


def _no_rule(eqn: Any, ins: list[rules.Labels]) -> list[rules.Labels]:
  reason = f"{eqn.primitive.name} has no rule here"
  for labels in ins:
    for label in labels:
      pin(label, reason, proven=False)
  return [
    tuple(
      fixed(size, f"{eqn.primitive.name} made it")
      for size in getattr(out.aval, "shape", ())
    )
    for out in eqn.outvars
  ]


def _fresh(aval: Any) -> tuple[Label, ...]:
  return tuple(() if size == 1 else (Dimension(size),) for size in _shape(aval))


def _shape(aval: Any) -> tuple[int, ...]:
  return tuple(getattr(aval, "shape", ()))


def _tie(x: tuple[Label, ...], y: tuple[Label, ...], aval: Any) -> None:
  for a, b, size in zip(x, y, _shape(aval), strict=True):
    rules.aligned(
      [a, b], [size, size], size, "a loop carries axes cut in unlike ways"
    )


def _loop(
  trace: Trace,
  body: Any,
  fixed_ins: list[Value],
  carries: list[Value],
  slices: list[Value],
) -> list[Value]:
  """Runs a loop's body once, for carries that stand for those of all steps."""
  jaxpr, own = opened(body)
  count = len(fixed_ins)
  names = jaxpr.invars[count : count + len(carries)]
  live = any(v.live for v in (*fixed_ins, *carries, *slices))
  # A carry may be equal along an axis at first, and not later.
  held = [Value(_fresh(var.aval), frozenset(), live) for var in names]
  for value, first, var in zip(held, carries, names, strict=True):
    _tie(first.axes, value.axes, var.aval)
  consts = [literal_value(c) for c in own]
  outs = trace.run(jaxpr, consts, [*fixed_ins, *held, *slices])
  for value, last, var in zip(held, outs, names):
    _tie(value.axes, last.axes, var.aval)
  return [*held, *outs[len(held) :]]


def _scan(trace: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
  params = eqn.params
  consts, carries = params["num_consts"], params["num_carry"]
  reason = "scan takes its entries one after the other"
  # One dimension stands for the steps. Slices differ between them, and a
  # hidden dimension of slices alone may have another order in each.
  step = Dimension(params["length"], reason)
  slices = []
  for value in ins[consts + carries :]:
    rules.aligned([value.axes[0], (step,)], [step.size] * 2, step.size, reason)
    slices.append(Value(value.axes[1:], value.around | {step}, value.live))
  outs = _loop(
    trace,
    params["jaxpr"],
    ins[:consts],
    ins[consts : consts + carries],
    slices,
  )
  first = () if step.size == 1 else (step,)
  return [
    value
    if i < carries
    else Value((first, *value.axes), value.around - {step}, value.live)
    for i, value in enumerate(outs)
  ]


def _while(trace: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
  params = eqn.params
  tested, bodied = params["cond_nconsts"], params["body_nconsts"]
  carries = ins[tested + bodied :]
  outs = _loop(
    trace, params["body_jaxpr"], ins[tested : tested + bodied], carries, []
  )
  jaxpr, own = opened(params["cond_jaxpr"])
  trace.run(jaxpr, [literal_value(c) for c in own], [*ins[:tested], *outs])
  return outs


def _cond(trace: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
  live = any(value.live for value in ins)
  around = frozenset().union(*(value.around for value in ins))
  results = []
  for branch in eqn.params["branches"]:
    jaxpr, own = opened(branch)
    consts = [literal_value(c) for c in own]
    results.append(trace.run(jaxpr, consts, ins[1:]))
  found = []
  for out, *values in zip(eqn.outvars, *results, strict=True):
    axes = tuple(
      rules.aligned(
        [value.axes[i] for value in values],
        [size] * len(values),
        size,
        "branches give axes cut in unlike ways",
      )
      for i, size in enumerate(_shape(out.aval))
    )
    found.append(Value(axes, around, live))
  return found


_CONTROL = {"cond": _cond, "scan": _scan, "while": _while}


def roots(axes: Sequence[Label]) -> list[Dimension]:
  """Returns the dimensions of an array, as they turned out to be."""
  return [
    factor
    for label in axes
    for factor in expand(label)
    if isinstance(factor, Dimension)
  ]
