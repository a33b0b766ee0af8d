"""TSV-M and STAR: the leading singular vectors of each task vector."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from patchjax.merging import steps
from patchjax.merging.methods import options
from patchjax.merging.spectral import matrices as mats
from patchjax.merging.spectral import spreading
from patchjax.merging.spectral.matrices import Layout, Svd
from patchjax.patches import shares, transform
from patchjax.patches.transform import Transform, chain


def tsv_m(
  *,
  share: float | None = None,
  scale: Any = 1.0,
  svd: Svd = "exact",
  seed: int = 0,
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns TSV-M: each task's leading singular vectors, made orthogonal.

  Gargiulo et al. 2025 (https://arxiv.org/abs/2412.00081, algorithm 1). Of
  each contributor's matrix the first `int(share * r)` singular triplets are
  kept, r its smaller side; the left vectors of all are put side by side and
  replaced by the nearest orthonormal ones (Procrustes), the right ones too:
  `base + scale * U_orth S V_orth^T`. Tasks with orthogonal inputs and outputs
  are recovered exactly. Leaves with fewer than two axes get the mean.

  As in the authors' code (AntoAndGar/task_singular_vectors), where a matrix
  with fewer rows or columns than there are contributors keeps no triplet, and
  so stays at the base. There the triplets of singular values of zero, whose
  vectors are arbitrary, disturb those of the other tasks, and where vectors of
  tasks depend on each other (tasks of one LoRA factor) the nearest orthonormal
  ones are arbitrary too; here both are left out, and equal tasks are one task.
  The code gives kernels of convolutions the mean, and CLIP's
  `text_projection`; here they are as many matrices as `batch_axes` says: a
  mapping of selectors to methods keeps leaves from it.

  Derivatives in the contributors are NaN where a task has equal singular
  values, zeros among them.

  Args:
    share: of the triplets that is kept; by default one over the number of
      contributors. Static: it sets shapes.
    scale: the paper's alpha; traced, differentiable.
    svd: "exact"; "gram": triplets by eigenvectors of Gram matrices: those
      below `sqrt(r * eps)` of the largest (.5 % of r = 200) are mixed with
      each other; "randomized": by `randomized_svd`, matrix products in the
      main, for large leaves: within a percent where spectra decay and tasks
      do not fill the space.
    seed: of the random test matrices; folded with the leaf's name.
    layout: which axes of a leaf are outputs; does not matter here but for
      leaves of more than two axes.
    in_axes: how many axes of a leaf are inputs.
    batch_axes: how many leading axes only number matrices; by default all but
      the last `in_axes + 1`.

  Raises:
    ValueError: if the share is not in (0, 1], or an option is unknown.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> a, b = ({"w": np.diag(np.float32(x))} for x in ([3, 0], [0, 2]))
    >>> np.round(pj.merge(base, [a, b], pj.merging.tsv_m())["w"], 4).tolist()
    [[3.0, 0.0], [0.0, 2.0]]
  """
  options.check("svd", svd, ("exact", "gram", "randomized"))
  if share is not None and not 0 < share <= 1:
    raise ValueError(f"share must be in (0, 1], got {share}")
  step = Transform.of(
    _TSV,
    {},
    share=share,
    svd=svd,
    seed=seed,
    **mats.view(layout, in_axes, batch_axes),
  )
  return chain(step, steps.scale(scale))


def _tsv(leaf, deltas, base, state, shared, *, share, svd, seed, **axes):
  del base, state, shared

  def function(tasks, identity):
    outs, ins = tasks.shape[-2:]
    most = min(outs, ins)
    rank = most // len(tasks) if share is None else int(most * share)
    if not rank:
      return jnp.zeros_like(tasks[0])
    key = mats.key_of(seed, identity)
    found = mats.leading(tasks, rank, svd, key)
    found = mats.supported(*found, (outs, ins))
    u, s, vt = spreading.side_by_side(found, leaf)
    u, vt = mats.polar(u, svd), mats.polar(vt, svd)
    return mats.dot(u * s[..., None, :], vt)

  return mats.merged(function, leaf, deltas, axes, leaf.identity, batched=True)


_TSV = transform.register_step(
  transform.Step(name="task_singular_vectors", update=_tsv, reducing=True)
)


def star(
  *,
  eta: Any = 40.0,
  scale: Any = 1.0,
  rank: int | None = None,
  svd: Svd = "exact",
  seed: int = 0,
  layout: Layout = "in_out",
  in_axes: int = 1,
  batch_axes: int | None = None,
) -> Transform:
  """Returns STAR: truncate each task's spectrum, rescale it, average.

  Lee et al. 2025 (https://arxiv.org/abs/2502.10339, section 4). Of each
  contributor's matrix the fewest leading singular triplets are kept whose
  values sum to eta percent of all (of the nuclear norm), and scaled up to that
  norm: `base + scale * mean_i star(x_i - base)`, as in the authors' code
  (IBM/STAR). Leaves with fewer than two axes get the mean.

  Args:
    eta: percent of the nuclear norm; traced, one a contributor or one for
      all; has no derivative.
    scale: of the mean; traced, differentiable; 1 in the paper.
    rank: of the task vectors, if it is known (LoRA's): only so many triplets
      are looked at. Static.
    svd: "exact"; "gram" or "randomized" (which needs a rank), see `tsv_m`.
    seed: of the random test matrices; folded with the leaf's name.
    layout: see `tsv_m`.
    in_axes: see `tsv_m`.
    batch_axes: see `tsv_m`.

  Raises:
    ValueError: if an option is unknown or a rank is missing.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a = ({"w": np.diag(np.float32(x))} for x in ([0, 0], [3, 1]))
    >>> np.round(pj.merge(base, [a], pj.merging.star())["w"], 4).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
  """
  options.check("svd", svd, ("exact", "gram", "randomized"))
  if svd == "randomized" and rank is None:
    raise ValueError("svd='randomized' needs a rank: star(rank=...)")
  step = Transform.of(
    _STAR,
    {"eta": options.numbers(eta)},
    rank=rank,
    svd=svd,
    seed=seed,
    **mats.view(layout, in_axes, batch_axes),
  )
  return chain(step, steps.mean(), steps.scale(scale))


def _star(leaf, deltas, base, state, shared, *, rank, svd, seed, **axes):
  del base, shared
  etas = transform.per_contributor(state["eta"], len(deltas))
  if mats.sizes(leaf.shape, **axes) is None:
    return deltas

  def function(tasks, eta, identity):
    (x,) = tasks
    most = min(x.shape[-2:])
    key = mats.key_of(seed, identity)
    kept = most if rank is None else min(rank, most)
    u, s, vt = mats.leading(x, kept, svd, key)
    total = jnp.sum(s, -1, keepdims=True)
    share = shares.selecting(jnp.asarray(eta).astype(s.dtype))
    before = jnp.cumsum(s, -1) - s
    mask = before < total * share / jnp.asarray(100, s.dtype)
    mask = mask.at[..., 0].set(True)
    left = jnp.where(mask, s, jnp.zeros_like(s))
    rest = jnp.sum(left, -1, keepdims=True)
    gain = total / jnp.where(rest > jnp.zeros_like(rest), rest, 1.0)
    return mats.dot(u * (left * gain)[..., None, :], vt)

  return tuple(
    mats.merged(function, leaf, (d,), axes, eta, leaf.identity)
    for d, eta in zip(deltas, etas, strict=True)
  )


_STAR = transform.register_step(
  transform.Step(name="truncate_and_rescale", update=_star)
)
