"""KnOTS and SVC: what is done before and after another merge.

Both are a bracket around the steps of any other method: the opening step holds
something of the task vectors, and the closing one is given it.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp

from patchjax.merging.methods import options
from patchjax.merging.methods.averages import task_arithmetic
from patchjax.merging.methods.signs import ties
from patchjax.merging.spectral import matrices as mats
from patchjax.merging.spectral.matrices import Layout
from patchjax.patches import meshes, transform
from patchjax.patches.transform import Transform, chain


def knots(
  *,
  method: Transform | None = None,
  threshold: Any = 1e-5,
  rank: int | None = None,
  svd: Literal["exact", "gram"] = "exact",
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns KnOTS: merge in the output directions that all tasks share.

  Stoica et al. 2025 (https://arxiv.org/abs/2410.19735, section 4). The task
  vectors, outputs by inputs, are put side by side and decomposed,
  `[d_1, ..., d_k] = U [S V_1^T, ..., S V_k^T]`. The parts `S V_i^T` are merged
  by another method, which gives M; then `base + U M`. One model, or any
  method that is linear, comes back as it was.

  As in the authors' code (gstoica27/KnOTS, `SVDMerger`), where the method is
  TIES or DARE and TIES, with one threshold over all leaves. There leaves with
  fewer than two axes are left at the base; here they are merged by the method
  as they are: leave them out by `only`. The aligned parts, k leaves of each,
  are kept while the method counts; from files (`merge_files`) each leaf is
  decomposed once a pass instead. For LoRA patches `knots_of_patches` is exact
  and far cheaper.

  Args:
    method: how the parts are merged, a transform with a reducing step; by
      default `ties()`. `dare_ties`, `task_arithmetic`, or a chain.
    threshold: of the singular values that are kept; traced.
    rank: how many directions a leaf has at most, if that is known: of LoRA
      patches the sum of their ranks. Static. Of the directions there are
      only those count that a leaf of its shape can have, so a density needs
      to know it for task vectors of low rank.
    svd: "exact"; "gram": by the eigenvectors of a Gram matrix, many times
      faster; directions below `sqrt(min(n, m) * eps)` of the largest are
      turned into each other.
    layout: which axes of a leaf are outputs: "in_out" of a kernel of flax,
      "out_in" in PyTorch. Swapped, tasks are aligned by inputs.
    in_axes: see `tsv_m`.
    batch_axes: see `tsv_m`.

  Raises:
    ValueError: if the method works on parameters, or reduces nothing.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a = {"w": np.zeros((2, 3))}, {"w": np.arange(6.).reshape(2, 3)}
    >>> base, a = ({"w": np.float32(x["w"])} for x in (base, a))
    >>> one = pj.merging.task_arithmetic()
    >>> merged = pj.merge(base, [a], pj.merging.knots(method=one))["w"]
    >>> bool(np.allclose(merged, a["w"], atol=1e-5))
    True
  """
  options.check("svd", svd, ("exact", "gram"))
  if rank is not None and rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}")
  inner = ties() if method is None else method
  check_inner("knots", inner)
  axes = mats.view(layout, in_axes, batch_axes)
  opened = Transform.of(
    _ALIGN, {"threshold": threshold}, rank=rank, svd=svd, **axes
  )
  return chain(opened, inner, Transform.of(_UNALIGN, {}, **axes))


def check_inner(name: str, method: Transform) -> None:
  """Raises ValueError unless a method merges task vectors.

  Args:
    name: of the method that is made of it.
    method: the inner method.
  """
  if not method.reducing:
    raise ValueError(
      f"{name}: the inner method has no reducing step: {method}; end it with "
      "mean(), weighted_sum() or disjoint_mean()"
    )
  if method.space == "params":
    raise ValueError(
      f"{name}: the inner method must work on task vectors, not on "
      f"parameters: {method}"
    )


def _align(leaf, deltas, base, state, shared, *, rank, svd, **axes):
  del base, shared
  if mats.sizes(leaf.shape, **axes) is None:
    return deltas, ()

  def directions(deltas, threshold):
    x = jnp.concatenate([mats.matrices(d, **axes) for d in deltas], -1)
    u, s, _ = mats.svd(x, svd)
    u, s = u[..., :rank], s[..., :rank]
    least = jnp.maximum(
      mats.floor_of(s, x.shape[-2:]), jnp.asarray(threshold).astype(s.dtype)
    )
    return jnp.where((s > least)[..., None, :], u, jnp.zeros_like(u))

  def part(delta, u):
    x = mats.dot(mats.transposed(u), mats.matrices(delta, **axes))
    more = u.shape[-2] - u.shape[-1]
    # As many rows as the leaf has outputs, so that it is cut over devices as
    # the leaf is: what is not there is zero.
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
    return mats.leaf_like(x, leaf.shape, **axes)

  u = meshes.number_on_mesh(directions, deltas, state["threshold"])
  return tuple(meshes.on_leaf_mesh(part, d, d, u) for d in deltas), u


def _counted(shapes, k, *, rank, svd, **axes):
  """Of a leaf with more outputs than directions not all counts."""
  del svd
  found = []
  for shape in shapes:
    size = mats.sizes(shape, **axes)
    if size is not None:
      batch, outs, ins = size
      most = outs if rank is None else min(outs, rank)
      shape = (batch, min(most, k * ins), ins)
    found.append(shape)
  return found


