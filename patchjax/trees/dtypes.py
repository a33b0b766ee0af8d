"""The dtypes patchjax holds bit for bit, and their bits as unsigned words.

One table names every dtype that JAX can hold. `key<impl>` stands for the
extended dtype of typed PRNG keys, held as its key data. The *words* of an
array are its bit patterns as unsigned integers: a complex number is two words
on a last axis, numbers of less than a byte take a byte each.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import ml_dtypes
import numpy as np

from patchjax.trees.errors import DtypeError


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one dtype is held.

  Attributes:
    name: the dtype's name in JAX.
    dtype: the numpy dtype of its values.
    word: the unsigned numpy dtype of one word.
    bits: bits that count in a word (fewer than the word has for int4).
    words: words an element (2 for complex numbers).
  """

  name: str
  dtype: np.dtype
  word: np.dtype
  bits: int
  words: int = 1

  @property
  def floating(self) -> bool:
    """Whether the values are real or complex floating point numbers."""
    return self.dtype.kind in "fc" or self.name.startswith(("float", "bfloat"))


def _kinds() -> dict[str, Kind]:
  small = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
  extra = [
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    *small,
  ]
  sizes = (8, 16, 32, 64)
  plain = ["bool", "float16", "float32", "float64"]
  plain += [f"{sign}int{size}" for sign in ("", "u") for size in sizes]
  kinds = {}
  for name in plain + extra:
    dtype = np.dtype(getattr(ml_dtypes, name) if name in extra else name)
    word = np.dtype(f"uint{8 * dtype.itemsize}")
    bits = small.get(name, 1 if name == "bool" else 8 * dtype.itemsize)
    kinds[name] = Kind(name, dtype, word, bits)
  for name, word in (("complex64", "uint32"), ("complex128", "uint64")):
    kinds[name] = Kind(
      name, np.dtype(name), np.dtype(word), 8 * np.dtype(word).itemsize, 2
    )
  return kinds


KINDS: dict[str, Kind] = _kinds()
"""Every plain dtype by name; PRNG keys are the only other kind of leaf."""

_KEY = re.compile(r"key<([a-z0-9_]+)>")
_IMPLS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
_KEY_WORDS = {"fry": 2, "rbg": 4, "urbg": 4}


def is_key(x: Any) -> bool:
  """Returns whether `x` is an array of typed PRNG keys.

  Args:
    x: an array, tracer or `ShapeDtypeStruct`.

  Example:
    >>> is_key(np.zeros(3))
    False
  """
  dtype = getattr(x, "dtype", None)
  if dtype is None or isinstance(dtype, np.dtype):
    return False
  import jax

  return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


def dtype_name(x: Any) -> str:
  """Returns the name of the dtype of an array or of a Python number.

  Args:
    x: an array, tracer, `ShapeDtypeStruct`, Python or numpy scalar.

  Raises:
    DtypeError: if `x` is no array, or of a dtype that JAX cannot hold.

  Example:
    >>> dtype_name(np.zeros(2, np.float16)), dtype_name(True)
    ('float16', 'bool')
  """
  if is_key(x):
    name = str(x.dtype)
    if _KEY.fullmatch(name) and name[4:-1] in _IMPLS:
      return name
    raise DtypeError(
      f"PRNG keys of a custom implementation ({name}) cannot be stored; "
      f"found {name}, expected one of key<{'>, key<'.join(_IMPLS)}>"
    )
  if not hasattr(x, "dtype"):
    x = np.asarray(x)
  name = _name_of(x.dtype)
  if name not in KINDS:
    raise DtypeError(
      f"expected an array of a dtype that JAX holds, found {name} "
      f"({type(x).__name__}); convert the leaf, or leave it out of the tree"
    )
  return name


@functools.cache
def _name_of(dtype: Any) -> str:
  # numpy works out a name anew each time, for longer than all that is asked
  # of a small leaf beside.
  return np.dtype(dtype).name


def to_words(x: np.ndarray) -> np.ndarray:
  """Returns the bit patterns of a host array, without a copy where possible.

  Args:
    x: an array of any dtype in `KINDS`.

  Returns:
    Unsigned integers of shape `x.shape`, or `[*x.shape, 2]` for complex.

  Example:
    >>> to_words(np.float32([1.0, -0.0])).tolist()
    [1065353216, 2147483648]
  """
  kind = KINDS[dtype_name(x)]
  x = np.asarray(x)
  if x.dtype.byteorder == ">" or not x.flags.c_contiguous:
    x = np.ascontiguousarray(x, kind.dtype).reshape(x.shape)
  if kind.words == 2:
    return x[..., None].view(kind.word)
  words = x.view(kind.word)
  # The unused bits of a small number are no part of its value.
  full = kind.bits == 8 * kind.word.itemsize or kind.name == "bool"
  return words if full else words & kind.word.type((1 << kind.bits) - 1)


