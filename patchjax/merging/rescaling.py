"""keep_l1: sparsify, and scale every leaf back to its L1 norm.

mergekit's `rescale`: one number a leaf and contributor, where DARE and DELLA
divide by probabilities.
"""

from __future__ import annotations

import jax.numpy as jnp

from patchjax.merging import following
from patchjax.patches import transform


def keep_l1(selection: transform.Transform) -> transform.Transform:
  """Returns the step that sparsifies and keeps the L1 norm of every leaf.

  `s d'` with d' what the selection makes of d and `s = |d|_1 / |d'|_1`; left
  alone where either norm is below 1e-7. mergekit 0.1.5
  (https://github.com/arcee-ai/mergekit) does so for `rescale: true`.

  Args:
    selection: a single step that counts over leaves or not at all:
      `drop(..., rescale=False)`, `trim(..., scope="leaf")`.

  Raises:
    ValueError: if it is a chain, or counts over the tree.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0, 0, 0], [1, 2, -3]))
    >>> half = pj.trim(density=0.4, scope="leaf")
    >>> step = pj.merging.keep_l1(half)
    >>> pj.merge(base, [tuned], step)["w"].tolist()
    [0.0, 0.0, -6.0]
  """
  of = following.spec_of(selection)
  (numbers,) = selection.numbers
  return transform.Transform.of(_KEEP_L1, numbers, of=of)


def _norms(deltas, kept):
  return tuple(abs(x) for pair in zip(deltas, kept) for x in pair)


def _rescaled(leaf, deltas, base, state, carry, *, of):
  del base
  found = following.kept(leaf, deltas, state, carry, of)
  before, after = carry[1].reshape(-1, 2).T
  least = jnp.float32(1e-7)
  usable = (before >= least) & (after >= least)
  one = jnp.ones_like(after)
  factors = jnp.where(usable, before / jnp.where(usable, after, one), one)
  return tuple(
    transform.rounded(d * f.astype(d.dtype)) for d, f in zip(found, factors)
  )


_KEEP_L1 = transform.register_step(
  transform.Step(name="keep_l1", update=_rescaled, **following.passes(_norms))
)
