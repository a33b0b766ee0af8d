"""Random bits: a function of key, name, contributor and index, and random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.merging import masks
from patchjax.patches import placement

SHAPE = (64, 48)


def leaf(x, name="w"):
  return placement.leaf_of(x, identity=placement.identity_of(name))


def bits(key, name="w", contributor=0, rng="hash", shape=SHAPE):
  x = np.zeros(shape, np.float32)
  return np.asarray(
    masks.uniform_bits(key, leaf(x, name), contributor, rng=rng)
  )


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize("rng", ["hash", "threefry"])
def test_bits_do_not_depend_on_the_mesh(mesh, rng, request):
  expected = bits(7, rng=rng)
  mesh = request.getfixturevalue(mesh)
  for spec in (jax.P("x", "y"), jax.P(None, ("x", "y")), jax.P("y", None)):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    x = jax.device_put(np.zeros(SHAPE, np.float32), sharding)

    def draw(x):
      drawn = masks.uniform_bits(jax.random.key(7), leaf(x), rng=rng)
      return drawn ^ jax.lax.bitcast_convert_type(x, jnp.uint32)

    assert (np.asarray(jax.jit(draw)(x)) == expected).all()


def test_each_of_what_decides_counts():
  draws = [
    bits(0),
    bits(1),
    bits(1 << 31),
    bits(0, name="v"),
    bits(0, contributor=1),
    bits(0, rng="threefry"),
    bits(jax.random.key(0, impl="rbg")),
  ]
  for i, one in enumerate(draws):
    for other in draws[i + 1 :]:
      assert (one == other).mean() < 1e-2
  assert (bits(0) == bits(jax.random.key(0))).all()
  assert (bits(0) == bits(jax.random.key_data(jax.random.key(0)))).all()
  # Rows of the same leaf are numbered on.
  assert (bits(0, shape=(64 * 48,)) == bits(0).ravel()).all()


def test_threefry_is_that_of_jax():
  key = jax.random.key(3)
  words = placement.identity_of("w")
  for word in (words[0], words[1], np.uint32(2)):
    key = jax.random.fold_in(key, word)
  expected = jax.random.bits(key, SHAPE, jnp.uint32)
  found = bits(3, contributor=2, rng="threefry")
  assert (found == np.asarray(expected)).all()


@pytest.mark.parametrize("rng", ["hash", "threefry"])
def test_bits_are_random(rng):
  drawn = bits(11, rng=rng, shape=(1 << 16,))
  count = drawn.size

  def z(mean, p):
    return (mean - p) * np.sqrt(count / (p * (1 - p)))

  # Every bit is as often set as not, and next to independent of its fellows
  # at some distance.
  for bit in range(32):
    assert abs(z(((drawn >> bit) & 1).mean(), 0.5)) < 4.5
  kept = drawn < np.uint32(0.1 * 2**32)
  assert abs(z(kept.mean(), 0.1)) < 4
  for lag in (1, 2, 32, 4096):
    both = kept & np.roll(kept, lag)
    assert abs(z(both.mean(), 0.01)) < 4.5
  for other in (
    bits(11, "v", 0, rng, (count,)),
    bits(11, "w", 1, rng, (count,)),
  ):
    both = kept & (other < np.uint32(0.1 * 2**32))
    assert abs(z(both.mean(), 0.01)) < 4.5
  bins = np.bincount(drawn >> 24, minlength=256)
  assert abs(((bins - count / 256) ** 2 / (count / 256)).sum() - 255) < 100


def test_contributors_leaves_and_keys_do_not_know_of_each_other():
  count = 1 << 14
  draws = [bits(k, shape=(count,)) for k in range(8)]
  draws += [bits(3, name, shape=(count,)) for name in ("v", "a/b", "a/c")]
  draws += [bits(3, contributor=i, shape=(count,)) for i in range(1, 12)]
  for share in (0.5, 0.05):
    kept = np.float64([one < np.uint32(share * 2**32) for one in draws])
    kept = (kept - share) / np.sqrt(share * (1 - share))
    z = (kept @ kept.T / np.sqrt(count))[np.triu_indices(len(draws), 1)]
    assert np.abs(z).max() < 4.5 and 0.8 < z.std() < 1.2


@pytest.mark.parametrize("share", [0.0, 1e-7, 0.1, 0.3, 1 - 2**-24, 1.0, 2.0])
def test_below_is_the_comparison_of_floats(share):
  drawn = jnp.uint32([0, 255, 256, 2**32 - 257, 2**32 - 256, 2**32 - 1])
  near = jnp.uint32(np.clip(share, 0, 1) * (2**32 - 1)) + jnp.uint32(
    np.arange(-600, 600, 100).astype(np.uint32)
  )
  drawn = jnp.concatenate([drawn, near])
  wanted = masks.uniform(drawn) < jnp.float32(share)
  assert (masks.below(drawn, jnp.float32(share)) == wanted).all()


def test_masks_keep_what_they_should():
  assert bool(masks.keep_mask(0, "w", SHAPE, 1.0).all())
  assert not bool(masks.keep_mask(0, "w", SHAPE, 0.0).any())
  half = masks.keep_mask(0, "w", SHAPE, 0.5)
  # A higher density keeps what a lower one does, and more.
  assert not bool((half & ~masks.keep_mask(0, "w", SHAPE, 0.6)).any())
  mixed = np.where(np.arange(48) < 24, 0.0, 1.0) + np.zeros(SHAPE)
  kept = np.asarray(masks.keep_mask(0, "w", SHAPE, np.float32(mixed)))
  assert (kept == (mixed == 1)).all()


def test_rows_of_leaves_beyond_32_bits_differ():
  big = placement.Leaf(
    identity=placement.identity_of("w"),
    after=np.uint32(0),
    shape=(1 << 20, 1 << 12),
  )
  drawn = jax.eval_shape(lambda: masks.uniform_bits(0, big))
  assert drawn.shape == big.shape and drawn.dtype == jnp.uint32

  class Part(placement.Leaf):
    """Rows 5 and 6 of the large leaf."""

    def index(self):
      column = jnp.broadcast_to(jnp.arange(4096, dtype=jnp.uint32), (2, 4096))
      row = jnp.broadcast_to(jnp.uint32([[5], [6]]), (2, 4096))
      return row, column

  for rng in ("hash", "threefry"):
    part = Part(big.identity, big.after, big.shape)
    five, six = np.asarray(masks.uniform_bits(0, part, rng=rng))
    assert (five == six).mean() < 1e-2


def test_bad_keys_and_generators():
  with pytest.raises(ValueError, match="'hash' or 'threefry'"):
    masks.keep_mask(0, "w", (2,), 0.5, rng="rbg")
  with pytest.raises(TypeError, match="a seed or a key"):
    masks.as_key("0")


def test_keys_are_mapped_over():
  keys = jax.random.split(jax.random.key(0), 3)
  many = jax.vmap(lambda key: masks.keep_mask(key, "w", SHAPE, 0.5))(keys)
  for key, one in zip(keys, many):
    assert (one == masks.keep_mask(key, "w", SHAPE, 0.5)).all()