def from_words(words: np.ndarray, dtype: str) -> np.ndarray:
  """Returns the host array with these bit patterns; inverse of `to_words`.

  Args:
    words: unsigned integers as `to_words` gives them.
    dtype: a name in `KINDS`.

  Example:
    >>> from_words(np.uint32([1065353216]), "float32").tolist()
    [1.0]
  """
  kind = KINDS[dtype]
  words = np.ascontiguousarray(words).reshape(words.shape)
  if kind.words == 2:
    return words.view(kind.dtype)[..., 0]
  return words.view(kind.dtype)


def host(x: Any) -> tuple[np.ndarray, str]:
  """Returns the bits of any leaf on the host, and the name of its dtype.

  Args:
    x: a fully addressable `jax.Array` (PRNG keys included), numpy array or
      scalar. A jax array on a CPU device is not copied.

  Returns:
    `(words, dtype)`; the words of PRNG keys are their key data.

  Raises:
    DtypeError: if `x` is no array of a known dtype.

  Example:
    >>> import jax
    >>> words, dtype = host(jax.random.key(7))
    >>> words.tolist(), dtype
    ([0, 7], 'key<fry>')
  """
  dtype = dtype_name(x)
  if is_key(x):
    import jax

    return np.asarray(jax.random.key_data(x)), dtype
  return to_words(np.asarray(x)), dtype


def device(words: np.ndarray, dtype: str) -> Any:
  """Returns the value that `host` took apart, as users hold it.

  Args:
    words: the bit patterns.
    dtype: the name of the dtype, `key<impl>` included.

  Returns:
    A numpy array; typed PRNG keys as a `jax.Array` of keys.

  Example:
    >>> import jax
    >>> device(np.uint32([0, 7]), "key<fry>") == jax.random.key(7)
    Array(True, dtype=bool)
  """
  if match := _KEY.fullmatch(dtype):
    import jax

    data = jax.numpy.asarray(words)
    return jax.random.wrap_key_data(data, impl=_IMPLS[match[1]])
  return from_words(words, dtype)


def is_wide(x: Any) -> bool:
  """Returns whether `x` is of 64 bits a number and JAX would narrow it here.

  Args:
    x: an array.

  Example:
    >>> is_wide(np.zeros(2, np.float32))
    False
  """
  import jax

  if is_key(x):
    return False
  dtype = np.dtype(x.dtype)
  return jax.dtypes.canonicalize_dtype(dtype) != dtype


def is_array(x: Any) -> bool:
  """Returns whether a leaf is an array (concrete, abstract or traced).

  Python numbers, strings and functions, which some containers hold among
  their leaves, are not: they pass through every transform untouched.

  Args:
    x: a leaf.

  Example:
    >>> is_array(np.zeros(2)), is_array(0.5)
    (True, False)
  """
  return hasattr(x, "dtype") and hasattr(x, "shape")


def itemsize(dtype: str) -> int:
  """Returns the bytes of the words of one element.

  Args:
    dtype: a name of the table, `key<impl>` included.

  Example:
    >>> itemsize("complex64"), itemsize("key<fry>"), itemsize("int4")
    (8, 8, 1)
  """
  if match := _KEY.fullmatch(dtype):
    return 4 * _KEY_WORDS[match[1]]
  return KINDS[dtype].word.itemsize * KINDS[dtype].words


def is_number(x: Any) -> bool:
  """Returns whether a leaf is a Python number: data, though no array.

  Args:
    x: a leaf.

  Example:
    >>> is_number(0.5), is_number(np.float32(0.5)), is_number("0.5")
    (True, False, False)
  """
  return type(x) in (bool, int, float, complex)


def widened(dtype: Any) -> np.dtype:
  """Returns the dtype in which arithmetic on floating point numbers is done.

  Args:
    dtype: a floating point or complex dtype.

  Returns:
    float32 for up to 32 bits, else float64; complex dtypes stay.

  Example:
    >>> widened("float16").name, widened("complex64").name
    ('float32', 'complex64')
  """
  dtype = np.dtype(dtype)
  if dtype.kind == "c" or dtype.itemsize > 4:
    return dtype
  return np.dtype("float32")


def is_traced(x: Any) -> bool:
  """Returns whether a leaf is the tracer of an array: its numbers are unknown.

  Args:
    x: a leaf.

  Example:
    >>> is_traced(np.zeros(2))
    False
  """
  import jax.core

  return isinstance(x, jax.core.Tracer)
