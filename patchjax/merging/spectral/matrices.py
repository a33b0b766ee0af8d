"""A leaf as matrices, and what all spectral merges do with them.

Inside, a leaf is `[batch, outputs, inputs]`, as papers write weights; the last
axes of a kernel of flax are inputs and outputs, those of PyTorch's are outputs
and inputs. A whole leaf is decomposed at once: on a mesh the compiler gathers
it, and the result lies where the leaf does. Task vectors of one leaf are
decomposed in one batch, spread over the devices (`spreading`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging.methods import options
from patchjax.merging.spectral import spreading
from patchjax.patches import meshes
from patchjax.patches.truncating import randomized_svd

Array = Any
Layout = Literal["in_out", "out_in"]
Svd = Literal["exact", "gram", "randomized"]
"""How singular vectors are computed; see `svd` and `leading`."""
View = dict[str, Any]


def view(layout: Layout, in_axes: int, batch_axes: int | None) -> View:
  """Returns the options that say which axes of a leaf are what.

  Args:
    layout: whether inputs come before outputs ("in_out", flax) or after them
      ("out_in", PyTorch).
    in_axes: how many axes are inputs.
    batch_axes: how many leading axes only number matrices; None for all but
      the last `in_axes + 1`.

  Raises:
    ValueError: if the layout is unknown, or there are no inputs.

  Example:
    >>> view("in_out", 1, None)
    {'layout': 'in_out', 'in_axes': 1, 'batch_axes': None}
  """
  options.check("layout", layout, ("in_out", "out_in"))
  if in_axes < 1:
    raise ValueError(f"in_axes must be at least 1, got {in_axes}")
  return {"layout": layout, "in_axes": in_axes, "batch_axes": batch_axes}


def sizes(
  shape: tuple[int, ...],
  *,
  layout: Layout,
  in_axes: int,
  batch_axes: int | None,
) -> tuple[int, int, int] | None:
  """Returns how many matrices a leaf is, their outputs and their inputs.

  Args:
    shape: of the leaf.
    layout: see `view`.
    in_axes: see `view`.
    batch_axes: see `view`.

  Returns:
    None for a leaf that is no matrix: it has too few axes, or no entries.

  Example:
    >>> sizes((12, 64, 32), **view("in_out", 1, None)), sizes((3,), **view(
    ...     "in_out", 1, None))
    ((12, 32, 64), None)
  """
  n = len(shape)
  batch = max(n - in_axes - 1, 0) if batch_axes is None else batch_axes
  if n - batch <= in_axes or not math.prod(shape):
    return None
  if layout == "in_out":
    middle = batch + in_axes
    ins, outs = math.prod(shape[batch:middle]), math.prod(shape[middle:])
  else:
    middle = n - in_axes
    outs, ins = math.prod(shape[batch:middle]), math.prod(shape[middle:])
  return math.prod(shape[:batch]), outs, ins


def matrices(x: Array, **axes: Any) -> Array:
  """Returns a leaf as `[batch, outputs, inputs]`.

  Args:
    x: an array that is a matrix by `sizes`.
    **axes: see `view`.
  """
  found = sizes(x.shape, **axes)
  assert found is not None
  batch, outs, ins = found
  if axes["layout"] == "out_in":
    return x.reshape(batch, outs, ins)
  return jnp.swapaxes(x.reshape(batch, ins, outs), 1, 2)


def leaf_like(x: Array, shape: tuple[int, ...], **axes: Any) -> Array:
  """Returns what `matrices` was made of.

  Args:
    x: `[batch, outputs, inputs]`.
    shape: of the leaf.
    **axes: see `view`.
  """
  if axes["layout"] == "in_out":
    x = jnp.swapaxes(x, 1, 2)
  return x.reshape(shape)


def merged(
  function: Callable[..., Array],
  leaf: Any,
  deltas: tuple[Array, ...],
  axes: View,
  *rest: Any,
  others: Literal["mean", "base"] = "mean",
  batched: bool = False,
) -> Array:
  """Returns a leaf merged by a function of its matrices.

  Args:
    function: `(matrices, *rest)`, from a tuple of `[batch, outputs, inputs]`
      to one such array.
    leaf: where the leaf is.
    deltas: task vectors.
    axes: see `view`.
    *rest: further arguments of the function, pytrees of arrays.
    others: what becomes of a leaf that is no matrix: the mean of the task
      vectors, or none of them.
    batched: whether the function takes one array `[k, batch, outputs, inputs]`
      instead of a tuple; on a mesh each device has some of the k.
  """
  if sizes(leaf.shape, **axes) is None:
    if others == "base":
      return jnp.zeros_like(deltas[0])
    total = functools.reduce(jnp.add, deltas)
    return total * jnp.asarray(1 / len(deltas), total.dtype)

  as_matrices = functools.partial(matrices, **axes)

  def whole(deltas, *rest):
    if batched:
      tasks = jax.vmap(as_matrices)(spreading.spread(jnp.stack(deltas), leaf))
    else:
      tasks = tuple(map(as_matrices, deltas))
    found = function(tasks, *rest)
    return leaf_like(found, leaf.shape, **axes)

  return meshes.on_leaf_mesh(whole, deltas[0], deltas, *rest)


# ---------------------------------------------------------------------------
# Linear algebra of `[batch, n, m]`.


def dot(a: Array, b: Array) -> Array:
  """Returns the matrix products, in full precision on accelerators too."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transposed(a: Array) -> Array:
  """Returns the transposed matrices."""
  return jnp.swapaxes(a, -1, -2)


