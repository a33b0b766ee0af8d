"""The one equation that Fisher merging, RegMean and MaTS solve.

Each contributor i has a curvature `C_i`, a symmetric positive semi-definite
operator on a leaf, and the merged leaf minimizes `sum_i |x - x_i|^2_{C_i}`:

    sum_i C_i x = sum_i C_i x_i.

A diagonal Fisher information gives Fisher merging, a Gram matrix of inputs
RegMean, Kronecker factors MaTS (Tam et al. 2024,
https://arxiv.org/abs/2312.04339, section 3). No C_i is ever formed: all that
is asked of it is a product with a leaf. All solvers here look for the distance
from a start x_0, `sum_i C_i (x - x_0) = sum_i C_i (x_i - x_0)`, whose right
side is small where the models are close; what no C_i sees stays at x_0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import transform
from patchjax.patches.perleaf import PerLeaf
from patchjax.statistics import Fisher, Gram, LinearLayer
from patchjax.statistics.kinds import arrays_of
from patchjax.trees.errors import SelectionError, StructureError
from patchjax.trees.suggest import list_names

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Curvature:
  """A symmetric operator on one leaf: diagonal, or `x -> left x right`.

  Attributes:
    diagonal: of the leaf's shape, or None.
    left: `[batch, inputs, inputs]`, or None where it is diagonal.
    right: `[batch, outputs, outputs]`, or None for the identity.
    layer: what the leaf's axes are to `left` and `right`; static.
  """

  diagonal: Array | None = None
  left: Array | None = None
  right: Array | None = None
  layer: LinearLayer | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  def __repr__(self) -> str:
    shapes = {
      name: tuple(np.shape(x))
      for name in ("diagonal", "left", "right")
      if (x := getattr(self, name)) is not None
    }
    return f"Curvature({', '.join(f'{k}={v}' for k, v in shapes.items())})"

  def astype(self, dtype: Any) -> Curvature:
    """Returns the curvature in the dtype of the leaf's deltas."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), self)

  def damped(self, share: Array) -> Curvature:
    """Returns it with all entries off the diagonals of factors scaled.

    Args:
      share: what they are multiplied with.
    """

    def scaled(x):
      if x is None:
        return None
      eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=bool), x.shape)
      return jnp.where(eye, x, x * share)

    return dataclasses.replace(
      self, left=scaled(self.left), right=scaled(self.right)
    )

  def weighted(self, weight: Array) -> Curvature:
    """Returns it times a number.

    Args:
      weight: the number.
    """
    if self.diagonal is not None:
      return dataclasses.replace(self, diagonal=self.diagonal * weight)
    return dataclasses.replace(self, left=self.left * weight)

  def times(self, x: Array) -> Array:
    """Returns the product with an array of the leaf's shape."""
    if self.diagonal is not None:
      return self.diagonal * x
    assert self.layer is not None
    y = dot(self.left, self.layer.matrices(x))
    if self.right is not None:
      y = dot(y, self.right)
    return self.layer.leaf(y, tuple(x.shape))


def dot(a: Array, b: Array) -> Array:
  """Returns the product of matrices, in full precision on every device.

  Args:
    a: `[..., n, k]`.
    b: `[..., k, m]`.
  """
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def of_statistics(statistics: Sequence[Any]) -> PerLeaf:
  """Returns the curvatures of each leaf, one a contributor.

  Args:
    statistics: one a contributor: all `Fisher`, all `Gram` or all `KFac`.

  Returns:
    `{text name: (C_1, ..., C_k)}`; leaves of which there is no statistic have
    None.

  Raises:
    StructureError: if they are not of one kind, leaves and layers.
    TypeError: if one is no statistic.
  """
  if not statistics:
    raise StructureError("expected one statistic a contributor, got none")
  kinds = {type(one) for one in statistics}
  for one in statistics:
    arrays_of(one)
  if len(kinds) > 1:
    raise StructureError(
      "statistics of contributors must be of one kind, got "
      + ", ".join(sorted(kind.__name__ for kind in kinds))
    )
  tables = list(map(_curvatures, statistics))
  names = tables[0].keys()
  for i, table in enumerate(tables):
    if odd := names ^ table.keys():
      raise StructureError(
        f"the statistics of contributors 0 and {i} are not of the same "
        f"leaves; only one has {', '.join(sorted(odd))}"
      )
    if odd := [n for n in names if table[n].layer != tables[0][n].layer]:
      raise StructureError(
        f"contributors 0 and {i} have other layers in {', '.join(odd)}"
      )
  return PerLeaf(
    {name: tuple(table[name] for table in tables) for name in names},
    optional=True,
  )


