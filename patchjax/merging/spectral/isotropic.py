"""Iso-C and Iso-CTS: one singular value for all directions."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from patchjax.merging import steps
from patchjax.merging.spectral import matrices as mats
from patchjax.merging.spectral import spreading
from patchjax.merging.spectral.matrices import Layout
from patchjax.patches import transform
from patchjax.patches.transform import Transform, chain


def iso_c(
  *,
  scale: Any = 1.0,
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns Iso-C: the sum of the task vectors, its spectrum made flat.

  Marczak et al. 2025 (https://arxiv.org/abs/2502.04959, algorithm 1): of the
  decomposition `U S V^T` of `sum_i (x_i - base)` all singular values are
  replaced by their mean: `base + scale * mean(S) U V^T`. Leaves with fewer
  than two axes get the mean of the task vectors, as in the authors' code
  (danielm1405/iso-merging). If the sum has not full rank, directions that no
  task has get the mean singular value too, as there, and which they are is up
  to the decomposition.

  Args:
    scale: the paper's alpha, about 1 to 2; traced, differentiable.
    layout: see `tsv_m`.
    in_axes: see `tsv_m`.
    batch_axes: see `tsv_m`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> a, b = ({"w": np.diag(np.float32(x))} for x in ([3, 0], [0, 1]))
    >>> np.round(pj.merge(base, [a, b], pj.merging.iso_c())["w"], 4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
  """
  step = Transform.of(_ISO_C, {}, **mats.view(layout, in_axes, batch_axes))
  return chain(step, steps.scale(scale))


def _flat(tasks):
  total = functools.reduce(jnp.add, tasks)
  directions, norm = mats.polar_and_norm(total, True)
  count = jnp.asarray(min(total.shape[-2:]), norm.dtype)
  return directions * (norm / count)[..., None, None]


def _iso_c(leaf, deltas, base, state, shared, **axes):
  del base, state, shared
  return mats.merged(_flat, leaf, deltas, axes)


_ISO_C = transform.register_step(
  transform.Step(name="isotropic", update=_iso_c, reducing=True)
)


def iso_cts(
  *,
  common: float = 0.8,
  scale: Any = 1.0,
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns Iso-CTS: a common and task-specific subspaces, a flat spectrum.

  Marczak et al. 2025 (https://arxiv.org/abs/2502.04959, algorithm 2). The
  first singular triplets of the sum of the task vectors are the common
  subspace; each task adds the first triplets of what it has outside of the
  common output directions, as many from each. All left and all right vectors
  are replaced by the nearest orthonormal ones, all values by their mean.

  Orthogonal tasks: if each has in the common subspace all of its directions
  but as many as it may add, every task's singular vectors are recovered
  exactly, and with a flat spectrum the tasks themselves.

  As in the authors' code (danielm1405/iso-merging): of r directions (the
  smaller side) `int(common * r)` are common, and then as many more or fewer
  as make the rest a multiple of the number of tasks. Leaves with fewer than
  two axes get the mean. Directions that no task has: see `iso_c`. Derivatives
  in the contributors are NaN where singular values are equal.

  Args:
    common: share of the directions that is common; the paper's k / r. Static:
      it sets shapes.
    scale: the paper's alpha, about 1 to 2; traced, differentiable.
    layout: which axes of a leaf are outputs: "in_out" of a kernel of flax,
      "out_in" in PyTorch. Swapped, input directions are meant.
    in_axes: see `tsv_m`.
    batch_axes: see `tsv_m`.

  Raises:
    ValueError: if `common` is not in [0, 1].

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> a, b = ({"w": np.diag(np.float32(x))} for x in ([3, 0], [0, 1]))
    >>> np.round(pj.merge(base, [a, b], pj.merging.iso_cts())["w"], 4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
  """
  if not 0 <= common <= 1:
    raise ValueError(f"common must be in [0, 1], got {common}")
  axes = mats.view(layout, in_axes, batch_axes)
  return chain(
    Transform.of(_ISO_CTS, {}, common=common, **axes), steps.scale(scale)
  )


def _iso_cts(leaf, deltas, base, state, shared, *, common, **axes):
  del base, state, shared
  k = len(deltas)

  def function(tasks):
    most = min(tasks.shape[-2:])
    each = min(round((most - int(most * common)) / k), most // k)
    u, s, vt = mats.svd(spreading.gathered(jnp.sum(tasks, 0), leaf))
    first = most - each * k
    u, s, vt = u[..., :first], s[..., :first], vt[..., :first, :]
    a, b, c = mats.svd(tasks - mats.dot(u, mats.dot(mats.transposed(u), tasks)))
    own = a[..., :each], b[..., :each], c[..., :each, :]
    own = spreading.side_by_side(own, leaf)
    left, values, right = (
      jnp.concatenate(pair, axis)
      for pair, axis in zip(zip((u, s, vt), own), (-1, -1, -2), strict=True)
    )
    size = jnp.mean(values, -1)[..., None, None]
    return mats.dot(mats.polar(left) * size, mats.polar(right))

  return mats.merged(function, leaf, deltas, axes, batched=True)


_ISO_CTS = transform.register_step(
  transform.Step(
    name="isotropic_with_task_directions", update=_iso_cts, reducing=True
  )
)
