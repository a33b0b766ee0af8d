"""The k-th largest magnitude against a sort, and its counting."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from patchjax.patches import (
  counting,
  narrowing,
  ordering,
  placement,
  selection,
  shares,
  top_k,
)
from patchjax.trees.errors import DtypeError, SelectionError

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
kth = jax.jit(top_k.kth_magnitude)
mask_exact = jax.jit(top_k.top_k_mask)


def words(x):
  """Magnitudes as integers, by numpy."""
  word = {4: np.uint32, 2: np.uint16}[x.dtype.itemsize]
  return x.view(word) & word(np.iinfo(word).max >> 1)


def odd(dtype):
  """Zeros, denormals, ties, infinities and NaN among ordinary numbers."""
  tiny = np.finfo(np.float32).tiny if dtype == np.float32 else 6e-8
  special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, tiny, -tiny / 4]
  rng = np.random.default_rng(0)
  return np.concatenate(
    [np.array(special, np.float32), np.round(rng.standard_normal(55) * 2)]
  ).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_a_sort(dtype):
  x = odd(dtype)
  order = np.sort(words(x))[::-1]
  for k in range(1, len(x) + 1):
    found = np.asarray(kth(x, jnp.asarray(counting.limbs(k))))
    assert words(found[None])[0] == order[k - 1], k


@hypothesis.given(
  hnp.arrays(
    np.float32,
    (3, 7),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
  ),
  st.integers(0, 21),
)
def test_exact_masks_are_the_stable_sort(x, k):
  mask = np.asarray(mask_exact(x, jnp.asarray(counting.limbs(k))))
  order = np.argsort(-words(x).ravel().astype(np.int64), kind="stable")[:k]
  wanted = np.zeros(x.size, bool)
  wanted[order] = True
  assert (mask.ravel() == wanted).all()


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize(
  "spec", [("x", "y"), (None, "y"), (("x", "y"), None), ()]
)
def test_sharded(mesh, spec, request):
  mesh = request.getfixturevalue(mesh)
  rng = np.random.default_rng(1)
  x = np.round(rng.standard_normal((16, 8)) * 2).astype(np.float32)
  y = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
  k = jnp.asarray(counting.limbs(50))
  assert kth(y, k) == np.sort(np.abs(x).ravel())[-50]
  order = np.argsort(-np.abs(x).ravel(), kind="stable")[:50]
  mask = np.asarray(mask_exact(y, k)).ravel()
  assert mask.sum() == 50 and mask[order].all()


def samples():
  """Keys of many kinds, more of them than are looked at one by one."""
  rng = np.random.default_rng(3)
  size = 1 << 16
  normal = rng.standard_normal(size).astype(np.float32)
  half = normal.astype(ml_dtypes.bfloat16).astype(np.float32)
  sparse = np.where(rng.random(size) < 0.1, normal, 0).astype(np.float32)
  # In order: a sample of every so many would be anything but a sample.
  return {
    "normal": normal,
    "ties": half,
    "differences of ties": half - half[::-1],
    "sparse": sparse,
    "sorted": np.sort(normal),
    "one value": np.full(size, 3, np.float32),
    "scales": np.exp(normal * 20),
  }


@pytest.mark.parametrize("mesh", [None, "mesh_explicit"])
def test_few_passes_find_it(mesh, request):
  widths = [(1 << 16) // 64, 64]
  sharding = None
  if mesh is not None:
    mesh = request.getfixturevalue(mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
  taken = []
  for kind, x in samples().items():
    order = np.sort(np.abs(x))[::-1]
    x = jax.device_put(x.reshape(widths), sharding)
    leaf = placement.leaf_of(x)
    for k in (1, 700, 13_107, 1 << 15, 65_000):
      start = selection.search(counting.limbs(k), [x.shape])
      state, passes = selection.stacked([start]), 0
      for kind_of_pass in narrowing.rounds(exact=False):
        done = False
        while not done:
          state, done = one_pass(x, leaf, state, kind_of_pass)
          passes += 1
      found = ordering.magnitude_of(selection.cut_key(state[0]))
      above = int((order >= float(found)).sum())
      assert above == k or float(found) == order[k - 1], (kind, k)
      taken.append(passes)
  # Twelve would be needed to cut in sixths.
  assert np.mean(taken) < 6.5 and max(taken) <= 14, taken


@functools.partial(jax.jit, static_argnums=3)
def one_pass(x, leaf, state, kind):
  def count(x, leaf, state):
    return kind.count((ordering.magnitude_keys(x),), leaf, state)

  return kind.after(placement.sum_over_shards(count, x, leaf, state), state)


def test_masks_over_leaves_break_ties_by_name_then_index():
  leaves = {"b": np.ones((2, 2), np.float32), "a": np.float32([1, 2, 0])}
  masks = top_k.top_k_masks(leaves, 4)
  assert masks["a"].tolist() == [True, True, False]
  assert masks["b"].tolist() == [[True, True], [False, False]]
  with pytest.raises(SelectionError, match="8 of 7"):
    top_k.top_k_masks(leaves, 8)


def test_vmap_over_k():
  x = np.random.default_rng(2).standard_normal(50).astype(np.float32)
  ks = np.stack([counting.limbs(k) for k in (1, 10, 50)])
  found = jax.jit(jax.vmap(lambda k: top_k.kth_magnitude(x, k)))(ks)
  assert found.tolist() == np.sort(np.abs(x))[[-1, -10, -50]].tolist()


def test_large_leaves_have_rows():
  # Nothing of this size is made: only the arithmetic on shapes.
  assert placement.extents((80, 8192, 28672)) == (80, 8192 * 28672)
  widths = selection.key_widths([(80, 8192, 28672), (8192,)])
  assert widths == (31, 1, 7, 28)
  with pytest.raises(SelectionError, match="number the entries"):
    placement.extents((1 << 33,))


def test_rows_of_large_leaves_order_ties(monkeypatch):
  # The same code, with a small limit in the place of 2**31.
  x = np.ones((4, 5), np.float32)
  monkeypatch.setattr(placement, "ROW_LIMIT", 8)
  mask = top_k.top_k_mask(x, 7)
  assert np.asarray(mask).ravel().nonzero()[0].tolist() == list(range(7))


@hypothesis.given(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_rows_to_count_are_whole_slices(shape):
  rows, length = counting._rows(tuple(shape))
  assert rows * length == math.prod(shape)
  after = [math.prod(shape[d:]) for d in range(1, len(shape) + 1)]
  assert any(
    length % inner == 0 and n % (length // inner) == 0
    for n, inner in zip(shape, after, strict=True)
  )


def test_counts_beyond_int32():
  limb = 1 << 12
  counts = jnp.asarray([[3 * limb, 1], [5, 4 * limb + 7]], jnp.int32)
  carried = counting.carried(counts)
  assert carried.tolist() == [[3 * limb, 5], [5, 7]]
  big = 70_000_000_000
  high, low = counting.limbs(big)
  assert int(high) * limb + int(low) == big
  above, below = counting.limbs(big + 1), counting.limbs(big - 1)
  k = counting.limbs(big)
  assert counting.at_least(above, k) and counting.at_least(k, k)
  assert not counting.at_least(below, k)
  rows = jnp.full((9,), (1 << 31) - 1, jnp.int32)
  high, low = counting.limb_sum(rows).tolist()
  assert high * limb + low == 9 * ((1 << 31) - 1)


def entries(density, size):
  high, low = np.asarray(shares.entries_of(density, size)).tolist()
  return (high << 12) + low


def test_entries_of_python_numbers_are_those_of_the_paper():
  for density in (0.05, 0.2, 0.29, 1 / 3, 0.7, 1.0, 1):
    for size in (10, 100, 12_345, 8_000_000_000):
      assert entries(density, size) == int(density * size)


def test_entries_of_traced_numbers_are_exact_decimals():
  traced = jax.jit(shares.entries_of, static_argnums=1)
  for density in (0.005, 0.05, 0.1, 0.2, 0.7, 0.123456, 1.0):
    for size in (10, 999, 22_713_216, 8_030_261_248, 70_553_706_496):
      high, low = traced(jnp.float32(density), size).tolist()
      exact = round(density * 10**6) * size // 10**6
      assert (high << 12) + low == exact, (density, size)
  for n in (3, 7, 9, 11, 13):
    high, low = traced(jnp.float32(1 / n), n).tolist()
    assert (high << 12) + low == 1


def test_bad_requests():
  for density in (0.0, -0.1, 1.01, np.nan, jnp.float32(2)):
    with pytest.raises(SelectionError, match=r"in \(0, 1\]"):
      shares.entries_of(density, 10)
  with pytest.raises(DtypeError, match="float32"):
    ordering.magnitude_bits(jnp.zeros(3, jnp.int32))
  with pytest.raises(SelectionError, match="cannot count"):
    shares.entries_of(jnp.float32(0.5), 1 << 43)
