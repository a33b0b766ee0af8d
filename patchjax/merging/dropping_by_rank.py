"""drop_by_rank: drop entries at random, small ones more often (MagPrune)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from patchjax.merging import masks, ranking
from patchjax.patches import ordering, shares, transform
from patchjax.trees.errors import SelectionError


def drop_by_rank(
  *,
  density: Any,
  epsilon: Any = 0.15,
  key: Any = 0,
  rng: masks.Rng = "hash",
  rescale: bool = True,
  axis: int = -1,
) -> transform.Transform:
  """Returns the step that drops entries at random, small ones more often.

  MagPrune, of DELLA (Deep et al. 2024, https://arxiv.org/abs/2406.11617): the
  entry of rank r (from 0 at the least magnitude) of a row of n is kept with
  `p = density - epsilon + 2 epsilon r / (n - 1)`, and divided by p. Of equal
  magnitudes the first ranks lower. A row of one entry has p = density. A
  contributor with a density of 1 is left as it is.

  Args:
    density: mean probability of being kept, in (0, 1], one a contributor or
      one for all; traced; has no derivative.
    epsilon: half of the range of the probabilities (half of `window_size` in
      the paper's code), with `0 < density - epsilon` and
      `density + epsilon < 1`.
    key: a seed or a PRNG key; the same key gives the same masks.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    rescale: whether to divide by p, so that the expectation stays.
    axis: along which a row lies; a vector is one row, whatever the axis.

  Raises:
    SelectionError: if the density is outside (0, 1], or, with epsilon, gives
      probabilities outside (0, 1).

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros(1000, np.float32)}
    >>> tuned = {"w": np.arange(1, 1001, dtype=np.float32)}
    >>> step = pj.merging.drop_by_rank(density=0.5, epsilon=0.4, rescale=False)
    >>> kept = pj.merge(base, [tuned], step)["w"] > 0
    >>> bool(kept[:500].sum() < 200), bool(kept[500:].sum() > 300)
    (True, True)
  """
  masks.check_rng(rng)
  _check(density, epsilon)
  numbers = {
    "density": density,
    "epsilon": epsilon,
    "key": masks.as_key(key),
  }
  return transform.Transform.of(
    _DROP, numbers, rng=rng, rescale=rescale, axis=axis
  )


def _check(density, epsilon):
  if not isinstance(density, int | float):
    return
  shares.check_density(density)
  if density == 1 or not isinstance(epsilon, int | float):
    return
  if not 0 < density - epsilon <= density + epsilon < 1:
    raise SelectionError(
      "density - epsilon and density + epsilon must lie between 0 and 1, got "
      f"density {density} and epsilon {epsilon}: make epsilon smaller"
    )


def _drop(leaf, deltas, base, state, shared, *, rng, rescale, axis):
  del base, shared
  k = len(deltas)
  densities = transform.per_contributor(state["density"], k)
  epsilons = transform.per_contributor(state["epsilon"], k)
  # Vectors are rows; otherwise the axis must be there.
  axis = axis if len(leaf.shape) > 1 else -1
  out = []
  for i, delta in enumerate(deltas):
    likely = _probabilities(delta, leaf, densities[i], epsilons[i], axis)
    bits = masks.uniform_bits(state["key"], leaf, i, rng=rng)
    factor = (jnp.ones_like(likely) / likely).astype(delta.dtype)
    kept = transform.rounded(delta * factor) if rescale else delta
    keep = masks.uniform(bits) < likely
    out.append(jnp.where(keep, kept, jnp.zeros_like(delta)))
  return tuple(out)


def _probabilities(delta, leaf, density, epsilon, axis):
  ranks = ranking.row_ranks(ordering.magnitude_keys(delta), leaf, axis)
  density = shares.selecting(jnp.asarray(density).astype(jnp.float32))
  epsilon = shares.selecting(jnp.asarray(epsilon).astype(jnp.float32))
  last = (leaf.shape[axis] if leaf.shape else 1) - 1
  # From the middle, so that a row of one entry is no special case.
  steps = ranks.astype(jnp.float32) * jnp.float32(2) - jnp.float32(last)
  away = steps * jnp.float32(1 / max(last, 1))
  likely = density + transform.rounded(epsilon * away)
  return jnp.where(density >= jnp.float32(1), jnp.ones_like(likely), likely)


_DROP = transform.register_step(
  transform.Step(name="drop_by_rank", update=_drop)
)
