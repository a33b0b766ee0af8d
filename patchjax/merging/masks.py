"""Random bits for masks: the same however a model is cut, ordered or run.

A generator that hands out numbers in sequence makes a merge depend on the
order of the leaves and on the mesh. Here every entry's bits are a function of
the key, the leaf's name, the contributor and the entry's global index alone.

By default that function is a hash of a counter: two rounds of a multiply and
xor-shift mixer, which fuses into whatever uses the bits and costs a small
part of the memory traffic. The first round does not know the contributor, so
that a program that draws for several makes it once. `rng="threefry"` is JAX's
own generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), also by counter; about thirty times as much work on a CPU.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchjax.patches import placement

Array = Any
Rng = Literal["hash", "threefry"]

_RNGS = ("hash", "threefry")


def as_key(key: Any) -> Array:
  """Returns a PRNG key of the new style.

  Args:
    key: a seed, a key (`jax.random.key`), or the words of one
      (`jax.random.PRNGKey`).

  Raises:
    TypeError: if it is none of them.
  """
  if isinstance(key, int | np.integer):
    return jax.random.key(int(key))
  if hasattr(key, "dtype"):
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      return key
    if key.dtype == jnp.uint32 and key.shape[-1:] == (2,):
      return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
  raise TypeError(
    f"expected a seed or a key such as jax.random.key(0), got {key!r}"
  )


def check_rng(rng: str) -> None:
  """Raises ValueError unless there is such a generator."""
  if rng not in _RNGS:
    raise ValueError(f"rng must be 'hash' or 'threefry', got {rng!r}")


def uniform_bits(
  key: Any,
  leaf: placement.Leaf,
  contributor: int | Array = 0,
  *,
  rng: Rng = "hash",
) -> Array:
  """Returns 32 random bits for each entry of a leaf.

  Args:
    key: see `as_key`; traced.
    leaf: where the leaf is: of its name, its shape, and of this shard of it.
    contributor: number of the contributor.
    rng: "hash" or "threefry"; the latter gives the bits of
      `jax.random.bits` for the key folded with the name and contributor.

  Returns:
    `uint32` of the shape that the leaf's arrays have here.
  """
  check_rng(rng)
  key = as_key(key)
  number = jnp.asarray(contributor).astype(jnp.uint32)
  row, column = leaf.index()
  if rng == "threefry":
    for word in (leaf.identity[0], leaf.identity[1], number):
      key = jax.random.fold_in(key, word)
    high, low = _threefry(jax.random.key_data(key), row, column)
    return high ^ low
  first, second = jnp.uint32(0x9E3779B9), jnp.uint32(0x85EBCA6B)
  words = jax.random.key_data(key).reshape(-1)
  for word in (*words, leaf.identity[0], leaf.identity[1]):
    word = jnp.asarray(word)
    first = _mixed(first ^ word)
    second = _seeded(second, word)
  second = _seeded(second, number)
  if leaf.size >= placement.ROW_LIMIT:
    first = _mixed(row + first)
  return _mixed(_mixed(column ^ first) + second)


def uniform(bits: Array) -> Array:
  """Returns float32 in [0, 1) of random bits: multiples of `2**-24`.

  `uniform(bits) < p` has the probability p up to `2**-24`, and holds always
  for p = 1, never for p = 0.

  Args:
    bits: from `uniform_bits`.
  """
  # By way of signed integers: a CPU converts no others in vectors.
  whole = (bits >> jnp.uint32(8)).astype(jnp.int32)
  return whole.astype(jnp.float32) * jnp.float32(2.0**-24)


def below(bits: Array, share: Array) -> Array:
  """Returns `uniform(bits) < share`, with one comparison of integers an entry.

  Args:
    bits: from `uniform_bits`.
    share: float32; one number, or of the shape of the bits.
  """
  # 24 bits are exact in float32, and so is a share times a power of two.
  least = jnp.ceil(share * jnp.float32(2.0**24))
  least = jnp.clip(least, jnp.float32(0), jnp.float32(2.0**24))
  return (bits >> jnp.uint32(8)) < least.astype(jnp.uint32)


def keep_mask(
  key: Any,
  name: str,
  shape: tuple[int, ...],
  density: Any,
  contributor: int = 0,
  *,
  rng: Rng = "hash",
) -> Array:
  """Returns the mask of the entries that a random method keeps.

  The mask that `dare_linear` and its relatives use for this key, leaf and
  contributor.

  Args:
    key: see `as_key`.
    name: text name of the leaf.
    shape: its global shape.
    density: probability of being kept; a number, or one for each entry.
    contributor: number of the contributor.
    rng: "hash" or "threefry".

  Returns:
    a boolean array.

  Raises:
    ValueError: if there is no such generator.

  Example:
    >>> mask = keep_mask(0, "dense/kernel", (100, 100), 0.25)
    >>> bool(abs(mask.mean() - 0.25) < 0.02)
    True
  """
  leaf = placement.Leaf(
    identity=placement.identity_of(name),
    after=np.uint32(0),
    shape=tuple(shape),
    single=True,
  )
  bits = uniform_bits(key, leaf, contributor, rng=rng)
  return below(bits, jnp.asarray(density, jnp.float32))


def _seeded(seed: Array, word: Array) -> Array:
  return _mixed(seed + _mixed(word ^ jnp.uint32(0xC2B2AE35)))


def _mixed(x: Array) -> Array:
  """Returns 32 bits mixed one to one.

  The constants are those that C. Wellons found to have the least bias
  (https://github.com/skeeto/hash-prospector).
  """
  x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x21F0AAAD)
  x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0xD35A2D97)
  return x ^ (x >> jnp.uint32(15))


def _threefry(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
  """Returns Threefry-2x32-20 of counters, entry by entry.

  Written out, since JAX's own takes whole arrays, and lays their halves
  beside each other.
  """
  extra = key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
  words = (key[0], key[1], extra)
  turns = ((13, 15, 26, 6), (17, 29, 16, 24))
  x, y = high + words[0], low + words[1]
  for block in range(5):
    for turn in turns[block % 2]:
      x = x + y
      y = lax.shift_left(y, jnp.full_like(y, turn)) | lax.shift_right_logical(
        y, jnp.full_like(y, 32 - turn)
      )
      y = x ^ y
    x = x + words[(block + 1) % 3]
    y = y + words[(block + 2) % 3] + jnp.uint32(block + 1)
  return x, y
