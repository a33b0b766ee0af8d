"""Combinations by Gram matrix: right, differentiable, on every placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging import gram
from patchjax.patches import Transform
from patchjax.trees.errors import SelectionError
from tests.merging.models import floats, models, put


def _shares(found, state, k, *, scope):
  del scope
  lengths = jnp.sqrt(jnp.diagonal(found))
  cosines = found / (lengths[:, None] * lengths[None, :])
  weights = gram.weights_of(state, k, normalize=True)
  return weights * jnp.sum(cosines[:k, :k], axis=1)


def _with_base(found, state, k, *, scope):
  shares = _shares(found, state, k, scope=scope)
  # The longer the base, the less of it.
  return (*shares, state["t"] / jnp.sqrt(found[k, k]))


def _scope(*, scope):
  return scope


ALONE = gram.combination("test_shares", _shares, scope=_scope)
AND_BASE = gram.combination(
  "test_shares_base", _with_base, scope=_scope, with_base=True
)


def alone(scope="leaf", **numbers):
  return Transform.of(ALONE, numbers, scope=scope)


def and_base(scope="leaf", **numbers):
  return Transform.of(AND_BASE, numbers, scope=scope)


def expected(base, others, scope, weights, t=None):
  """The same in float64."""
  trees = [[x.astype(np.float64) for x in floats(y)] for y in (*others, base)]
  rows = list(zip(*trees, strict=True))
  if scope == "tree":
    rows = [[np.concatenate([x.ravel() for x in y]) for y in trees]]
  result, k = [], len(others)
  for row in rows:
    flat = np.stack([x.ravel() for x in row])
    found = flat @ flat.T
    lengths = np.sqrt(np.diag(found))
    cosines = found / np.outer(lengths, lengths)
    shares = weights / np.sum(weights) * cosines[:k, :k].sum(1)
    total = shares @ flat[:k]
    if t is not None:
      total = total + t / lengths[k] * flat[k]
    result.append(total)
  return np.concatenate(result)


@pytest.mark.parametrize("place", ["single", "mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize("scope", ["leaf", "tree"])
def test_equals_float64(scope, place, request):
  base, others = models(3)
  weights = np.array([1.0, 2.0, 3.0])
  wanted = expected(base, others, scope, weights, 0.5)
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  method = and_base(scope, weights=np.float32(weights), t=0.5)
  for run in (pj.merge, jax.jit(pj.merge)):
    merged = run(base, others, method)
    found = np.concatenate([x.ravel() for x in floats(merged)])
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)
    if place != "single":
      for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(merged)):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_without_base():
  base, others = models(2)
  wanted = expected(base, others, "leaf", np.ones(2))
  for given in (None, base):
    merged = pj.merge(given, others, alone())
    found = np.concatenate([x.ravel() for x in floats(merged)])
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1 << 17, (1 << 17) + 8, (1 << 17) + 1])
def test_large_leaves_are_summed_accurately(size, dtype):
  rng = np.random.default_rng(0)
  draws = [(1 + rng.random(size)).astype(dtype) for _ in range(3)]
  exact = np.float64(np.stack(draws)) @ np.float64(np.stack(draws)).T

  def products(xs, local):
    wide = tuple(x.astype(jnp.float32) for x in xs)
    return gram.inner_products(wide, local=local)

  for local in (True, False):
    found = jax.jit(products, static_argnums=1)(draws, local)
    np.testing.assert_allclose(found, exact[np.triu_indices(3)], rtol=4e-7)


def test_derivatives_are_those_of_finite_differences():
  base, others = models(2)
  base = {"w": base["block"]["kernel"][:2]}
  first, second = ({"w": x["block"]["kernel"][:2]} for x in others)

  def loss(t, x):
    merged = pj.merge(base, [x, second], and_base(t=t))
    return jnp.sum(jnp.square(merged["w"]))

  t = jnp.float32(0.7)
  found = jax.jit(jax.grad(loss, (0, 1)))(t, first)
  step = 1e-2
  slope = (loss(t + step, first) - loss(t - step, first)) / (2 * step)
  np.testing.assert_allclose(found[0], slope, rtol=1e-3)
  direction = np.random.default_rng(3).standard_normal((2, 16))
  up, down = (
    {"w": first["w"] + np.float32(sign * step * direction)} for sign in (1, -1)
  )
  slope = (loss(t, up) - loss(t, down)) / (2 * step)
  np.testing.assert_allclose(
    np.sum(found[1]["w"] * direction), slope, rtol=2e-3
  )


def test_numbers_are_mapped_over_and_do_not_compile_again():
  base, others = models(2)

  def run(t):
    return pj.merge(base, others, and_base(t=t))["heads"][0]

  many = jax.vmap(run)(jnp.float32([0.1, 0.9]))
  for t, one in zip((0.1, 0.9), many):
    np.testing.assert_allclose(run(t), one, rtol=1e-6, atol=1e-6)
  with jax.no_tracing():
    run(0.3)


def test_wrong_number_of_coefficients():
  step = gram.combination("test_one_short", lambda found, state, k: [1.0])
  with pytest.raises(SelectionError, match="expected 2 coefficients, got 1"):
    pj.merge(None, models(2)[1], Transform.of(step, {}))
