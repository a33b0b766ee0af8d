"""Ties seen whole: the same entries as by searching for their index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import counting, top_k, tying

SHAPES = [(1,), (9,), (257,), (5, 1), (1, 40), (64, 33), (3, 7, 2), (6, 0)]

searched = jax.jit(top_k.top_k_mask)  # Traced: not known to lie on one device.


def first_of_the_largest(x, k):
  order = np.argsort(-np.abs(x.reshape(-1)), kind="stable")
  mask = np.zeros(x.size, bool)
  mask[order[:k]] = True
  return mask.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", [1, 2, 7])
def test_keeps_the_first(shape, values):
  rng = np.random.default_rng(values)
  x = rng.integers(0, values, shape).astype(np.float32)
  for k in {0, min(1, x.size), x.size // 3, x.size // 2, x.size}:
    expected = first_of_the_largest(x, k)
    np.testing.assert_array_equal(top_k.top_k_mask(x, k), expected)
    np.testing.assert_array_equal(searched(x, counting.limbs(k)), expected)


def test_many_in_long_rows():
  rng = np.random.default_rng(0)
  x = rng.integers(-2, 3, (70, 5000)).astype(jnp.bfloat16)
  for k in (1, 99_999, 100_000, 280_001):
    expected = first_of_the_largest(x.astype(np.float32), k)
    np.testing.assert_array_equal(top_k.top_k_mask(jnp.asarray(x), k), expected)


def test_a_row_too_long_to_be_looked_at(monkeypatch):
  monkeypatch.setattr(tying, "_ROW", 100)
  x = np.ones((3, 101), np.float32)
  assert top_k.top_k_mask(x, 150).sum() == 150


@pytest.mark.parametrize("fill", [False, True])
def test_two_cuts_of_two_arrays(fill):
  rng = np.random.default_rng(3)
  tuned = [rng.integers(1, 5, (40, 25)).astype(np.float32) for _ in range(2)]
  base = {"w": np.zeros_like(tuned[0])}
  step = pj.chain(
    pj.merging.keep_between(density=0.3, gamma=0.2, scope="leaf", fill=fill),
    pj.merging.mean(),
  )
  found = pj.merge(base, [{"w": x} for x in tuned], step)["w"]
  expected = np.zeros(1000, np.float32)
  for x in (x.reshape(-1) for x in tuned):
    order = np.argsort(x if fill else -x, kind="stable")
    # Of the largest, those after two tenths; or of the smallest, after five.
    kept = order[500:800] if fill else order[200:500]
    expected[kept] += x[kept] / 2
  np.testing.assert_array_equal(np.asarray(found).reshape(-1), expected)
