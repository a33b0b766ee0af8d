"""truncate: the nearest low-rank matrix, by randomized or exact SVD."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import transform
from patchjax.patches.codes import LowRank
from patchjax.patches.quantizing import gathered

Array = Any

_OVERSAMPLING = 8
_POWER_STEPS = 2


def truncate(
  *,
  rank: int | None = None,
  share: float | None = None,
  in_axes: int = 1,
  batch_axes: int = 0,
  method: Literal["randomized", "exact"] = "randomized",
  seed: int = 0,
) -> transform.Transform:
  """Returns the transform that keeps a delta's largest singular directions.

  LoRA extraction; with a share, TSV-C (Gargiulo et al. 2025,
  https://arxiv.org/abs/2412.00081, section 3.2), whose share is one over the
  number of tasks. Leaves without input and output axes, and those whose
  factors would not be smaller, stay as they are.

  Args:
    rank: how many directions are kept.
    share: in its place, how many of all directions of a matrix, rounded down
      but at least one.
    in_axes: how many axes of a leaf (after batch axes) are inputs.
    batch_axes: how many leading axes only number layers; each has its own
      factors.
    method: "randomized": Halko et al. 2011 (https://arxiv.org/abs/0909.4061)
      with two power steps and Cholesky QR, matrix products only: within half
      a percent of the smallest error where the spectrum decays slowly, and
      tens of times faster than "exact", the singular value decomposition.
    seed: of the random test matrix; folded with the leaf's name.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> w = np.outer(np.arange(8), np.arange(9)).astype(np.float32)
    >>> patch = pj.diff({"w": 0 * w}, {"w": w})
    >>> code = pj.compress(patch, pj.truncate(rank=1)).deltas["w"].code
    >>> bool(np.allclose(code.dense(), w, atol=1e-4)), code.a.shape
    (True, (8, 1))
  """
  if (rank is None) == (share is None):
    raise ValueError("give a rank or a share: truncate(rank=8)")
  if rank is not None and rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}")
  if share is not None and not 0 < share <= 1:
    raise ValueError(f"share must be in (0, 1], got {share}")
  if method not in ("randomized", "exact"):
    raise ValueError(f"method must be 'randomized' or 'exact', got {method!r}")
  return transform.Transform.of(
    _TRUNCATE,
    {},
    rank=rank,
    **({} if share is None else {"share": share}),
    in_axes=in_axes,
    batch_axes=batch_axes,
    method=method,
    seed=seed,
  )


def _update(
  leaf,
  deltas,
  base,
  state,
  shared,
  *,
  rank,
  in_axes,
  batch_axes,
  method,
  seed,
  share=None,
):
  del base, state, shared
  shape = leaf.shape
  inputs = shape[batch_axes : batch_axes + in_axes]
  outputs = shape[batch_axes + in_axes :]
  n, m = math.prod(inputs), math.prod(outputs)
  if rank is None:
    assert share is not None  # one of the two is given
    rank = max(int(min(n, m) * share), 1)
  if not inputs or not outputs or rank * (n + m) >= n * m or not leaf.size:
    return deltas
  key = jax.random.key(seed)
  for word in (leaf.identity[0], leaf.identity[1]):
    key = jax.random.fold_in(key, word)
  codes = []
  for delta in deltas:
    batch = shape[:batch_axes]
    matrices = gathered(delta).reshape(-1, n, m)
    if method == "exact":
      a, b = jax.vmap(lambda x: _exact(x, rank))(matrices)
    else:
      a, b = jax.vmap(lambda x: randomized(x, rank, key))(matrices)
    codes.append(
      LowRank(
        a.reshape(*batch, *inputs, rank),
        b.reshape(*batch, rank, *outputs),
        jnp.ones((), a.dtype),
        batch_axes,
      )
    )
  return tuple(codes)


_TRUNCATE = transform.register_step(
  transform.Step(name="truncate", update=_update)
)


def _exact(x: Array, rank: int) -> tuple[Array, Array]:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return _balanced(u[:, :rank], s[:rank], vt[:rank])


def randomized(x: Array, rank: int, key: Array) -> tuple[Array, Array]:
  """Returns factors `a[n, rank]`, `b[rank, m]` with `a @ b` near a matrix.

  Args:
    x: `[n, m]`.
    rank: at most `min(n, m)`.
    key: of the random test matrix.
  """
  return _balanced(*randomized_svd(x, rank, key))


def randomized_svd(
  x: Array, rank: int, key: Array
) -> tuple[Array, Array, Array]:
  """Returns nearly the largest singular triplets of a matrix, `u, s, vt`.

  Halko et al. 2011 (https://arxiv.org/abs/0909.4061) with two power steps and
  Cholesky QR.

  Args:
    x: `[n, m]`.
    rank: how many, at most `min(n, m)`.
    key: of the random test matrix.
  """
  n, m = x.shape
  width = min(rank + _OVERSAMPLING, n, m)
  q = _orthonormal(_dot(x, jax.random.normal(key, (m, width), x.dtype)))
  for _ in range(_POWER_STEPS):
    q = _orthonormal(_dot(x, _orthonormal(_dot(x.T, q))))
  rows = _dot(x.T, q)  # x is near q @ rows.T
  basis = _orthonormal(rows)
  u, s, vt = jnp.linalg.svd(_dot(rows.T, basis), full_matrices=False)
  return _dot(q, u[:, :rank]), s[:rank], _dot(vt[:rank], basis.T)


def _balanced(u: Array, s: Array, vt: Array) -> tuple[Array, Array]:
  root = jnp.sqrt(s)
  return u * root[None, :], root[:, None] * vt


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _orthonormal(y: Array) -> Array:
  """Returns an orthonormal basis of the columns: Cholesky QR, twice.

  The small shift keeps the factorisation alive for columns that depend on
  each other; those come out short, and carry nothing.
  """
  for _ in range(2):
    gram = _dot(y.T, y)
    info = np.finfo(y.dtype)
    shift = jnp.trace(gram) * jnp.asarray(4 * info.eps, y.dtype)
    shift = shift + jnp.asarray(info.tiny, y.dtype)
    eye = jnp.eye(y.shape[1], dtype=y.dtype)
    root = jnp.linalg.cholesky(gram + shift * eye)
    y = jax.scipy.linalg.solve_triangular(root, y.T, lower=True).T
  return y