def svd(x: Array, how: Svd = "exact") -> tuple[Array, Array, Array]:
  """Returns the reduced singular value decompositions `u, s, vt`.

  Args:
    x: `[batch, n, m]`.
    how: "gram" goes by the eigenvectors of the smaller Gram matrix, of a
      square one's rows, and a QR decomposition of what they are mapped to.
      Values below `sqrt(min(n, m) * eps)` of the largest, and their vectors,
      are mixed with each other. All others are the device's own.
  """
  if how != "gram":
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt
  if x.shape[-2] > x.shape[-1]:
    return _by_gram(x)
  v, s, ut = _by_gram(transposed(x))
  return transposed(ut), s, transposed(v)


def _by_gram(x: Array) -> tuple[Array, Array, Array]:
  _, basis = jnp.linalg.eigh(dot(transposed(x), x))
  basis = basis[..., ::-1]
  u, r = jnp.linalg.qr(dot(x, basis))
  s = jnp.diagonal(r, axis1=-2, axis2=-1)
  signs = jnp.where(s < jnp.zeros_like(s), -jnp.ones_like(s), jnp.ones_like(s))
  return u * signs[..., None, :], jnp.abs(s), transposed(basis)


def floor_of(s: Array, shape: tuple[int, ...]) -> Array:
  """Returns what singular values of zero may become by rounding.

  Args:
    s: `[batch, r]` singular values, the largest first.
    shape: the two sides of the decomposed matrices.
  """
  share = max(shape) * float(np.finfo(s.dtype).eps)
  return s[..., :1] * jnp.asarray(share, s.dtype)


def key_of(seed: int, identity: Array) -> Array:
  """Returns a PRNG key of a leaf.

  Args:
    seed: of the method.
    identity: of the leaf, see `placement.Leaf`.
  """
  key = jax.random.key(seed)
  for i in range(2):
    key = jax.random.fold_in(key, identity[i])
  return key


