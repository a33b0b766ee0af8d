"""What each primitive says about the axes of its operands and results.

A permutation of a hidden dimension passes through a primitive if permuting the
operands permutes the results, and nothing else. Elementwise functions do that
where their operands are aligned; sums and maxima over the dimension forget its
order; a contraction does if both operands have it. What reads entries by their
place (a slice, a cumulative sum) binds the axis it reads along.

Each rule takes the equation and the labels of its operands' axes, one tuple an
operand, and returns those of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from patchjax.merging.alignment.dimensions import (
  Label,
  MisalignedError,
  fixed,
  free,
  pin,
  regroup,
  unify,
)

Labels = tuple[Label, ...]
Rule = Callable[[Any, list[Labels]], list[Labels]]

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
bessel_i1e cbrt ceil clamp clz complex conj convert_element_type cos cosh
digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag
integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
nextafter not or polygamma population_count pow real reduce_precision rem round
rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
sinh sqrt square sub tan tanh xor zeta
"""
_SAME = """
copy copy_p device_put mesh_cast optimization_barrier pcast pvary reshard
sharding_constraint stop_gradient
"""
_REDUCTIONS = """
reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""


def place(eqn: Any) -> str:
  """Returns why an axis that an equation reads by place cannot move."""
  return f"{eqn.primitive.name} reads its entries by their place"


def shapes(eqn: Any) -> list[tuple[int, ...]]:
  """Returns the shapes of the operands of an equation."""
  return [tuple(getattr(v.aval, "shape", ())) for v in eqn.invars]


def aligned(
  labels: Sequence[Label], sizes: Sequence[int], size: int, reason: str
) -> Label:
  """Returns the label of an axis that goes along with axes of operands.

  Args:
    labels: of the operands' axes.
    sizes: theirs; an axis of size 1 says nothing.
    size: of the axis.
    reason: what binds them if they cannot be aligned.
  """
  found = free(size)
  for label, own in zip(labels, sizes, strict=True):
    if own != size or size == 1:
      continue
    try:
      found = unify(found, label)
    except MisalignedError:
      found = pin(label, pin_all([found], reason))
  return found


def pin_all(labels: Sequence[Label], reason: str) -> str:
  """Binds all these axes; returns the reason."""
  for label in labels:
    pin(label, reason)
  return reason


def elementwise(eqn: Any, ins: list[Labels]) -> list[Labels]:
  """Operands are aligned, one axis with one axis; scalars say nothing."""
  out = tuple(eqn.outvars[0].aval.shape)
  given = [
    (labels, shape)
    for labels, shape in zip(ins, shapes(eqn), strict=True)
    if len(shape) == len(out)
  ]
  reason = f"{eqn.primitive.name} joins axes that are cut in unlike ways"
  labels = tuple(
    aligned([x[i] for x, _ in given], [s[i] for _, s in given], size, reason)
    for i, size in enumerate(out)
  )
  return [labels] * len(eqn.outvars)


def _same(eqn, ins):
  del eqn
  return list(ins)


def _reduction(eqn, ins):
  axes = {int(axis) for axis in eqn.params["axes"]}
  kept = tuple(label for i, label in enumerate(ins[0]) if i not in axes)
  return [kept] * len(eqn.outvars)


def _arg(eqn, ins):
  for axis in eqn.params["axes"]:
    pin(ins[0][int(axis)], place(eqn))
  return _reduction(eqn, ins)


def _read(eqn: Any, labels: Labels, axes: set[int]) -> Labels:
  """Binds axes that are read by place, and returns the labels of the result.

  Entry i of the result is not made of entry i alone: along these axes it has a
  dimension of its own, or what lies within the other would seem not to mix.
  """
  shape = eqn.outvars[0].aval.shape
  for axis in axes:
    pin(labels[axis], place(eqn))
  return tuple(
    fixed(shape[i], place(eqn)) if i in axes else label
    for i, label in enumerate(labels)
  )


def _along(key: str) -> Rule:
  """Returns the rule of what reads along the axes that a parameter names."""

  def rule(eqn, ins):
    axes = eqn.params[key]
    axes = (axes,) if isinstance(axes, int) else axes
    return [_read(eqn, ins[0], {int(axis) for axis in axes})]

  return rule


def _sort(eqn, ins):
  # Operands are moved together, by the keys among them.
  labels = elementwise(eqn, ins)[0]
  return [_read(eqn, labels, {eqn.params["dimension"]})] * len(eqn.outvars)


def _top_k(eqn, ins):
  axis = eqn.params.get("axis", -1) % len(ins[0])
  return [_read(eqn, ins[0], {axis})] * len(eqn.outvars)


def _iota(eqn, ins):
  del ins
  shape, axis = eqn.outvars[0].aval.shape, eqn.params["dimension"]
  return [
    tuple(
      fixed(size, place(eqn)) if i == axis else free(size)
      for i, size in enumerate(shape)
    )
  ]


def _transpose(eqn, ins):
  return [tuple(ins[0][int(i)] for i in eqn.params["permutation"])]


def _squeeze(eqn, ins):
  gone = {int(i) for i in eqn.params["dimensions"]}
  return [tuple(label for i, label in enumerate(ins[0]) if i not in gone)]


def _broadcast(eqn, ins):
  size_in, size_out = shapes(eqn)[0], eqn.outvars[0].aval.shape
  found = [free(size) for size in size_out]
  for i, axis in enumerate(eqn.params["broadcast_dimensions"]):
    if size_in[i] == size_out[int(axis)]:
      found[int(axis)] = ins[0][i]
  return [tuple(found)]


def _reshape(eqn, ins):
  sizes = eqn.outvars[0].aval.shape
  try:
    return [tuple(regroup(ins[0], sizes))]
  except MisalignedError:
    reason = pin_all(
      ins[0],
      f"reshape of {shapes(eqn)[0]} to {tuple(sizes)} does not keep it whole",
    )
    return [tuple(fixed(size, reason) for size in sizes)]


def _dot(eqn, ins):
  (xs, ys), (xb, yb) = eqn.params["dimension_numbers"]
  (x, y), (sx, sy) = ins, shapes(eqn)
  reason = "dot_general joins axes that are cut in unlike ways"

  def join(i, j):
    return aligned([x[i], y[j]], [sx[i], sy[j]], sx[i], reason)

  for i, j in zip(xs, ys):
    join(i, j)
  batch = [join(i, j) for i, j in zip(xb, yb)]
  rest = [label for i, label in enumerate(x) if i not in (*xs, *xb)]
  rest += [label for j, label in enumerate(y) if j not in (*ys, *yb)]
  return [(*batch, *rest)]


def _conv(eqn, ins):
  numbers = eqn.params["dimension_numbers"]
  (x, y), (sx, sy) = ins, shapes(eqn)
  lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
  for labels, spec in ((x, lhs), (y, rhs)):
    pin_all([labels[i] for i in spec[2:]], place(eqn))
  reason = "conv_general_dilated joins axes that are cut in unlike ways"
  shape = eqn.outvars[0].aval.shape
  found = [fixed(size, place(eqn)) for size in shape]
  found[out[0]] = x[lhs[0]]
  groups = eqn.params["feature_group_count"]
  given = [(x[lhs[1]], sx[lhs[1]]), (y[rhs[1]], sy[rhs[1]])]
  if eqn.params["batch_group_count"] != 1:
    pin_all([x[lhs[0]], y[rhs[0]], *(label for label, _ in given)], place(eqn))
    found[out[0]] = fixed(shape[out[0]], place(eqn))
  elif groups == 1:
    labels, sizes = zip(*given, strict=True)
    aligned(labels, sizes, sx[lhs[1]], reason)
    found[out[1]] = y[rhs[0]]
  elif groups == sx[lhs[1]] == sy[rhs[0]]:  # one filter a channel
    pair = [(y[rhs[0]], sy[rhs[0]]), given[0]]
    labels, sizes = zip(*pair, strict=True)
    found[out[1]] = aligned(labels, sizes, groups, reason)
  else:
    pin_all([y[rhs[0]], *(label for label, _ in given)], place(eqn))
  return [tuple(found)]


def _where_whole(eqn, labels, whole):
  """Passes the axes that are taken whole, and binds the others."""
  shape, found = eqn.outvars[0].aval.shape, []
  for label, size, is_whole in zip(labels, shape, whole, strict=True):
    if not is_whole:
      pin(label, place(eqn))
    found.append(label if is_whole else fixed(size, place(eqn)))
  return [tuple(found)]


def _chunk(eqn, label, whole, size):
  """Returns the label of one of an axis's chunks of equal sizes.

  The chunks keep their order, but in each the entries may change places alike:
  queries, keys and values, or the gates of a cell, made by one matrix.
  """
  try:
    if size == 0 or whole % size:
      raise MisalignedError
    which, each = regroup([label], (whole // size, size))
  except MisalignedError:
    pin(label, place(eqn))
    return fixed(size, place(eqn))
  pin(which, place(eqn))
  return each


def _slice(eqn, ins):
  starts = eqn.params["start_indices"]
  strides = eqn.params["strides"] or (1,) * len(starts)
  sizes = zip(shapes(eqn)[0], eqn.outvars[0].aval.shape)
  found = []
  for label, (whole, size), start, stride in zip(
    ins[0], sizes, starts, strides, strict=True
  ):
    if whole == size:
      found.append(label)
    elif stride == 1 and size and start % size == 0:
      found.append(_chunk(eqn, label, whole, size))
    else:
      pin(label, place(eqn))
      found.append(fixed(size, place(eqn)))
  return [tuple(found)]


def _dynamic_slice(eqn, ins):
  whole = [a == b for a, b in zip(shapes(eqn)[0], eqn.outvars[0].aval.shape)]
  return _where_whole(eqn, ins[0], whole)


def _update_slice(eqn, ins):
  # A slice as long as its axis starts at 0, wherever it is asked to start.
  full, part = shapes(eqn)[:2]
  found = []
  for x, y, a, b in zip(ins[0], ins[1], full, part, strict=True):
    if a == b:
      found.append(aligned([x, y], [a, b], a, place(eqn)))
    else:
      pin_all([x, y], place(eqn))
      found.append(fixed(a, place(eqn)))
  return [tuple(found)]


def _pad(eqn, ins):
  config = eqn.params["padding_config"]
  return _where_whole(eqn, ins[0], [tuple(c) == (0, 0, 0) for c in config])


def _concatenate(eqn, ins):
  axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
  sizes = shapes(eqn)
  found = []
  for i, size in enumerate(shape):
    own, lengths = [labels[i] for labels in ins], [s[i] for s in sizes]
    if i != axis:
      found.append(aligned(own, lengths, size, place(eqn)))
    elif len(set(lengths)) == 1:
      # Chunks of equal sizes, whose entries may change places alike.
      each = aligned(own, lengths, lengths[0], place(eqn))
      found.append((*fixed(len(ins), place(eqn)), *each))
    else:
      pin_all(own, place(eqn))
      found.append(fixed(size, place(eqn)))
  return [tuple(found)]


def _split(eqn, ins):
  axis, sizes = eqn.params["axis"], eqn.params["sizes"]
  label = ins[0][axis]
  if len(set(sizes)) == 1:
    parts = [_chunk(eqn, label, sum(sizes), sizes[0])] * len(sizes)
  else:
    pin(label, place(eqn))
    parts = [fixed(size, place(eqn)) for size in sizes]
  return [(*ins[0][:axis], part, *ins[0][axis + 1 :]) for part in parts]


def _gather(eqn, ins):
  """Rows picked by number: their other axes, if taken whole, go along."""
  numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  shape = eqn.outvars[0].aval.shape
  pin_all(ins[1], place(eqn))
  found = [fixed(size, place(eqn)) for size in shape]
  gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  kept = [i for i in range(len(ins[0])) if i not in gone]
  offsets = dict(zip(kept, numbers.offset_dims, strict=True))
  for i, label in enumerate(ins[0]):
    whole = sizes[i] == shapes(eqn)[0][i]
    if i in offsets and whole and i not in numbers.start_index_map:
      found[offsets[i]] = label
    else:
      pin(label, place(eqn))
  return [tuple(found)]


def _window(eqn, ins):
  params = eqn.params
  one = [
    window == stride == grown == spread == 1 and tuple(pad) == (0, 0)
    for window, stride, grown, spread, pad in zip(
      params["window_dimensions"],
      params["window_strides"],
      params["base_dilation"],
      params["window_dilation"],
      params["padding"],
      strict=True,
    )
  ]
  return _where_whole(eqn, ins[0], one)


RULES: dict[str, Rule] = {
  **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
  **dict.fromkeys(_SAME.split(), _same),
  **dict.fromkeys(_REDUCTIONS.split(), _reduction),
  **dict.fromkeys(("argmax", "argmin"), _arg),
  **dict.fromkeys(
    ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")
  ),
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "conv_general_dilated": _conv,
  "dot_general": _dot,
  "dynamic_slice": _dynamic_slice,
  "dynamic_update_slice": _update_slice,
  "gather": _gather,
  "iota": _iota,
  "pad": _pad,
  "reduce_window_max": _window,
  "reduce_window_min": _window,
  "reduce_window_sum": _window,
  "reshape": _reshape,
  "rev": _along("dimensions"),
  "slice": _slice,
  "sort": _sort,
  "split": _split,
  "squeeze": _squeeze,
  "top_k": _top_k,
  "transpose": _transpose,
}
"""The rule of each primitive that has one; control flow is in `tracing`."""


def summed_axes(eqn: Any, operand: int) -> tuple[int, ...]:
  """Returns the axes of an operand that a contraction sums over.

  Args:
    eqn: an equation.
    operand: which of its operands.
  """
  if eqn.primitive.name == "dot_general":
    return tuple(eqn.params["dimension_numbers"][0][operand])
  if eqn.primitive.name == "conv_general_dilated":
    numbers = eqn.params["dimension_numbers"]
    return ((numbers.lhs_spec, numbers.rhs_spec)[operand][1],)
  return ()


def met_axes(eqn: Any, operand: int) -> tuple[int, ...]:
  """Returns the axes of an operand that a contraction aligns with others.

  Args:
    eqn: an equation.
    operand: which of its operands.
  """
  batch = ()
  if eqn.primitive.name == "dot_general":
    batch = tuple(eqn.params["dimension_numbers"][1][operand])
  return (*summed_axes(eqn, operand), *batch)
