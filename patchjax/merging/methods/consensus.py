"""Methods of many tasks: one merged vector, and a mask for each task.

`consensus_ta`, `emr` and `pcb` are methods. The masks that recover a single
task from the merged vector are functions: `tall_masks`, `emr_masks`,
`emr_rescalers`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging import inputs, running
from patchjax.merging.competing import compete
from patchjax.merging.conflict import sums
from patchjax.merging.methods import options
from patchjax.merging.steps import scale as scaled
from patchjax.patches import transform
from patchjax.patches.transform import Transform, chain
from patchjax.trees.names import flatten


def consensus_ta(
  *, threshold: Any = 0.4, agreement: Any = 2, scale: Any = 1.0
) -> Transform:
  """Returns Consensus TA: task arithmetic of entries that tasks agree to need.

  Wang et al. 2024 (https://arxiv.org/abs/2405.07813, equations 4 and 5):
  `base + scale * sum_i d_i` in those entries that at least `agreement` of the
  masks of `tall_masks` hold; the base in the others.

  Args:
    threshold: lambda of the masks, one a contributor or one for all; 0.2 to
      0.6 in the paper, searched for each task; traced; no derivative.
    agreement: how many tasks must need an entry; traced.
    scale: alpha; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [2, 0.5]))
    >>> pj.merge(base, [a, b], pj.merging.consensus_ta())["w"].tolist()
    [3.0, 0.0]
  """
  numbers = {"threshold": options.numbers(threshold), "agreement": agreement}
  return chain(Transform.of(_CONSENSUS, numbers), scaled(scale))


def tall_masks(
  base: Any, contributors: Sequence[Any], *, threshold: Any = 0.4
) -> list[Any]:
  """Returns for each contributor the mask of the entries that it needs.

  TALL masks (Wang et al. 2024, https://arxiv.org/abs/2405.07813, equation 4):
  `|d_i| > threshold |sum_j d_j - d_i|`, so that `base + mask_i * sum_j d_j` is
  close to contributor i.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    threshold: lambda, one a contributor or one for all.

  Returns:
    for each contributor a tree like the base, of boolean arrays; False in
    leaves that are not floating point.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [2, 0.5]))
    >>> first, second = pj.merging.tall_masks(base, [a, b])
    >>> first["w"].tolist(), second["w"].tolist()
    ([True, True], [True, False])
  """
  numbers = {"threshold": options.numbers(threshold)}
  return _masks(base, contributors, Transform.of(_NEEDED, numbers))


def emr(*, scale: Any = 1.0) -> Transform:
  """Returns EMR's unified model: elected signs, largest magnitudes.

  Huang et al. 2024 (https://arxiv.org/abs/2405.17461, section 3.2): `base +
  scale * s max_i |d_i|` over those d_i whose sign s is that of their sum (a
  sum of zero counts as negative). The model of task i is `base +
  rescaler_i * mask_i * unified`, with `emr_masks` and `emr_rescalers`.

  Args:
    scale: a number; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [-3, 1]))
    >>> pj.merge(base, [a, b], pj.merging.emr())["w"].tolist()
    [-3.0, 2.0]
  """
  return chain(Transform.of(_UNIFIED, {}), scaled(scale))


def emr_masks(base: Any, contributors: Sequence[Any]) -> list[Any]:
  """Returns for each contributor the mask of entries of the elected sign.

  Huang et al. 2024 (https://arxiv.org/abs/2405.17461); see `emr`.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.

  Returns:
    for each contributor a tree like the base, of boolean arrays; False in
    leaves that are not floating point.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [-3, 1]))
    >>> [mask["w"].tolist() for mask in pj.merging.emr_masks(base, [a, b])]
    [[False, True], [True, True]]
  """
  return _masks(base, contributors, Transform.of(_AGREEING, {}))


def emr_rescalers(base: Any, contributors: Sequence[Any]) -> jax.Array:
  """Returns for each contributor the number that makes up for the masking.

  Huang et al. 2024 (https://arxiv.org/abs/2405.17461), as in the paper's
  code: the sum over leaves of `mean |d_i|` over that of `mean |mask_i *
  unified|`; see `emr`.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.

  Returns:
    `float32[k]`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [-3, 1]))
    >>> pj.merging.emr_rescalers(base, [a, b]).tolist()
    [1.5, 0.800000011920929]
  """
  _, results = _run(base, contributors, Transform.of(_MEANS, {}))
  total = functools.reduce(jnp.add, (jnp.stack(x) for x in results.values()))
  before, after = jnp.split(total, 2)
  # A contributor without any change needs no number.
  some = after > jnp.float32(0)
  return jnp.where(some, before / jnp.where(some, after, 1.0), 1.0)


def pcb(
  *,
  density: Any = 0.1,
  scale: Any = 1.0,
  scope: Literal["tree", "leaf"] = "tree",
) -> Transform:
  """Returns PCB merging: entries are averaged by how well they compete.

  Du et al. 2024 (https://arxiv.org/abs/2410.02396, section 3), with n, the
  entries of the whole model, in the paper's code: |d_i| is clamped to its
  middle 99.98 % and u_i is that moved and scaled to [0, 1]; an entry's score
  is `exp(k u_i^2) tanh(d_i sum_j d_j)`; scores up to the
  `floor(n (1 - density))`-th in order count as that one, and are moved and
  scaled to [0, 1]; by them the clamped task vectors are averaged.

  Args:
    density: share of the entries of a contributor that have a weight (the
      paper's r), one a contributor or one for all; traced; no derivative.
    scale: lambda; traced, differentiable.
    scope: whether shares are of the model or of each leaf.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros(10, np.float32)}
    >>> tuned = {"w": np.arange(10, dtype=np.float32)}
    >>> method = pj.merging.pcb(density=0.3)
    >>> pj.merge(base, [tuned], method)["w"].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 8.0]
  """
  density = options.numbers(density)
  return chain(compete(density=density, scope=scope), scaled(scale))


def _run(base, contributors, method):
  """The structure of the base, and for each leaf what the method returns."""
  named, treedef = flatten(base)
  sources = inputs.sources_of(named, contributors, same=True)
  floats = inputs.floats_of(named, None)
  results = running.run_leaves(floats, sources, method, None, as_params=False)
  return (named, treedef), results


def _masks(base, contributors, method):
  (named, treedef), results = _run(base, contributors, method)
  trees = []
  for i in range(len(contributors)):
    leaves = [
      results[name][i] if name in results else np.zeros(np.shape(leaf), bool)
      for name, leaf in named.items()
    ]
    trees.append(jax.tree.unflatten(treedef, leaves))
  return trees


def _need(deltas, state):
  joint = functools.reduce(jnp.add, deltas)
  ratios = transform.per_contributor(state["threshold"], len(deltas))
  return joint, tuple(
    jnp.abs(d)
    > transform.rounded(jnp.abs(joint - d) * jnp.asarray(r).astype(d.dtype))
    for d, r in zip(deltas, ratios, strict=True)
  )


def _needed(leaf, deltas, base, state, shared):
  del leaf, base, shared
  return _need(deltas, state)[1]


_NEEDED = transform.register_step(
  transform.Step(name="tall_masks", update=_needed)
)


def _consensus(leaf, deltas, base, state, shared):
  del leaf, base, shared
  joint, needed = _need(deltas, state)
  votes = functools.reduce(jnp.add, (m.astype(joint.dtype) for m in needed))
  enough = votes >= jnp.asarray(state["agreement"]).astype(joint.dtype)
  return jnp.where(enough, joint, jnp.zeros_like(joint))


_CONSENSUS = transform.register_step(
  transform.Step(name="consensus", update=_consensus, reducing=True)
)


def _elect(deltas):
  """Whether an entry is positive, and who is of that sign."""
  balance = functools.reduce(jnp.add, deltas)
  nought = jnp.zeros_like(balance)
  up = balance > nought
  return up, tuple(jnp.where(up, d > nought, d < nought) for d in deltas)


def _unite(deltas):
  up, agreeing = _elect(deltas)
  sizes = (
    jnp.where(mask, jnp.abs(d), jnp.zeros_like(d))
    for d, mask in zip(deltas, agreeing)
  )
  largest = functools.reduce(jnp.maximum, sizes)
  return jnp.where(up, largest, -largest), agreeing


def _unified(leaf, deltas, base, state, shared):
  del leaf, base, state, shared
  return _unite(deltas)[0]


_UNIFIED = transform.register_step(
  transform.Step(name="unify", update=_unified, reducing=True)
)


def _agreeing(leaf, deltas, base, state, shared):
  del leaf, base, state, shared
  return _elect(deltas)[1]


_AGREEING = transform.register_step(
  transform.Step(name="agreeing_masks", update=_agreeing)
)


def _means_start(state, shapes, k):
  del state, shapes
  return np.zeros(2 * k, np.float32)


def _means_reduce(leaf, deltas, state, carry):
  del state, carry
  unified, agreeing = _unite(deltas)
  nought = jnp.zeros_like(unified)
  terms = [jnp.abs(d) for d in deltas]
  terms += [jnp.where(m, jnp.abs(unified), nought) for m in agreeing]
  total = sums.totals(terms, local=leaf.local).astype(jnp.float32)
  return total * jnp.float32(1 / max(math.prod(leaf.shape), 1))


def _means_finish(total, carry):
  del carry
  return total, jnp.asarray(True)


def _means(leaf, deltas, base, state, total):
  del leaf, deltas, base, state
  return tuple(total)


_MEANS = transform.register_step(
  transform.Step(
    name="mean_magnitudes",
    update=_means,
    start=_means_start,
    counts=transform.one_count(_means_reduce, _means_finish),
    scope=lambda: "leaf",
  )
)
