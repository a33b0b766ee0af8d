"""Where a function multiplies inputs with parameters: found in its jaxpr.

Parameters are followed through casts, transpositions, reshapes and calls to
the `dot_general`s that they end in. Of an array on this way it is known which
of the leaf's axes, or parts of them, each of its dimensions is made of
(`Origin`): so a kernel that was reshaped from `[in, heads * size]` to
`[in, heads, size]` is still known for one with a single axis of inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from patchjax.statistics.layers import LinearLayer

Array = Any
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True, order=True)
class Part:
  """A part of an axis of a leaf: indices `stride * i`, for i below `size`."""

  axis: int
  # Negated, so that parts sort in the order of the leaf: slowest first.
  minus_stride: int
  size: int


@dataclasses.dataclass(frozen=True)
class Origin:
  """Which leaf an array is, and how its dimensions are made of its axes.

  Attributes:
    leaf: text name.
    dims: of each dimension, its parts, slowest first.
    axes: how many axes the leaf has.
    scanned: of each scan around, outermost first, the parts of the leaf that
      it steps along; () where every step sees the same.
  """

  leaf: str
  dims: tuple[tuple[Part, ...], ...]
  axes: int
  scanned: tuple[tuple[Part, ...], ...] = ()

  @classmethod
  def of(cls, leaf: str, shape: Sequence[int]) -> Origin:
    """Returns the origin of a leaf itself.

    Args:
      leaf: text name.
      shape: of the leaf.
    """
    dims = tuple((Part(i, -1, n),) for i, n in enumerate(shape))
    return cls(leaf, dims, len(dims))


@dataclasses.dataclass(frozen=True)
class Use:
  """A product of a parameter and an input.

  Attributes:
    path: of its equation: indices of the equations around it, outermost
      first, and its own.
    leaf: text name.
    layer: what the leaf's axes are.
    side: which operand is the parameter, 0 or 1.
    numbers: the dimension numbers of the product.
    inputs: parts of the leaf in the order of the contracted dimensions.
    outputs: parts in the order of the other dimensions of the parameter.
    batch: parts in the order of the scans along the leaf, and then of the
      batch dimensions.
    scans: of each scan around, outermost first, whether it is along the leaf.
    ndim: how many dimensions the parameter has in the product.
  """

  path: Path
  leaf: str
  layer: LinearLayer
  side: int
  numbers: Any
  inputs: tuple[Part, ...]
  outputs: tuple[Part, ...]
  batch: tuple[Part, ...]
  scans: tuple[bool, ...]
  ndim: int

  @property
  def key(self) -> str:
    """A name that tells it from other uses."""
    return ".".join(map(str, self.path))

  def rows_in(self, x: Array) -> Array:
    """Returns the inputs as `[batch, rows, inputs]`, in the leaf's order.

    Args:
      x: the other operand; axes of scans around in front.
    """
    contracted, batch = (pair[1 - self.side] for pair in self.numbers)
    return self._rows(x, tuple(batch), tuple(contracted), self.inputs)

  def rows_out(self, y: Array) -> Array:
    """Returns outputs as `[batch, rows, outputs]`, in the leaf's order.

    Args:
      y: of the shape of the product; axes of scans around in front.
    """
    contracted, batch = (pair[self.side] for pair in self.numbers)
    # A product has the batch first, then what is left of either operand.
    many, own = len(batch), self.ndim - len(contracted) - len(batch)
    first = y.ndim - len(self.scans) - own if self.side == 1 else many
    return self._rows(
      y, tuple(range(many)), tuple(range(first, first + own)), self.outputs
    )

  def _rows(self, x, batch, columns, parts):
    depth = len(self.scans)
    along = [i for i, is_along in enumerate(self.scans) if is_along]
    apart = [i for i, is_along in enumerate(self.scans) if not is_along]
    batch, columns = ([depth + d for d in dims] for dims in (batch, columns))
    rest = [d for d in range(depth, x.ndim) if d not in {*batch, *columns}]
    x = x.transpose((*along, *batch, *apart, *rest, *columns))
    sizes = [part.size for part in self.batch]
    ends = [part.size for part in parts]
    x = x.reshape((*sizes, -1, *ends))
    first, last = _order(self.batch), _order(parts)
    after = len(sizes) + 1
    x = x.transpose((*first, len(sizes), *(after + i for i in last)))
    return x.reshape((math.prod(sizes), -1, math.prod(ends)))


def _order(parts: Sequence[Part]) -> list[int]:
  return sorted(range(len(parts)), key=parts.__getitem__)


@dataclasses.dataclass
class Found:
  """What a walk over a jaxpr found.

  Attributes:
    uses: products with parameters, in order.
    others: leaves that are used in some other way.
  """

  uses: list[Use] = dataclasses.field(default_factory=list)
  others: set[str] = dataclasses.field(default_factory=set)


def walk(
  jaxpr: core.Jaxpr,
  origins: Sequence[Origin | None],
  found: Found,
  path: Path = (),
) -> list[Origin | None]:
  """Follows parameters through a jaxpr.

  Args:
    jaxpr: of a function of parameters and inputs.
    origins: of its arguments; None for what is no parameter.
    found: what is found is added to it.
    path: of the jaxpr.

  Returns:
    origins of the results.
  """
  known = {
    var: origin
    for var, origin in zip(jaxpr.invars, origins, strict=True)
    if origin is not None
  }

  def origin_of(var):
    return None if isinstance(var, core.Literal) else known.get(var)

  for i, eqn in enumerate(jaxpr.eqns):
    given = list(map(origin_of, eqn.invars))
    if any(given):
      outs = _step(eqn, given, found, (*path, i))
      for var, origin in zip(eqn.outvars, outs, strict=True):
        if origin is not None:
          known[var] = origin
  return list(map(origin_of, jaxpr.outvars))


def _step(eqn, given, found, path):
  """Returns the origins of an equation's results, and notes what it does."""
  name = eqn.primitive.name
  none = [None] * len(eqn.outvars)
  if name == "dot_general" and sum(o is not None for o in given) == 1:
    use = _use(eqn, given, path)
    if use is not None:
      found.uses.append(use)
      return none
  elif name in _MOVES:
    moved = _MOVES[name](given[0], eqn)
    if moved is not None:
      return [moved]
  elif (inner := called(eqn)) is not None:
    return walk(inner.jaxpr, given, found, path)
  elif name == "scan":
    return _through_scan(eqn, given, found, path)
  found.others.update(origin.leaf for origin in given if origin is not None)
  return none


