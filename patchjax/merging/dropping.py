"""drop: keep entries at random, and make the kept ones larger for it.

The mask is a hash of each entry's place (`masks`), made where it is used: it
costs no memory, and does not depend on mesh, on order, or on other leaves.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from patchjax.merging import masks
from patchjax.patches import shares, transform


def drop(
  *,
  density: Any,
  key: Any = 0,
  rng: masks.Rng = "hash",
  rescale: bool = True,
) -> transform.Transform:
  """Returns the step that drops entries at random.

  DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099): `m d / density`
  with `m ~ Bernoulli(density)` in each entry; its drop rate p is 1 - density.

  Args:
    density: probability of being kept, in (0, 1], one a contributor or one
      for all; traced; has no derivative.
    key: a seed or a PRNG key; the same key gives the same masks
      (`masks.keep_mask`), other ones for each contributor.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    rescale: whether to divide by the density, so that the expectation stays.

  Raises:
    SelectionError: if the density is outside (0, 1].

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, ones = ({"w": np.full(1000, x, np.float32)} for x in (0, 1))
    >>> step = pj.merging.drop(density=0.25)
    >>> dropped = pj.merge(base, [ones], step)["w"]
    >>> sorted(set(dropped.tolist())), bool(abs(dropped.mean() - 1) < 0.2)
    ([0.0, 4.0], True)
  """
  masks.check_rng(rng)
  if isinstance(density, int | float):
    shares.check_density(density)
  numbers = {"density": density, "key": masks.as_key(key)}
  return transform.Transform.of(_DROP, numbers, rng=rng, rescale=rescale)


def _drop(leaf, deltas, base, state, shared, *, rng, rescale):
  del base, shared
  densities = transform.per_contributor(state["density"], len(deltas))
  out = []
  for delta, mask, density in zip(
    deltas, masked(leaf, deltas, state, rng=rng), densities, strict=True
  ):
    # A product: a division by a number is compiled to one in some places
    # only. Of zero too, so that NaN and Inf stay to be seen where they are.
    one = jnp.float32(1)
    factor = one / jnp.asarray(density).astype(one.dtype) if rescale else one
    factor = jnp.where(mask, factor, jnp.float32(0))
    out.append(transform.rounded(delta * factor.astype(delta.dtype)))
  return tuple(out)


def masked(leaf, deltas, state, *, rng) -> tuple[Any, ...]:
  """Returns the masks of what is kept of a leaf.

  Args:
    leaf: where the leaf is.
    deltas: of the contributors.
    state: numbers of the step.
    rng: as in `drop`.
  """
  densities = transform.per_contributor(state["density"], len(deltas))
  out = []
  for i, density in enumerate(densities):
    bits = masks.uniform_bits(state["key"], leaf, i, rng=rng)
    density = shares.selecting(jnp.asarray(density).astype(jnp.float32))
    out.append(masks.below(bits, density))
  return tuple(out)


_DROP = transform.register_step(
  transform.Step(name="drop", update=_drop, carries_nonfinite=True)
)
