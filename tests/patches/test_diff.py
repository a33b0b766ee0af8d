"""diff: exact for every dtype, arithmetic where numbers are wanted."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

import patchjax as pj
from patchjax.trees.dtypes import KINDS, from_words, to_words
from patchjax.trees.errors import MismatchError, SelectionError, StructureError


def _bits(seed, kind, shape=(5, 6)):
  rng = np.random.default_rng(seed)
  words = rng.integers(0, 1 << kind.bits, (*shape, kind.words), dtype=np.uint64)
  words = words.astype(kind.word)
  return from_words(words if kind.words == 2 else words[..., 0], kind.name)


def _held_under_jit(name):
  # Under jit, numpy arrays of 64 bits are narrowed before patchjax sees them.
  return KINDS[name].dtype.itemsize // KINDS[name].words <= 4


@pytest.mark.parametrize(
  "name, jit",
  [(name, False) for name in KINDS]
  + [(name, True) for name in KINDS if _held_under_jit(name)],
)
def test_exact_for_every_dtype(name, jit):
  """All bit patterns: NaN payloads, -0.0, denormals among them."""
  kind = KINDS[name]
  a, b = {"w": _bits(0, kind)}, {"w": _bits(1, kind)}
  if jit:
    a, b = (jax.tree.map(jnp.asarray, x) for x in (a, b))
  diff = jax.jit(lambda a, b: pj.diff(a, b, exact=True)) if jit else None
  patch = diff(a, b) if diff else pj.diff(a, b, exact=True)
  found = (jax.jit(pj.apply) if jit else pj.apply)(a, patch)
  assert found["w"].dtype == kind.dtype
  np.testing.assert_array_equal(
    to_words(np.asarray(found["w"])), to_words(np.asarray(b["w"]))
  )
  back = (jax.jit(pj.revert) if jit else pj.revert)(found, patch)
  np.testing.assert_array_equal(
    to_words(np.asarray(back["w"])), to_words(np.asarray(a["w"]))
  )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_exact_for_keys(impl):
  a = {"rng": jax.random.split(jax.random.key(0, impl=impl), 3)}
  b = {"rng": jax.random.split(jax.random.key(1, impl=impl), 3)}
  for patch in (pj.diff(a, b, exact=True), pj.diff(a, b)):
    assert (pj.apply(a, patch)["rng"] == b["rng"]).all()
    assert (pj.revert(b, patch)["rng"] == a["rng"]).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_shardings_are_kept(dtype, kind, request):
  mesh = request.getfixturevalue(f"mesh_{kind}")
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
  rng = np.random.default_rng(0)
  a, b = (
    {"w": jax.device_put(rng.standard_normal((8, 6)).astype(dtype), sharding)}
    for _ in range(2)
  )
  for exact in (False, True):
    for diff in (pj.diff, jax.jit(pj.diff, static_argnames="exact")):
      patch = diff(a, b, exact=exact)
      values = patch.deltas["w"].code.values
      assert values.sharding.is_equivalent_to(sharding, 2)
      found = pj.apply(a, patch)["w"]
      assert found.sharding.is_equivalent_to(sharding, 2)
      if exact:
        assert (np.asarray(found) == np.asarray(b["w"])).all()


def test_arithmetic_rounds_as_documented():
  rng = np.random.default_rng(0)
  a = rng.standard_normal(10_000).astype("f4")
  b = (a + rng.standard_normal(10_000)).astype("f4")
  patch = pj.diff({"w": a}, {"w": b})
  values = np.asarray(patch.deltas["w"].code.values)
  np.testing.assert_array_equal(values, b - a)
  off = np.asarray(pj.apply({"w": a}, patch)["w"]) != b
  assert 0.05 < off.mean() < 0.3


def test_half_precision_leaves_have_float32_deltas():
  a = {"w": np.float32([1, 2]).astype(ml_dtypes.bfloat16)}
  patch = pj.diff(a, a)
  assert patch.deltas["w"].code.values.dtype == np.float32


def test_leaves_that_are_no_numbers_change_exactly_or_not_at_all():
  a = {"w": np.zeros(2, "f4"), "n": np.int32([1]), "flag": np.bool_([True])}
  b = a | {"n": np.int32([-7])}
  patch = pj.diff(a, b)
  assert {n: d.law for n, d in patch.deltas.items()} == {
    "w": "add",
    "n": "bits",
  }
  assert int(pj.apply(a, patch)["n"][0]) == -7


def test_only_selects():
  a = {"x": {"kernel": np.zeros(2, "f4"), "bias": np.zeros(2, "f4")}}
  b = jax.tree.map(lambda x: x + 1, a)
  patch = pj.diff(a, b, only=r".*kernel")
  assert patch.names == ("x/kernel",)
  assert np.asarray(pj.apply(a, patch)["x"]["bias"]).sum() == 0
  with pytest.raises(SelectionError):
    pj.diff(a, b, only=r".*kernle")


def test_misfits_are_refused():
  a = {"w": np.zeros((2, 3), "f4")}
  with pytest.raises(MismatchError, match="another shape"):
    pj.diff(a, {"w": np.zeros((3, 2), "f4")})
  with pytest.raises(MismatchError, match=r"(?s) \+ v: .*structural|v"):
    pj.diff(a, a | {"v": a["w"]})
  with pytest.raises(StructureError, match="no arrays"):
    pj.diff({}, {})


def test_passengers_must_agree():
  one = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
  two = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(1))
  patch = pj.diff(one, two, exact=True)
  found = pj.apply(one, patch)
  assert found.activation is one.activation
  assert (found.layers[0].weight == two.layers[0].weight).all()
  with pytest.raises(MismatchError, match="activation"):
    pj.diff(one, eqx.nn.MLP(2, 2, 4, 1, jax.nn.gelu, key=jax.random.key(1)))


# Few shapes: every new one compiles.
SHAPES = st.shared(st.sampled_from([(), (0, 2), (3, 5)]), key="shape")


@hypothesis.given(hnp.arrays(np.uint32, SHAPES), hnp.arrays(np.uint32, SHAPES))
def test_exact_diff_is_exact_for_any_floats(x, y):
  a, b = {"w": x.view(np.float32)}, {"w": y.view(np.float32)}
  patch = pj.diff(a, b, exact=True)
  found = np.asarray(pj.apply(a, patch)["w"])
  np.testing.assert_array_equal(found.view(np.uint32), y)
  back = np.asarray(pj.revert(b, patch)["w"])
  np.testing.assert_array_equal(back.view(np.uint32), x)


def test_containers_without_leaves_stay():
  base = {"w": np.ones(2, np.float32), "e": {}, "n": None, "l": [None, ()]}
  base["t"] = [None, np.zeros(2, np.float32)]
  tuned = {**base, "v": np.ones(3, np.float32)}
  patch = pj.diff(base, tuned, structural=True)
  found = pj.apply(base, patch)
  assert jax.tree.structure(found) == jax.tree.structure(tuned)
  back = pj.revert(found, patch)
  assert jax.tree.structure(back) == jax.tree.structure(base)