def check_fit(numbers: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
  """Refuses statistics of other leaves than those that are merged.

  Names that differ by a prefix would make a plain mean of every leaf, and a
  diagonal of another shape may broadcast.

  Args:
    numbers: of a step; "curvatures", and "init" if there is one.
    shapes: `{name: ShapeDtypeStruct}` of the leaves that are merged.

  Raises:
    SelectionError: if no leaf has a statistic, or none has a start.
    StructureError: if one is not of its leaf's shape.
  """
  for key, what in (("curvatures", "statistics are"), ("init", "init is")):
    given = numbers.get(key)
    if given is None or not shapes:
      continue
    both = [name for name in shapes if name in given.values]
    if not both:
      raise SelectionError(
        f"the {what} of {list_names(given.values)}, and what is merged is "
        f"{list_names(shapes)}; no name is the same. Name the leaves alike, "
        "or leave those without out of this merge"
      )
    for name in both:
      shape = tuple(shapes[name].shape)
      for part, found, expected in _parts(given.values[name], shape):
        if tuple(np.shape(found)) != expected:
          raise StructureError(
            f"{name}: its {part} is of shape {tuple(np.shape(found))}, "
            f"expected {expected} for a leaf of shape {shape}"
          )


def _parts(given: Any, shape: tuple[int, ...]) -> Iterator[tuple]:
  """Yields `(what, array, expected shape)` of what is given for a leaf."""
  if not isinstance(given, tuple):
    yield "init", given, shape
    return
  for one in given:
    if one.diagonal is not None:
      yield "diagonal", one.diagonal, shape
      continue
    batch, inputs, outputs = one.layer.sizes(shape)
    yield "matrix of inputs", one.left, (batch, inputs, inputs)
    if one.right is not None:
      yield "matrix of outputs", one.right, (batch, outputs, outputs)


def _curvatures(statistic: Any) -> dict[str, Curvature]:
  if isinstance(statistic, Fisher):
    return {n: Curvature(diagonal=x) for n, x in statistic.values.items()}
  layers = dict(statistic.layers)
  if isinstance(statistic, Gram):
    return {
      name: Curvature(left=x, layer=layers[name])
      for name, x in statistic.values.items()
    }
  return {
    name: Curvature(None, x, statistic.outputs[name], layers[name])
    for name, x in statistic.inputs.items()
  }


def weighted_mean(values: Sequence[Array], weights: Sequence[Any]) -> Array:
  """Returns the weighted mean of arrays.

  Args:
    values: arrays of one shape.
    weights: a number each.
  """
  cast = [jnp.asarray(w).astype(values[0].dtype) for w in weights]
  mass = functools.reduce(jnp.add, cast)
  terms = (
    transform.rounded(x * (w / mass)) for x, w in zip(values, cast, strict=True)
  )
  return functools.reduce(jnp.add, terms)


def residual(
  curvatures: Sequence[Curvature], values: Sequence[Array], start: Array
) -> Array:
  """Returns `sum_i C_i (x_i - start)`.

  Args:
    curvatures: C.
    values: x, arrays of the leaf's shape.
    start: x_0.
  """
  terms = (c.times(x - start) for c, x in zip(curvatures, values, strict=True))
  return functools.reduce(jnp.add, terms)


def by_gradients(
  curvatures: Sequence[Curvature],
  values: Sequence[Array],
  start: Array,
  *,
  iterations: Any,
  tolerance: Any,
) -> Array:
  """Solves `sum_i C_i x = sum_i C_i x_i` by conjugate gradients.

  Args:
    curvatures: C.
    values: x_i, arrays of the leaf's shape.
    start: where the search begins, and stays in directions of no curvature.
    iterations: how many steps at most.
    tolerance: it ends where the residual is this share of the right side.
  """
  # Squares of residuals of a Fisher information would leave float32.
  zero = jnp.zeros_like(start)
  largest = jnp.max(jnp.abs(residual(curvatures, values, zero)))
  unit = jnp.where(largest > 0 * largest, largest, jnp.ones_like(largest))
  curvatures = [c.weighted(1 / unit) for c in curvatures]
  right = residual(curvatures, values, zero)
  size = jnp.sqrt(jnp.sum(jnp.square(right)))
  operators = curvatures
  if all(c.right is None for c in curvatures):
    # Their sum is one of them: a single product a step.
    operators = [
      jax.tree.map(lambda *xs: functools.reduce(jnp.add, xs), *curvatures)
    ]

  tolerance = jnp.asarray(tolerance).astype(size.dtype)
  first = residual(curvatures, values, start)
  return start + _conjugate(
    iterations, operators, first, tolerance * size, tolerance
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _conjugate(iterations, operators, right, least, tolerance):
  """Returns x with `sum C x = right`, but for a residual of length `least`."""
  del tolerance
  found, _ = jax.scipy.sparse.linalg.cg(
    functools.partial(_product, operators),
    right,
    tol=0.0,
    atol=least,
    maxiter=iterations,
  )
  return found


@_conjugate.defjvp
def _conjugate_jvp(iterations, given, moved):
  # The derivative is another solution: `least` is no length of its right side,
  # which may be that of any loss.
  operators, right, least, tolerance = given
  found = _conjugate(iterations, operators, right, least, tolerance)
  change = jax.jvp(lambda c: _product(c, found), (operators,), (moved[0],))[1]

  def solve(operator, right):
    largest = jnp.max(jnp.abs(right))
    unit = jnp.where(largest > 0 * largest, largest, jnp.ones_like(largest))
    found, _ = jax.scipy.sparse.linalg.cg(
      operator, right / unit, tol=tolerance, maxiter=iterations
    )
    return found * unit

  return found, jax.lax.custom_linear_solve(
    functools.partial(_product, operators),
    moved[1] - change,
    solve,
    symmetric=True,
  )


def _product(operators, x):
  return functools.reduce(jnp.add, (c.times(x) for c in operators))


def by_inputs(
  curvatures: Sequence[Curvature], values: Sequence[Array], start: Array
) -> Array:
  """Solves `sum_i G_i x = sum_i G_i x_i`, G matrices on the inputs.

  The sum is scaled to a unit diagonal and factored by Cholesky, with one step
  of refinement. Where it is singular or nearly so (inputs that are always 0,
  fewer rows than inputs) it is taken apart into eigenvectors, and the
  directions that no contributor's data has stay at the start.

  Args:
    curvatures: G, with `left` and nothing else.
    values: x_i, arrays of the leaf's shape.
    start: x_0.
  """
  layer = curvatures[0].layer
  assert layer is not None
  grams: list[Any] = [c.left for c in curvatures]
  total = functools.reduce(jnp.add, grams)
  right = layer.matrices(residual(curvatures, values, start))
  n = total.shape[-1]
  diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
  none = jnp.zeros_like(diagonal)
  live = diagonal > none
  root = jnp.where(
    live, jax.lax.rsqrt(jnp.where(live, diagonal, none + 1)), none
  )
  # Inputs that are always 0: rows and columns of the identity.
  eye = jnp.broadcast_to(jnp.eye(n, dtype=bool), total.shape)
  unit = total * root[:, :, None] * root[:, None, :]
  unit = jnp.where(eye, jnp.ones_like(unit), unit)
  right = right * root[:, :, None]
  factor = jnp.linalg.cholesky(unit)
  pivots = jnp.diagonal(factor, axis1=-2, axis2=-1)
  eps = float(np.finfo(total.dtype).eps)
  least = jnp.asarray(4 * n * eps, total.dtype)
  sound = jnp.all(jnp.square(pivots) > least)  # no NaN is

  def solved(b):
    b = jax.lax.linalg.triangular_solve(factor, b, left_side=True, lower=True)
    return jax.lax.linalg.triangular_solve(
      factor, b, left_side=True, lower=True, transpose_a=True
    )

  def by_factor():
    x = solved(right)
    x = x + solved(right - dot(unit, x))
    return x * root[:, :, None]

  def by_eigenvectors():
    sizes, vectors = jnp.linalg.eigh(unit)
    # What rounding makes of a size of 0 is up to 5 eps of the largest; the
    # bound of pivots, which grow with n, would take what data has for it.
    noise = jnp.asarray(16 * eps, total.dtype)
    seen = sizes > noise * jnp.max(sizes, axis=-1, keepdims=True)
    share = jnp.where(seen, 1 / jnp.where(seen, sizes, none + 1), none)
    along = dot(_turned(vectors), right)
    found = dot(vectors, along * share[:, :, None]) * root[:, :, None]
    # The scale has tilted the directions of no data: those are taken out.
    unseen = jnp.where(seen[:, None, :], none[:, None, :], vectors)
    unseen = unseen * root[:, :, None]
    inner = dot(_turned(unseen), unseen)
    inner = inner + jnp.where(eye, seen[:, None, :].astype(inner.dtype), 0.0)
    weight = jnp.linalg.solve(inner, dot(_turned(unseen), found))
    return found - dot(unseen, weight)

  found = jax.lax.cond(sound, by_factor, by_eigenvectors)
  return start + layer.leaf(found, tuple(start.shape))


def _turned(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)