# Calls whose equations can stand where the call does: they only say how to
# compile, to differentiate, or to name what they hold.
_CALLS = frozenset(
  "jit pjit call closed_call core_call remat remat2 checkpoint "
  "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr".split()
)


def called(eqn: Any) -> core.ClosedJaxpr | None:
  """Returns the function that an equation calls with just its arguments.

  Args:
    eqn: an equation.
  """
  if eqn.primitive.name not in _CALLS:
    return None
  for value in eqn.params.values():
    if isinstance(value, core.Jaxpr):
      value = core.ClosedJaxpr(value, ())
    if isinstance(value, core.ClosedJaxpr) and len(value.jaxpr.invars) == len(
      eqn.invars
    ):
      return value
  return None


def _through_scan(eqn, given, found, path):
  consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
  inside: list[Origin | None] = []
  for i, origin in enumerate(given):
    if origin is None:
      inside.append(None)
    elif i < consts:
      scanned = (*origin.scanned, ())
      inside.append(dataclasses.replace(origin, scanned=scanned))
    elif i < consts + carry:
      found.others.add(origin.leaf)
      inside.append(None)
    else:
      along, *dims = origin.dims
      scanned = (*origin.scanned, along)
      inside.append(
        dataclasses.replace(origin, dims=tuple(dims), scanned=scanned)
      )
  outs = walk(eqn.params["jaxpr"].jaxpr, inside, found, path)
  found.others.update(origin.leaf for origin in outs if origin is not None)
  return [None] * len(eqn.outvars)


def _use(eqn, given, path) -> Use | None:
  """Returns a product as a use of a leaf; None if that is no matrix."""
  side = int(given[0] is None)
  origin = given[side]
  numbers = eqn.params["dimension_numbers"]
  contracted, batch = (pair[side] for pair in numbers)
  rest = [d for d in range(len(origin.dims)) if d not in {*contracted, *batch}]

  def parts(dims):
    return tuple(part for d in dims for part in origin.dims[d])

  scanned = tuple(part for along in origin.scanned for part in along)
  kinds = (parts(contracted), parts(rest), (*scanned, *parts(batch)))
  axes = [sorted({part.axis for part in kind}) for kind in kinds]
  seen = {axis for kind in axes for axis in kind}
  if len(seen) < sum(map(len, axes)):
    return None  # an axis of which one part is an input, and one is not
  # Axes of length 1 may have got lost on the way: they are either.
  axes[1] = sorted({*axes[1], *range(origin.axes)} - {*axes[0], *axes[2]})
  return Use(
    path=path,
    leaf=origin.leaf,
    layer=LinearLayer(*map(tuple, axes)),
    side=side,
    numbers=numbers,
    inputs=kinds[0],
    outputs=kinds[1],
    batch=kinds[2],
    scans=tuple(map(bool, origin.scanned)),
    ndim=len(origin.dims),
  )


# ---------------------------------------------------------------------------
# What only moves entries.


def _same(origin, eqn):
  return origin if len(eqn.outvars) == 1 else None


def _cast(origin, eqn):
  floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
  return origin if floating else None


def _transpose(origin, eqn):
  dims = tuple(origin.dims[d] for d in eqn.params["permutation"])
  return dataclasses.replace(origin, dims=dims)


def _squeeze(origin, eqn):
  gone = eqn.params["dimensions"]
  dims = tuple(d for i, d in enumerate(origin.dims) if i not in gone)
  return dataclasses.replace(origin, dims=dims)


def _widen(origin, eqn):
  """Only new dimensions of size 1 are followed."""
  shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
  if math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
    return None
  dims: list[tuple[Part, ...]] = [()] * len(shape)
  for dim, place in zip(origin.dims, places, strict=True):
    dims[place] = dim
  return dataclasses.replace(origin, dims=tuple(dims))


def _reshape(origin, eqn):
  if eqn.params.get("dimensions") is not None:
    return None
  left = [part for dim in origin.dims for part in dim if part.size != 1]
  dims = []
  for size in eqn.outvars[0].aval.shape:
    dim = []
    while size != 1:
      if not left:
        return None
      part = left.pop(0)
      if size % part.size == 0:
        dim.append(part)
        size //= part.size
      elif part.size % size == 0 and size:
        inner = part.size // size
        dim.append(Part(part.axis, part.minus_stride * inner, size))
        left.insert(0, Part(part.axis, part.minus_stride, inner))
        size = 1
      else:
        return None
    dims.append(tuple(dim))
  return dataclasses.replace(origin, dims=tuple(dims))


_MOVES: dict[str, Callable[..., Origin | None]] = {
  "convert_element_type": _cast,
  "transpose": _transpose,
  "reshape": _reshape,
  "squeeze": _squeeze,
  "broadcast_in_dim": _widen,
  **dict.fromkeys(
    (
      "copy",
      "copy_p",
      "device_put",
      "mesh_cast",
      "pvary",
      "reduce_precision",
      "reshard",
      "sharding_constraint",
    ),
    _same,
  ),
}
