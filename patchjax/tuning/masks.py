"""Sparse patches to train: which entries may change, chosen beforehand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import placement, shares, top_k
from patchjax.patches.codes import Sparse
from patchjax.patches.deltas import Delta
from patchjax.patches.encode import indices_of
from patchjax.patches.patch import Patch, Structure
from patchjax.statistics import fisher as fisher_lib
from patchjax.trees.errors import MismatchError, SelectionError
from patchjax.trees.names import named_leaves

Array = Any


def fish(
  log_prob: Callable[[Any, Any], Array],
  base: Any,
  data: Any,
  *,
  density: float,
  key: Array | None = None,
  only: Any = None,
  labels: fisher_lib.Labels = "sample",
  chunk: int = 8,
) -> Patch:
  """Returns a zero patch on the entries with the largest Fisher information.

  The FISH mask (Sung et al. 2021, https://arxiv.org/abs/2111.09839): train
  only the share of the parameters that the predictions depend on most.

  Args:
    log_prob: `(params, x) -> [..., classes]` for one example, see
      `pj.statistics.fisher_diagonal`.
    base: pytree of arrays: the model to be patched.
    data: examples; a few hundred will do.
    density: share of the numbers in the selected leaves that may change, in
      (0, 1]; over all of them together, not leaf by leaf.
    key: PRNG key, for sampled labels.
    only: selector of the leaves; by default all floating point ones.
    labels: "sample", "exact" or "empirical", as for `fisher_diagonal`.
    chunk: examples whose gradients are held at once.

  Returns:
    A patch of law `add` with float32 zeros at `int(density * n)` places: what
    `pj.trainable` gives of it is to be trained.

  Raises:
    SelectionError: if the density is outside (0, 1] or selects nothing.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((2, 3), np.float32)}
    >>> x = np.float32([[1, 0], [0, 2]])
    >>> patch = pj.tuning.fish(lambda p, x: x @ p["w"], base, x, density=0.5,
    ...                        labels="exact")
    >>> patch.deltas["w"].code.indices.tolist()
    [3, 4, 5]
  """
  shares.check_density(density)
  fisher = fisher_lib.fisher_diagonal(
    log_prob, base, data, key=key, labels=labels, only=only, chunk=chunk
  )
  return mask_patch(base, fisher.values, density=density)


def mask_patch(
  base: Any, scores: Mapping[str, Array], *, density: float
) -> Patch:
  """Returns a zero patch on the entries with the largest scores.

  Args:
    base: pytree of arrays.
    scores: `{text name: array}` for leaves of the base, e.g. the values of a
      `Fisher`; ranked by magnitude. Ties go to the leaf that comes first by
      name, then to the lowest index.
    density: share of the scored numbers that is selected, in (0, 1].

  Raises:
    MismatchError: if scores do not fit the base.
    SelectionError: if the density is outside (0, 1] or selects nothing.
  """
  named = named_leaves(base)
  wrong = [
    f" - {name}: {tuple(scores[name].shape)}"
    for name in scores
    if name not in named
    or tuple(named[name].shape) != tuple(scores[name].shape)
  ]
  if wrong:
    raise MismatchError(
      "scores of leaves that the base does not have, or of another shape:\n"
      + "\n".join(wrong)
    )
  size = sum(math.prod(score.shape) for score in scores.values())
  k = entries_selected(density, size)
  masks = top_k.top_k_masks(scores, k)
  deltas = {}
  for name, mask in masks.items():
    indices = indices_of(np.asarray(mask))
    if len(indices):
      code = Sparse(
        jnp.zeros(len(indices), jnp.float32),
        jnp.asarray(indices),
        tuple(mask.shape),
      )
      deltas[name] = Delta(code, "add")
  return Patch(deltas, Structure.of(named))


def entries_selected(density: float, size: int) -> int:
  """Returns `int(density * size)`, at least 1.

  Args:
    density: in (0, 1].
    size: number of entries to choose from.

  Raises:
    SelectionError: if the density is outside (0, 1] or selects no entry.
  """
  shares.check_density(density)
  k = int(density * size)
  if not k:
    raise SelectionError(
      f"a density of {density} of {size:,} numbers selects none; raise it "
      f"to at least {1 / size if size else 1:.2g}"
    )
  return k


def random_mask(
  base: Any, *, density: float, key: Array, only: Any = None
) -> Patch:
  """Returns a zero patch on entries drawn at random: FISH's control.

  Every entry is given a random rank from the key, the name of its leaf and
  its index; those with the highest are taken. So the same key gives the same
  ranks however leaves are ordered, sharded or joined by others.

  Args:
    base: pytree of arrays.
    density: share of the numbers in the selected leaves, in (0, 1].
    key: PRNG key.
    only: selector of the leaves; by default all floating point ones.

  Returns:
    A patch of exactly the size of `fish`'s with this density and selection.

  Raises:
    SelectionError: if the density is outside (0, 1] or selects nothing.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((4, 5), np.float32)}
    >>> patch = pj.tuning.random_mask(base, density=0.25, key=jax.random.key(0))
    >>> patch.deltas["w"].code.values.shape
    (5,)
  """
  named = named_leaves(base)
  picked = fisher_lib.picked_floats(named, only)
  entries_selected(density, sum(math.prod(named[n].shape) for n in picked))
  ranks = {}
  for name in picked:
    leaf = named[name]
    own = key
    for word in placement.identity_of(name):
      own = jax.random.fold_in(own, word)
    mesh, _ = placement.mesh_axes(leaf)
    sharding = None if mesh is None else leaf.sharding
    ranks[name] = _ranks(tuple(leaf.shape), sharding)(own)
  return mask_patch(base, ranks, density=density)


@functools.lru_cache(maxsize=1024)
def _ranks(shape: tuple[int, ...], sharding: Any) -> Callable[[Array], Array]:
  def draw(key):
    # 30 random bits, read as finite positive floats: their magnitudes are
    # ranked by their bits again.
    bits = jax.random.bits(key, shape, jnp.uint32) >> jnp.uint32(2)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  return jax.jit(draw, out_shardings=sharding)
