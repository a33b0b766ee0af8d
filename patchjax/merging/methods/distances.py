"""Combinations of contributors that depend on how far apart they are.

Squared distances are summed from differences, not taken from a Gram matrix:
models that were tuned from one base are close to each other and far from
zero, and the difference of two large dot products would be noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from patchjax.merging import gram
from patchjax.merging.methods import lengths
from patchjax.patches import transform

Array = Any


def combination(name: str, coefficients: Callable[..., Array]) -> Any:
  """Returns a reducing step `sum_i c_i x_i`, c from squared distances.

  It works on parameters or task vectors alike, and has an option `scope`:
  "tree" for distances of whole models, "leaf" for those of each leaf.

  Args:
    name: of the step.
    coefficients: `(squares, state, k, **options) -> (c, share)`: of the
      `[k, k]` squared distances, k coefficients, and a number to multiply
      their sum by (the 1/n of a mean of n), or None.
  """

  def update(leaf, vectors, base, state, squares, **options):
    del leaf, base
    k = len(vectors)
    c, share = coefficients(_matrix(squares, k), state, k, **options)
    terms = (c[i].astype(x.dtype) * x for i, x in enumerate(vectors))
    total = functools.reduce(jnp.add, map(transform.rounded, terms))
    if share is None:
      return total
    return transform.rounded(total * jnp.asarray(share).astype(total.dtype))

  return transform.register_step(
    transform.Step(
      name=name,
      update=update,
      start=_start,
      counts=transform.one_count(_reduce, _finish, once=True),
      reducing=True,
      scope=lambda *, scope="tree", **_: scope,
      space=lambda **_: "either",
    )
  )


def _pairs(k: int) -> list[tuple[int, int]]:
  return [(i, j) for i in range(k) for j in range(i)]


def _start(state, shapes, k, **options):
  del state, shapes, k, options


def _reduce(leaf, vectors, state, carry, **options):
  del state, carry, options
  gaps = [vectors[i] - vectors[j] for i, j in _pairs(len(vectors))]
  squares = []
  # Two at a time: that is what one read of large leaves is made for.
  for two in zip(gaps[::2], [*gaps[1::2], *gaps[-1:]]):
    first, _, second = gram.inner_products(two, local=leaf.local)
    squares += [first, second]
  none = jnp.zeros((1,), jnp.float32)  # a single contributor has no pair
  return jnp.stack(squares[: len(gaps)]).astype(jnp.float32) if gaps else none


def _finish(total, carry):
  del carry
  return total, jnp.asarray(True)


def _matrix(squares, k):
  """The sums of pairs as a symmetric matrix, zero on the diagonal."""
  at = {pair: n for n, pair in enumerate(_pairs(k))}
  none = jnp.zeros((), squares.dtype)

  def entry(i, j):
    return none if i == j else squares[at[max(i, j), min(i, j)]]

  return jnp.stack(
    [jnp.stack([entry(i, j) for j in range(k)]) for i in range(k)]
  )


def to_mean(squares: Array, shares: Array) -> Array:
  """Returns the distance of each vector to a weighted mean of all.

  `||x_i - z||^2 = sum_j c_j D_ij - sum_jl c_j c_l D_jl / 2`.

  Args:
    squares: D, the squared distances `[k, k]`.
    shares: c, the k weights, of sum 1.
  """
  near = jnp.sum(squares * shares[None, :], axis=1)
  half = jnp.sum(near * shares) * jnp.asarray(0.5).astype(near.dtype)
  return lengths.root(near - half)
