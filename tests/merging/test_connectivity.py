"""Re-Basin on networks that were trained apart."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from tests.merging.networks import plus

WIDTH = 64


def net(p, x):
  x = jax.nn.relu(plus(x @ p["w0"], p["b0"]))
  x = jax.nn.relu(plus(x @ p["w1"], p["b1"]))
  return plus(x @ p["w2"], p["b2"])


def loss(params, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(
    net(params, x), y
  ).mean()


@functools.cache
def digits():
  # Importing scikit-learn takes longer than all the training here.
  home = pathlib.Path(importlib.util.find_spec("sklearn").origin).parent
  rows = np.loadtxt(home / "datasets/data/digits.csv.gz", delimiter=",")
  x, y = np.float32(rows[:, :-1]) / 16, rows[:, -1].astype(np.int32)
  order = np.random.default_rng(0).permutation(len(y))
  x, y = x[order], y[order]
  return (x[:1400], y[:1400]), (x[1400:], y[1400:])


@jax.jit
def train(params, x, y, key):
  optimizer = optax.adam(3e-3)

  def step(carry, key):
    params, state = carry
    rows = jax.random.randint(key, (128,), 0, len(y))
    grads = jax.grad(loss)(params, x[rows], y[rows])
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(key, 300)
  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return params


def trained(seed):
  rng = np.random.default_rng(seed)
  sizes = (64, WIDTH, WIDTH, 10)
  params = {}
  for i, (m, n) in enumerate(zip(sizes, sizes[1:])):
    drawn = rng.standard_normal((m, n)) * np.sqrt(2 / m)
    params |= {f"w{i}": np.float32(drawn), f"b{i}": np.zeros(n, np.float32)}
  (x, y), _ = digits()
  return train(params, x, y, jax.random.key(seed))


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_matching_lowers_the_barrier(by):
  (x, y), test = digits()
  a, b = trained(0), trained(1)
  accuracy = [np.mean(np.argmax(net(p, test[0]), 1) == test[1]) for p in (a, b)]
  assert min(accuracy) > 0.93
  found = pj.merging.align(net, a, b, x[:512], by=by)

  def scan(other):
    return pj.merging.linear_connectivity(
      a, other, lambda p: loss(p, *test), points=11
    )

  before, after = scan(b), scan(found.params)
  assert before.barrier() > 0.4
  assert after.barrier() < before.barrier() / 3
  ends = (before.losses[0], before.losses[-1])
  np.testing.assert_allclose(ends, [loss(p, *test) for p in (a, b)], rtol=1e-5)
  np.testing.assert_allclose(after.losses[-1], ends[1], rtol=1e-4)


def test_the_scan_is_the_loop_and_both_barriers_are_their_definitions():
  a, b = {"w": np.float32([0, 1])}, {"w": np.float32([2, 0])}

  def height(p):
    return jnp.sum(jnp.sin(3 * p["w"]))

  fast = pj.merging.linear_connectivity(a, b, height, points=9, chunk=4)
  slow = pj.merging.linear_connectivity(
    a, b, lambda p: float(height(p)), points=9, traced=False
  )
  np.testing.assert_allclose(fast.losses, slow.losses, rtol=1e-5)
  t = np.linspace(0, 1, 9)
  exact = np.sin(6 * t) + np.sin(3 * (1 - t))
  np.testing.assert_allclose(fast.losses, exact, rtol=1e-5, atol=1e-6)
  mean = (exact - (exact[0] + exact[-1]) / 2).max()
  line = (exact - (1 - t) * exact[0] - t * exact[-1]).max()
  np.testing.assert_allclose(fast.barrier(), mean, rtol=1e-5)
  np.testing.assert_allclose(fast.barrier(against="line"), line, rtol=1e-5)
  with pytest.raises(ValueError, match="against"):
    fast.barrier(against="best")
  with pytest.raises(ValueError, match="points"):
    pj.merging.linear_connectivity(a, b, height, points=1)