_ALIGN = transform.register_step(
  transform.Step(
    name="align", update=_align, bracket="opens", counted=_counted, dear=True
  )
)


def _unalign(leaf, deltas, base, state, shared, held, **axes):
  del base, state, shared
  if mats.sizes(leaf.shape, **axes) is None:
    return deltas

  def whole(delta, u):
    parts = mats.matrices(delta, **axes)[:, : u.shape[-1]]
    return mats.leaf_like(mats.dot(u, parts), leaf.shape, **axes)

  return tuple(meshes.on_leaf_mesh(whole, d, d, held) for d in deltas)


_UNALIGN = transform.register_step(
  transform.Step(name="unalign", update=_unalign, bracket="closes")
)


def svc(
  *,
  method: Transform | None = None,
  alpha: Any = 0.1,
  formula: Literal["code", "paper"] = "code",
  svd: Literal["exact", "gram"] = "exact",
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns SVC: another merge, its over-counted directions scaled down.

  Li et al. 2026 (https://arxiv.org/abs/2602.05536, algorithm 1). Of what a
  method makes of the task vectors, `U S V^T`, each singular value is divided
  by how much more of each task there is along `u_r` than the task has:
  `s_ri = <a_r, a_ri> / |a_ri|^2` with `a_r = u_r^T merged` and
  `a_ri = u_r^T d_i`. Leaves with fewer than two axes stay as the method
  merged them. Derivatives in the contributors are NaN where the merge has
  equal singular values, zeros among them.

  Args:
    method: the merge that is calibrated, a transform with a reducing step;
      by default `task_arithmetic(scale=0.3)`, as in the authors' code.
    alpha: the least that a singular value is divided by; traced,
      differentiable. The code's default is 0.1, that of the paper's text one
      over the number of tasks; from 1 on no value grows.
    formula: "code" (lyymuwu/SVC): a value is divided by
      `max(mean_i s_ri, alpha)` if all `s_ri` are positive, or else kept.
      "paper", and FusionBench's code: by `mean_i max(s_ri, alpha)`.
    svd: "exact"; "gram": by the eigenvectors of a Gram matrix, several times
      faster; values below `sqrt(min(n, m) * eps)` of the largest are mixed.
    layout: which axes of a leaf are outputs: "in_out" of a kernel of flax,
      "out_in" in PyTorch.
    in_axes: see `tsv_m`.
    batch_axes: see `tsv_m`.

  Raises:
    ValueError: if the method works on parameters, or reduces nothing.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a = ({"w": np.diag(np.float32(x))} for x in ([0, 0], [3, 1]))
    >>> merged = pj.merge(base, [a, a], pj.merging.svc())["w"]
    >>> np.round(merged, 4).tolist()
    [[3.0, 0.0], [0.0, 1.0]]
  """
  options.check("formula", formula, ("code", "paper"))
  options.check("svd", svd, ("exact", "gram"))
  inner = task_arithmetic(scale=0.3) if method is None else method
  check_inner("svc", inner)
  axes = mats.view(layout, in_axes, batch_axes)
  closing = Transform.of(
    _CALIBRATE, {"alpha": alpha}, formula=formula, svd=svd, **axes
  )
  return chain(Transform.of(_HOLD, {}), inner, closing)


def _hold(leaf, deltas, base, state, shared):
  del leaf, base, state, shared
  return deltas, deltas


_HOLD = transform.register_step(
  transform.Step(
    name="hold", update=_hold, bracket="opens", carries_nonfinite=True
  )
)


def _calibrate(
  leaf, deltas, base, state, shared, held, *, formula, svd, **axes
):
  del base, shared
  if mats.sizes(leaf.shape, **axes) is None:
    return deltas

  def whole(merged, tasks, alpha):
    x = mats.matrices(merged, **axes)
    u, s, vt = mats.svd(x, svd)
    rows = mats.dot(mats.transposed(u), x)  # s * vt, but for rounding
    alpha = jnp.asarray(alpha).astype(s.dtype)
    least = jnp.asarray(1e-12, s.dtype)
    shares = []
    for task in tasks:
      own = mats.dot(mats.transposed(u), mats.matrices(task, **axes))
      length = jnp.maximum(jnp.sum(own * own, -1), least)
      shares.append(jnp.sum(rows * own, -1) / length)
    if formula == "paper":
      factors = _mean([jnp.maximum(x, alpha) for x in shares])
    else:
      positive = functools.reduce(
        jnp.logical_and, (x > jnp.zeros_like(x) for x in shares)
      )
      factors = jnp.maximum(_mean(shares), alpha)
      factors = jnp.where(positive, factors, jnp.ones_like(factors))
    calibrated = x + mats.dot(u * (s / factors - s)[..., None, :], vt)
    return mats.leaf_like(calibrated, leaf.shape, **axes)

  (merged,) = deltas
  return (meshes.on_leaf_mesh(whole, merged, merged, held, state["alpha"]),)


def _mean(terms):
  total = functools.reduce(jnp.add, terms)
  return total * jnp.asarray(1 / len(terms), total.dtype)


_CALIBRATE = transform.register_step(
  transform.Step(name="calibrate", update=_calibrate, bracket="closes")
)
