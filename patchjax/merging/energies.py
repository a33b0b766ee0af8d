"""weigh_by_energy: elect signs, and average what agrees by its energy."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from patchjax.merging import varying
from patchjax.merging.conflict import sums
from patchjax.patches import shares, transform


def weigh_by_energy(
  *, density: Any = 1.0, flavour: Literal["paper", "mergekit"] = "paper"
) -> transform.Transform:
  """Returns the steps that average contributors by the energy of their change.

  All of SCE (Wan et al. 2024, https://arxiv.org/abs/2408.07990): what
  `keep_varied` keeps gives the weights `w_i = mean(d_i^2)` of a leaf; in each
  entry the sign of the sum is elected (zero counts as positive), and those of
  that sign are averaged, `sum_i w_i d_i / sum_i w_i`.

  Args:
    density: share that `keep_varied` keeps; traced; has no derivative.
    flavour: "paper": what varies less still takes part in election and mean;
      weights are equal if all are 0. "mergekit": it does not; weights are
      equal if they sum to less than 1e-6, and sums of them that divide are at
      least 1e-6 after they were normalized.
  """
  if isinstance(density, int | float):
    shares.check_density(density)
  return transform.Transform.of(_ENERGY, {"density": density}, flavour=flavour)


def _start(state, shapes, k, *, flavour):
  del flavour
  return (*varying.start(state, shapes, k), np.zeros(k, np.float32))


def _energies(leaf, keys, deltas, state, carry, *, flavour):
  del state, flavour
  kept = varying.kept_of(leaf, deltas, carry, keys)
  squares = [jnp.square(d) for d in kept]
  # More at a time, of 16-bit models, are not compiled to vectors.
  energies = sums.totals(squares, local=leaf.local, together=2)
  return energies.astype(jnp.float32)


def _weighed(total, carry):
  *others, _ = carry
  return (*others, total), jnp.asarray(True)


def _always(carry):
  # True, but not to the compiler. It then cannot take the pass for a part of
  # the program around it, compute the keys anew and not in vectors.
  return carry[0] > jnp.float32(0)


_COUNTS = (
  *varying.COUNTS,
  transform.Count(_energies, _weighed, once=True, beside=True, needed=_always),
)


def _update(leaf, deltas, base, state, carry, *, flavour):
  del base, state
  mergekit = flavour == "mergekit"
  if mergekit:
    deltas = varying.kept_of(leaf, deltas, carry)
  energies = carry[-1] * jnp.float32(1 / max(math.prod(leaf.shape), 1))
  total = jnp.sum(energies)
  some = total >= jnp.float32(1e-6) if mergekit else total > jnp.float32(0)
  equal = jnp.full_like(energies, 1 / len(deltas))
  weights = jnp.where(some, energies / jnp.where(some, total, 1.0), equal)
  balance = functools.reduce(jnp.add, deltas)
  nought = jnp.zeros_like(balance)
  up = balance >= nought
  sums = mass = nought
  for d, weight in zip(deltas, weights):
    weight = weight.astype(d.dtype)
    agrees = jnp.where(up, d > nought, d < nought)
    sums = sums + jnp.where(agrees, transform.rounded(d * weight), nought)
    mass = mass + jnp.where(agrees, weight, nought)
  if mergekit:
    return sums / jnp.maximum(mass, jnp.asarray(1e-6, mass.dtype))
  return sums / jnp.where(mass > nought, mass, jnp.ones_like(mass))


_ENERGY = transform.register_step(
  transform.Step(
    name="weigh_by_energy",
    update=_update,
    start=_start,
    counts=lambda **_: _COUNTS,
    kept=varying.keys,
    reducing=True,
    scope=lambda **_: "leaf",
  )
)