def leading(
  x: Array, rank: int, how: Svd, key: Array
) -> tuple[Array, Array, Array]:
  """Returns the largest singular triplets.

  Args:
    x: `[..., n, m]`.
    rank: how many, at most `min(n, m)`.
    how: see `svd`; "randomized" is `randomized_svd`.
    key: of the random test matrices.
  """
  if how == "randomized" and rank:
    flat = x.reshape(-1, *x.shape[-2:])
    found = jax.vmap(lambda one: randomized_svd(one, rank, key))(flat)
    u, s, vt = (y.reshape(*x.shape[:-2], *y.shape[1:]) for y in found)
    return u, s, vt
  u, s, vt = svd(x, how)
  return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def supported(
  u: Array, s: Array, vt: Array, shape: tuple[int, ...]
) -> tuple[Array, Array, Array]:
  """Returns triplets with zeros for those that are rounding errors alone.

  The singular vectors of a singular value of zero are any orthonormal ones.

  Args:
    u: `[batch, n, r]`.
    s: `[batch, r]`.
    vt: `[batch, r, m]`.
    shape: see `floor_of`.
  """
  there = s > floor_of(s, shape)
  zero = jnp.zeros((), s.dtype)
  return (
    jnp.where(there[..., None, :], u, zero),
    jnp.where(there, s, zero),
    jnp.where(there[..., :, None], vt, zero),
  )


def polar(x: Array, how: Svd = "exact") -> Array:
  """Returns the nearest matrices with orthonormal columns (or rows).

  `u @ vt` of the decomposition `u s vt`, the solution of the Procrustes
  problem. Where columns depend on each other there are many; it is that of
  least length then, with no part in directions that `x` does not have. Its
  derivative, unlike that of the decomposition, needs no distinct values.

  Args:
    x: `[batch, n, m]`.
    how: "randomized" goes by the eigenvectors of the smaller Gram matrix, and
      leaves directions of nearly dependent columns out, of which there are
      some where tasks fill a space; all others by the exact decomposition.
  """
  if how != "randomized":
    return polar_and_norm(x, False)[0]
  tall = x.shape[-2] >= x.shape[-1]
  gram = dot(transposed(x), x) if tall else dot(x, transposed(x))
  values, basis = jnp.linalg.eigh(gram)
  least = values[..., -1:] * jnp.asarray(
    gram.shape[-1] * np.finfo(x.dtype).eps, x.dtype
  )
  safe = jnp.where(values > least, values, jnp.ones_like(values))
  roots = jnp.where(values > least, jax.lax.rsqrt(safe), jnp.zeros_like(safe))
  inverse = dot(basis * roots[..., None, :], transposed(basis))
  return dot(x, inverse) if tall else dot(inverse, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def polar_and_norm(x: Array, complete: bool) -> tuple[Array, Array]:
  """Returns `polar(x)` and the sum of the singular values, `[batch]`.

  Args:
    x: `[batch, n, m]`.
    complete: whether directions that `x` does not have are filled up.
  """
  u, s, vt = _parts(x, complete)
  return dot(u, vt), jnp.sum(s, -1)


def _parts(x, complete):
  u, s, vt = svd(x)
  return (u, s, vt) if complete else supported(u, s, vt, x.shape[-2:])


@polar_and_norm.defjvp
def _polar_jvp(complete, primals, tangents):
  (x,), (dx,) = primals, tangents
  u, s, vt = _parts(x, complete)
  v = transposed(vt)
  inner = dot(dot(transposed(u), dx), v)
  turn = (inner - transposed(inner)) * _inverse(s[..., None, :] + s[..., None])
  moved = dot(dot(u, turn), vt)
  inverse = _inverse(s)
  # What moves out of the directions of the longer side.
  if x.shape[-2] >= x.shape[-1]:
    along = dot(dx, v) - dot(u, inner)
    moved = moved + dot(along * inverse[..., None, :], vt)
  else:
    along = dot(transposed(u), dx) - dot(inner, vt)
    moved = moved + dot(u, along * inverse[..., None])
  found = dot(u, vt)
  norm = jnp.sum(found * dx, (-2, -1))
  return (found, jnp.sum(s, -1)), (moved, norm)


def _inverse(x):
  none = x == jnp.zeros_like(x)
  return jnp.where(none, x, 1 / jnp.where(none, jnp.ones_like(x), x))
