"""Numbers of a method: mapped over, learned, or refused a derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import SelectionError
from tests.merging.models import floats, models, same_bits


def small():
  base, others = models(2)
  first, *rest = ({"w": x["block"]["kernel"][:4]} for x in (base, *others))
  return first, rest


def test_vmap_over_densities_and_scales_is_the_loop():
  base, others = small()
  densities, scales = [0.1, 0.3, 1.0], [1.0, 0.5, 0.25]

  def run(density, scale):
    return pj.merge(base, others, pj.merging.ties(density=density, scale=scale))

  many = jax.jit(jax.vmap(run))(jnp.float32(densities), jnp.float32(scales))
  for i, (density, scale) in enumerate(zip(densities, scales)):
    one = run(density, scale)
    assert same_bits(one, jax.tree.map(lambda x, i=i: x[i], many))


def test_derivatives_are_those_of_finite_differences():
  base, others = small()
  target = jax.tree.map(lambda x: x * 0.9, base)

  def loss(weights, scale):
    method = pj.merging.ties(density=0.5, weights=weights, scale=scale)
    merged = pj.merge(base, others, method)
    return jnp.sum(jnp.square(merged["w"] - target["w"]))

  weights, scale = jnp.float32([1.0, 2.0]), jnp.float32(0.7)
  found = jax.jit(jax.grad(loss, (0, 1)))(weights, scale)
  step = 1e-2
  for i in range(2):
    e = np.eye(2, dtype=np.float32)[i] * step
    slope = (loss(weights + e, scale) - loss(weights - e, scale)) / (2 * step)
    np.testing.assert_allclose(found[0][i], slope, rtol=2e-2, atol=1e-3)
  slope = (loss(weights, scale + step) - loss(weights, scale - step)) / 0.02
  np.testing.assert_allclose(found[1], slope, rtol=1e-2)


def test_derivative_in_the_contributors():
  base, others = small()

  def total(x):
    method = pj.merging.task_arithmetic(scale=0.5)
    return jnp.sum(pj.merge(base, [x, others[1]], method)["w"])

  grads = jax.grad(total)(others[0])
  np.testing.assert_allclose(grads["w"], 0.5)


def test_state_learns():
  base, others = small()
  method = pj.merging.task_arithmetic(weights=[0.5, 0.5], scale=1.0)

  @jax.jit
  def loss(state):
    merged = pj.merge(base, others, method, state=state)
    return jnp.mean(jnp.square(merged["w"] - others[1]["w"]))

  state = method.init(base)
  before = loss(state)
  for _ in range(30):
    grads = jax.grad(loss)(state)
    state = jax.tree.map(lambda x, g: x - 5 * g, state, grads)
  assert loss(state) < before / 4


def test_density_has_no_derivative():
  base, others = small()

  def loss(density):
    merged = pj.merge(base, others, pj.merging.ties(density=density))
    return jnp.sum(merged["w"])

  with pytest.raises(SelectionError, match="has no derivative"):
    jax.grad(loss)(0.2)
  with pytest.raises(SelectionError, match="has no derivative"):
    jax.jit(jax.grad(loss))(0.2)
  # Held fixed it is no obstacle, even as an argument of a jitted function.
  both = jax.jit(
    lambda density, scale: jax.grad(
      lambda s: jnp.sum(
        pj.merge(base, others, pj.merging.ties(density=density, scale=s))["w"]
      )
    )(scale)
  )
  assert np.isfinite(both(0.2, 1.0))


def test_state_of_another_method_is_refused():
  base, others = small()
  state = pj.merging.linear().init(base)
  with pytest.raises(SelectionError, match="4 steps"):
    pj.merge(base, others, pj.merging.ties(), state=state)


def test_method_inside_scan_and_remat():
  base, others = small()
  method = pj.merging.ties(density=0.3)

  def step(params, _):
    merge = jax.checkpoint(lambda p: pj.merge(p, others, method))
    return merge(params), None

  out, _ = jax.lax.scan(step, jax.tree.map(jnp.asarray, base), length=2)
  loop = pj.merge(pj.merge(base, others, method), others, method)
  for x, y in zip(floats(out), floats(loop)):
    np.testing.assert_allclose(x, y, rtol=1e-6)
