"""drop_by_rank: drop entries at random, small ones more often (MagPrune).

A probability that is linear in the rank needs no rank. Of the n - 1 other
entries of its row, as many are smaller as the rank says: an entry is larger
than one of them that is drawn at random with the probability rank / (n - 1).
A draw that is compared with the least and the largest probability also says,
where it is between them, which of the others is looked at. Only to divide by
the probability rows are sorted.
"""

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
  contributor with a density of 1 is left as it is. What is kept without
  `rescale` has the same probabilities, and is found without ranks: other
  entries than with it.

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
  if not rescale:
    kept = masked(leaf, deltas, state, rng=rng, axis=axis)
    return tuple(
      delta * jnp.where(mask, jnp.ones_like(delta), jnp.zeros_like(delta))
      for delta, mask in zip(deltas, kept)
    )
  out = []
  for i, delta in enumerate(deltas):
    odds, along = _odds(leaf, state, i, len(deltas), axis)
    keys = ordering.magnitude_keys(delta)
    likely = _likely(ranking.row_ranks(keys, leaf, along), odds)
    bits = masks.uniform_bits(state["key"], leaf, i, rng=rng)
    # A product of zero too, so that NaN and Inf stay to be seen.
    factor = jnp.ones_like(likely) / likely
    factor = jnp.where(masks.below(bits, likely), factor, jnp.float32(0))
    out.append(transform.rounded(delta * factor.astype(delta.dtype)))
  return tuple(out)


def masked(leaf, deltas, state, *, rng, axis) -> tuple[Any, ...]:
  """Returns the masks of what is kept of a leaf without `rescale`.

  Args:
    leaf: where the leaf is.
    deltas: of the contributors.
    state: numbers of the step.
    rng: as in `drop_by_rank`.
    axis: as in `drop_by_rank`.
  """
  out = []
  nought = jnp.uint32(0)
  for i, delta in enumerate(deltas):
    odds, along = _odds(leaf, state, i, len(deltas), axis)
    bits = masks.uniform_bits(state["key"], leaf, i, rng=rng) ^ nought
    out.append(ranking.outranks(delta, _others(bits, odds), leaf, along))
    if leaf.single and leaf.size:
      # One after the other, in the same memory: the compiler cannot know that
      # this is always 0.
      first = out[-1].reshape(-1)[0].astype(jnp.uint32)
      nought = first >> jnp.uint32(1)
  return tuple(out)


def _odds(leaf, state, i, k, axis):
  """Of a contributor: what `_others` and `_likely` need; and the axis.

  The probability in the middle of a row, half their range, and how many other
  entries a row has. Where all is kept, or a row is one entry, all have the
  same probability.
  """
  # Vectors are rows; otherwise the axis must be there.
  axis = axis if len(leaf.shape) > 1 else -1
  last = (leaf.shape[axis] if leaf.shape else 1) - 1
  numbers = (
    transform.per_contributor(state[name], k)[i]
    for name in ("density", "epsilon")
  )
  density, epsilon = (
    shares.selecting(jnp.asarray(x).astype(jnp.float32)) for x in numbers
  )
  same = (density >= jnp.float32(1)) | jnp.asarray(last < 1)
  epsilon = jnp.where(same, jnp.float32(0), epsilon)
  return (jnp.minimum(density, jnp.float32(1)), epsilon, last), axis


def _others(bits, odds):
  """Returns what each entry has to outrank, for `ranking.outranks`."""
  density, epsilon, last = odds
  low, high = density - epsilon, density + epsilon
  some = high > low
  width = jnp.where(some, high - low, jnp.float32(1))
  # What is drawn between the two says which of the others it is. By way of
  # signed integers: a CPU converts no others in vectors.
  other = (masks.uniform(bits) - low) * (jnp.float32(last) / width)
  other = jnp.maximum(other.astype(jnp.int32), jnp.int32(0))
  other = jnp.minimum(other, jnp.int32(max(last - 1, 0)))
  other = jnp.where(masks.below(bits, high), other, jnp.int32(last))
  other = other.astype(jnp.uint32)
  return jnp.where(masks.below(bits, low), jnp.uint32(ranking.ALWAYS), other)


def _likely(ranks, odds):
  density, epsilon, last = odds
  # From the middle, so that a row of one entry is no special case.
  steps = ranks.astype(jnp.float32) * jnp.float32(2) - jnp.float32(last)
  away = steps * jnp.float32(1 / max(last, 1))
  return density + transform.rounded(epsilon * away)


_DROP = transform.register_step(
  transform.Step(name="drop_by_rank", update=_drop, carries_nonfinite=True)
)
