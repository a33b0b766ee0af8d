"""compress: what transforms lose, and that codes lose nothing."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import (
  Delta,
  Dense,
  LowRank,
  Quantized,
  Sparse,
  encode,
  quantizing,
  truncating,
)
from patchjax.trees.errors import NonFiniteError, SelectionError


def patch_of(**leaves):
  zeros = {name: np.zeros_like(x) for name, x in leaves.items()}
  return pj.diff(zeros, leaves), zeros


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def applied(patch, zeros):
  return jax.tree.map(np.asarray, pj.apply(zeros, patch))


@hypothesis.given(
  hnp.arrays(np.float32, (4, 5), elements=st.sampled_from([0, 0, 0, 1, -1, 2]))
)
def test_smallest_code_is_lossless(x):
  code = encode.smallest(x)
  assert np.array_equal(np.asarray(code.dense()), x)
  assert code.nbytes <= x.nbytes


def test_choice_of_code_by_bytes():
  sparse = np.zeros(1000, np.float32)
  sparse[:50] = np.arange(1, 51)
  ternary = np.sign(sparse) * 3
  patch, zeros = patch_of(
    d=normal(1000), s=sparse, t=ternary, none=np.zeros(9, np.float32)
  )
  small = pj.compress(patch)
  assert small.names == ("d", "s", "t")
  codes = {name: delta.code for name, delta in small.deltas.items()}
  assert isinstance(codes["d"], Dense)
  assert isinstance(codes["s"], Sparse)
  assert isinstance(codes["t"].values, Quantized)
  assert codes["t"].nbytes == 50 * 4 + 7 + 4
  for x, y in zip(
    jax.tree.leaves(applied(small, zeros)),
    jax.tree.leaves(applied(patch, zeros)),
  ):
    assert np.array_equal(x, y)
  assert all(
    isinstance(d.code, Dense)
    for d in pj.compress(small, code="dense").deltas.values()
  )
  assert isinstance(pj.compress(patch, code="sparse").deltas["d"].code, Sparse)
  with pytest.raises(ValueError, match="code must be"):
    pj.compress(patch, code="best")


def test_exact_patches_and_products_stay_exact():
  base = {"w": normal(100), "n": np.arange(100, dtype=np.int32)}
  tuned = {"w": base["w"].copy(), "n": base["n"].copy()}
  tuned["w"][7], tuned["n"][3] = -0.0, 9
  small = pj.compress(pj.diff(base, tuned, exact=True), pj.trim(density=0.5))
  assert small.nbytes < 30
  out = pj.apply(base, small)
  assert out["w"].tobytes() == tuned["w"].tobytes()
  assert out["n"].tobytes() == tuned["n"].tobytes()
  factors = np.ones(100, np.float32)
  factors[5] = 2
  product = pj.diff(base, base).replace({"w": Delta(Dense(factors), "mul")})
  small = pj.compress(product)
  assert isinstance(small.deltas["w"].code, Sparse)
  assert np.asarray(pj.apply(base, small)["w"])[5] == base["w"][5] * 2


def test_compeft():
  patch, zeros = patch_of(a=normal(40, 30), b=normal(50, seed=1))
  chain = pj.chain(pj.trim(density=0.1), pj.ternarize())
  small = pj.compress(patch, chain)
  out = applied(small, zeros)
  both = np.concatenate([np.ravel(patch.deltas[n].code.values) for n in "ab"])
  k = int(0.1 * both.size)
  threshold = np.sort(np.abs(both))[-k]
  for name in "ab":
    x = np.asarray(patch.deltas[name].code.values)
    kept = np.abs(x) >= threshold
    scale = np.abs(x[kept]).mean()
    np.testing.assert_allclose(
      out[name], np.where(kept, np.sign(x) * scale, 0), rtol=1e-5
    )
  tree = pj.compress(
    patch, pj.chain(pj.trim(density=0.1), pj.ternarize(scope="tree"))
  )
  scales = {float(d.code.values.scales[0]) for d in tree.deltas.values()}
  assert len(scales) == 1


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_truncate_is_near_the_best(method):
  u, s, vt = np.linalg.svd(normal(60, 50))
  s = 0.7 ** np.arange(50)
  x = (u[:, :50] * s @ vt).astype(np.float32)
  patch, zeros = patch_of(w=x, v=normal(7))
  small = pj.compress(patch, pj.truncate(rank=6, method=method))
  code = small.deltas["w"].code
  assert isinstance(code, LowRank) and code.rank == 6
  assert isinstance(small.deltas["v"].code, Dense)
  best = np.sqrt((s[6:] ** 2).sum())
  assert np.linalg.norm(applied(small, zeros)["w"] - x) < 1.01 * best


def test_truncate_matrices_of_low_rank_and_batches():
  rank_one = np.outer(np.arange(8.0), np.ones(9)).astype(np.float32)
  layers = np.stack([rank_one, 0 * rank_one, normal(8, 1) * normal(1, 9)])
  patch, zeros = patch_of(w=layers)
  small = pj.compress(patch, pj.truncate(rank=2, batch_axes=1))
  assert small.deltas["w"].code.a.shape == (3, 8, 2)
  np.testing.assert_allclose(applied(small, zeros)["w"], layers, atol=1e-4)


def test_orthonormal():
  q = truncating._orthonormal(jnp.asarray(normal(40, 6)))
  np.testing.assert_allclose(np.asarray(q).T @ q, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("per", ["channel", "tensor", 7, (5, 30), (8, 4)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quantize(bits, per):
  x = normal(20, 30)
  code = quantizing.quantized(x, bits=bits, per=per)
  block = code.block
  assert code.scales.shape == tuple(-(-n // b) for n, b in zip(x.shape, block))
  words, scales = np.asarray(code.words), np.asarray(code.scales)
  top = max((1 << (bits - 1)) - 1, 1)
  assert np.abs(words).max() <= top
  for i in range(0, 20, block[0]):
    for j in range(0, 30, block[1]):
      part = x[i : i + block[0], j : j + block[1]]
      held = words[i : i + block[0], j : j + block[1]]
      found = scales[i // block[0], j // block[1]]
      if bits == 1:
        np.testing.assert_allclose(found, np.abs(part).mean(), rtol=1e-5)
        assert (held == np.where(part > 0, 1, -1)).all()
      else:
        np.testing.assert_allclose(found, np.abs(part).max() / top, rtol=1e-6)
        assert np.abs(held * found - part).max() <= found * 0.5001


def test_quantized_patches():
  patch, zeros = patch_of(w=normal(64, 32))
  small = pj.compress(patch, pj.quantize(bits=3))
  assert small.nbytes == 64 * 32 * 3 // 8 + 32 * 4
  few = pj.compress(
    patch, pj.chain(pj.trim(density=0.05), pj.quantize(bits=4, per="tensor"))
  )
  assert isinstance(few.deltas["w"].code, Sparse) and few.nbytes < 500
  zero = pj.compress(pj.diff(zeros, zeros), pj.quantize(bits=4))
  assert zero.names == ()
  with pytest.raises(ValueError, match="bits must be"):
    pj.quantize(bits=9)
  with pytest.raises(ValueError, match="per must be"):
    quantizing.quantized(np.zeros((2, 2), np.float32), bits=2, per="row")


def test_on_a_mesh(mesh_explicit):
  mesh = mesh_explicit
  patch, _ = patch_of(w=normal(16, 8))
  base = {"w": np.zeros((16, 8), np.float32)}
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))

  def put(tree):
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

  sharded = pj.diff(put(base), put({"w": normal(16, 8)}))
  chain = pj.chain(pj.trim(density=0.25), pj.ternarize())
  for transform in (chain, pj.quantize(bits=4), pj.truncate(rank=2)):
    one = applied(pj.compress(patch, transform), base)["w"]
    other = applied(pj.compress(sharded, transform), base)["w"]
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_bad_input():
  patch, zeros = patch_of(w=normal(4))
  with pytest.raises(ValueError, match="merges contributors"):
    pj.compress(patch, pj.merging.mean())
  bad, _ = patch_of(w=np.float32([1, np.nan]))
  with pytest.raises(NonFiniteError, match="w: 1"):
    pj.compress(bad, pj.trim(density=0.5))
  for density in (0.0, 1.2):
    with pytest.raises(SelectionError, match=r"\(0, 1\]"):
      pj.compress(patch, pj.trim(density=density))
  assert pj.compress(pj.diff(zeros, zeros), pj.trim(density=0.5)).names == ()
