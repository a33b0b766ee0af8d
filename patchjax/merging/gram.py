"""Combinations whose coefficients depend on lengths and angles alone.

Slerp and its relatives, model stock, Krum, the geometric median: each gives
`sum_i c_i x_i` with coefficients that are functions of the inner products of
the contributors. One read of the leaves gives those, as a Gram matrix, and
one more the sum; on a mesh they are one small all-reduce.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import transform
from patchjax.trees.errors import SelectionError

Array = Any
Scope = Literal["leaf", "tree"]


def combination(
  name: str,
  coefficients: Callable[..., Any],
  *,
  space: str | Callable[..., str] = "params",
  scope: Scope | Callable[..., str] = "leaf",
  with_base: bool = False,
) -> transform.Step:
  """Returns the reducing step `sum_i c_i x_i`, c from the Gram matrix.

  Derivatives go through the Gram matrix too, with respect to contributors
  and to numbers.

  Args:
    name: what the step is registered as; call this once, in a module.
    coefficients: `(gram, state, k, **options)`, k scalars, or one more for
      the base, as a sequence or an array; traceable. `gram` is `float32[k, k]`
      (float64 over a 64-bit leaf), `gram[i, j]` the inner product of
      contributors i and j; `float32[k + 1, k + 1]` with the base's last.
    space: what the contributors are, see `Step.space`; a text, or a function
      of the options.
    scope: whether each leaf is a vector of its own or the tree is one; a
      text, or a function of the options.
    with_base: whether the base is one of the vectors. Of task vectors it is
      zero: that is for the space of parameters.

  Returns:
    The step: `Transform.of(step, numbers, **options)`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> def shares(gram, state, k):
    ...   lengths = jnp.sqrt(jnp.diagonal(gram))
    ...   return 1 / lengths / k
    >>> step = combination("mean_direction", shares)
    >>> a, b = {"w": np.float32([4, 0])}, {"w": np.float32([0, 2])}
    >>> pj.merge(None, [a, b], pj.Transform.of(step, {}))["w"].tolist()
    [0.5, 0.5]
  """

  def scope_of(**options):
    return scope(**options) if callable(scope) else scope

  def space_of(**options):
    return space(**options) if callable(space) else space

  def start(state, shapes, k, **options):
    # The Gram matrix takes its place: there is one pass, and no loop.
    del state, shapes, options
    return np.zeros((k + with_base,) * 2, np.float32)

  def reduce(leaf, deltas, *rest, **options):
    vectors = (*deltas, rest[0]) if with_base else deltas
    found = inner_products(vectors, local=leaf.local)
    # Leaves of any width are added up.
    return found.astype(jnp.float32) if scope_of(**options) == "tree" else found

  def finish(total, carry):
    m = len(carry)
    upper = np.triu_indices(m)
    place = np.zeros((m, m), np.int32)
    place[upper] = place[upper[::-1]] = np.arange(len(upper[0]))
    return jnp.asarray(total)[place], jnp.asarray(True)

  def update(leaf, deltas, base, state, gram, **options):
    del leaf
    vectors = (*deltas, base) if with_base else deltas
    shares = coefficients(gram, state, len(deltas), **options)
    if len(shares) != len(vectors):
      raise SelectionError(
        f"step {name!r}: expected {len(vectors)} coefficients, got "
        f"{len(shares)}"
      )
    return functools.reduce(
      jnp.add,
      (
        transform.rounded(x * jnp.asarray(shares[i]).astype(x.dtype))
        for i, x in enumerate(vectors)
      ),
    )

  # The step is the module's that has the coefficients.
  update.__module__ = coefficients.__module__
  return transform.register_step(
    transform.Step(
      name=name,
      update=update,
      start=start,
      counts=transform.one_count(reduce, finish, once=True),
      reducing=True,
      scope=scope_of,
      space=space_of,
      needs_base=with_base,
    )
  )


def weights_of(
  state: Any, k: int, *, name: str = "weights", normalize: bool = False
) -> Array:
  """Returns the weights of k contributors as one array.

  Args:
    state: the step's numbers; ones where `name` is not among them.
    k: how many contributors there are.
    name: of the number.
    normalize: whether they are divided by their sum.
  """
  given = transform.per_contributor(state.get(name, 1.0), k)
  weights = jnp.stack([jnp.asarray(w).astype(jnp.float32) for w in given])
  return weights / jnp.sum(weights) if normalize else weights


def inner_products(vectors: tuple[Array, ...], *, local: bool) -> Array:
  """Returns the inner products of arrays, the upper triangle by rows.

  Accurate to about 1e-7 of the lengths: float32 products are added pairwise
  or in many partial sums.

  Args:
    vectors: floating point arrays of one shape.
    local: whether they lie on one device (also inside `shard_map`).

  Returns:
    an array of `m (m + 1) / 2` sums.
  """
  m, shape = len(vectors), vectors[0].shape
  if not local or math.prod(shape) < 1 << 16 or m == 1:
    return jnp.stack(
      [jnp.sum(vectors[i] * vectors[j]) for i in range(m) for j in range(i, m)]
    )
  found: dict[tuple[int, int], Array] = {}
  for i in range(m):
    for j in range(i + 1, m):
      parts = _three(vectors[i], vectors[j])
      for key, part in zip(((i, i), (i, j), (j, j)), parts, strict=True):
        found.setdefault(key, part)
  return jnp.stack([found[i, j] for i in range(m) for j in range(i, m)])


def _three(x: Array, y: Array) -> tuple[Array, Array, Array]:
  """Returns `x.x`, `x.y` and `y.y` in one read.

  Several sums of a few rows in one reduction fuse with what computes the
  arrays. Alone, or of more arrays at a time, the compiler on a CPU computes
  them in full first: ten times as long for 16-bit leaves.
  """
  size = math.prod(x.shape)
  rows = next(r for r in (16, 8, 4, 2, 1) if size % r == 0)
  x, y = x.reshape(rows, -1), y.reshape(rows, -1)
  zero = jnp.zeros((), x.dtype)
  sums = lax.reduce(
    (x * x, x * y, y * y),
    (zero,) * 3,
    lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
    (0,),
  )
  one, two, three = (jnp.sum(s) for s in lax.optimization_barrier(sums))
  return one, two, three
