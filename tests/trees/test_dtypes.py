"""The table of dtypes: every bit of every dtype that jax has comes back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from patchjax.trees import dtypes
from patchjax.trees.errors import DtypeError


def every_bit_pattern(name, *, n=64):
  kind = dtypes.KINDS[name]
  rng = np.random.default_rng(0)
  shape = (n, 2) if kind.words == 2 else (n,)
  top = (1 << kind.bits) - 1
  words = rng.integers(0, top, shape, dtype=np.uint64, endpoint=True)
  return words.astype(kind.word)


@pytest.mark.parametrize("name", dtypes.KINDS)
def test_words_come_back_bit_for_bit(name):
  words = every_bit_pattern(name)
  values = dtypes.from_words(words, name)
  assert dtypes.dtype_name(values) == name
  np.testing.assert_array_equal(dtypes.to_words(values), words)


@pytest.mark.parametrize(
  "name",
  # With x64 off, jax holds no 64-bit numbers: those stay in numpy.
  sorted(dtypes.KINDS.keys() - {"int64", "uint64", "float64", "complex128"}),
)
def test_device_arrays_give_the_same_words(name):
  words = every_bit_pattern(name)
  array = jnp.asarray(dtypes.from_words(words, name))
  got, got_name = dtypes.host(array)
  assert got_name == name
  np.testing.assert_array_equal(got, words)


def test_the_table_has_every_dtype_of_jax():
  known = {
    np.dtype(value).name
    for value in vars(ml_dtypes).values()
    if isinstance(value, type) and issubclass(value, np.generic)
  }
  # jax has names for these, and cannot put them on a device (0.10.2).
  names_only = {"int1", "uint1", "float6_e2m3fn", "float6_e3m2fn"}
  jax_has = {name for name in known if hasattr(jnp, name)} - names_only
  assert jax_has and jax_has <= set(dtypes.KINDS)


@pytest.mark.parametrize(
  "x",
  [
    np.float32([np.nan, -np.nan, -0.0, 1e-45, np.inf]),
    np.arange(12, dtype=np.int16).reshape(3, 4).T,
    np.arange(3, dtype=">f4"),
    np.zeros((0, 3), np.float16),
    np.asfortranarray(np.ones((2, 3), np.complex64)),
  ],
  ids=["special", "transposed", "big endian", "empty", "complex"],
)
def test_layouts_and_special_values(x):
  words, name = dtypes.host(x)
  back = dtypes.from_words(words, name)
  assert back.shape == x.shape
  native = x.astype(x.dtype.newbyteorder("="))
  assert back.tobytes() == np.ascontiguousarray(native).tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys_come_back_with_their_implementation(impl):
  keys = jax.random.split(jax.random.key(3, impl=impl), 4)
  words, name = dtypes.host(keys)
  back = dtypes.device(words, name)
  assert back.dtype == keys.dtype and dtypes.dtype_name(back) == name
  assert (back == keys).all()


@pytest.mark.parametrize("x", ["text", None, object(), np.array(["a"])])
def test_what_is_no_array_is_refused(x):
  with pytest.raises(DtypeError, match="leave it out of the tree"):
    dtypes.dtype_name(x)
