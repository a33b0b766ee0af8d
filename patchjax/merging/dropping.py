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
  return tuple(
    _dropped(d, leaf, i, density, state["key"], rng, rescale)
    for i, (d, density) in enumerate(zip(deltas, densities, strict=True))
  )


def _dropped(delta, leaf, number, density, key, rng, rescale):
  density = shares.selecting(jnp.asarray(density).astype(jnp.float32))
  drawn = masks.uniform(masks.uniform_bits(key, leaf, number, rng=rng))
  # A product: a division by a number is compiled to one in some places only.
  factor = (jnp.float32(1) / density).astype(delta.dtype)
  kept = transform.rounded(delta * factor) if rescale else delta
  return jnp.where(drawn < density, kept, jnp.zeros_like(delta))


_DROP = transform.register_step(transform.Step(name="drop", update=_drop))
