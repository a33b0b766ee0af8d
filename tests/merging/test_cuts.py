"""Cuts by rank: any keys, any number of ranks, exact on every placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import (
  Step,
  Transform,
  narrowing,
  ordering,
  register_step,
  selection,
)
from patchjax.patches.counting import LIMB, limbs
from patchjax.patches.rank_cuts import cuts
from tests.merging.models import floats, models, put, same_bits


def _keys(leaf, deltas, state, *, scope):
  del leaf, state, scope
  (delta,) = deltas
  return (ordering.ordered_bits(delta),)


def _ranks(state, shapes, k, *, scope):
  del state, k, scope
  size = sum(int(np.prod(shape)) for shape in shapes)
  return limbs(1 + size // 10), limbs(1 + size // 2)


def _between(leaf, deltas, base, state, searches, *, scope):
  del leaf, base, state, scope
  high, low = (
    ordering.value_of(selection.cut_key(search)) for search in searches
  )
  return tuple(jnp.clip(delta, low, high) for delta in deltas)


CLIP = register_step(
  Step(
    "test_clip",
    _between,
    scope=lambda *, scope: scope,
    **cuts(_keys, _ranks, each=2),
  )
)


def clipped(leaves, scope):
  """The same by numpy's sort."""

  def cut(x, of):
    ordered = np.sort(of)[::-1]
    return np.clip(x, ordered[len(of) // 2], ordered[len(of) // 10])

  whole = np.concatenate([x.ravel() for x in leaves])
  return [cut(x, whole if scope == "tree" else x.ravel()) for x in leaves]


@pytest.mark.parametrize("place", ["single", "mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_signed_cuts_of_two_ranks(scope, place, request):
  base, (other,) = models(1)
  base = jax.tree.map(np.zeros_like, base) | {"step": base["step"]}
  expected = clipped(floats(other), scope)
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, other = put(base, mesh), put(other, mesh)
  method = Transform.of(CLIP, {}, scope=scope)
  eager = pj.merge(base, [other], method)
  assert same_bits(floats(eager), expected)
  if place != "mesh_auto" or scope == "tree":
    assert same_bits(jax.jit(pj.merge)(base, [other], method), eager)


def test_keys_keep_the_order_of_all_floats():
  x = np.float32(
    [-np.inf, -3e38, -2, -1e-40, -0.0, 0.0, 1e-45, 1.5, 3e38, np.inf, np.nan]
  )
  keys = np.asarray(ordering.ordered_bits(x))
  assert (np.diff(keys.astype(np.int64)) > 0).all()
  np.testing.assert_array_equal(ordering.value_of(keys), x)
  magnitudes = ordering.magnitude_keys(x)
  np.testing.assert_array_equal(ordering.magnitude_of(magnitudes), np.abs(x))


@pytest.mark.parametrize("low", [0, 1 << 31, 0xFFFFFF00])
def test_every_word_of_32_bits_is_found(low):
  rng = np.random.default_rng(0)
  keys = (low + rng.integers(0, 256, 64)).astype(np.uint32)
  keys[:2] = 0, 0xFFFFFFFF
  leaf = pj.patches.placement.leaf_of(keys)
  settings = {"bits": 32, "early": False}

  @jax.jit
  def find(keys, k):
    return jax.lax.while_loop(
      lambda state: ~state.done,
      lambda state: narrowing.narrow(
        narrowing.count_at_least([keys], leaf, selection.stacked([state]))[0],
        state,
      ),
      jax.tree.map(jnp.asarray, selection.search(k, [keys.shape], **settings)),
    )

  ordered = np.sort(keys)[::-1]
  for k in (1, 2, 33, 63, 64):
    state = find(keys, limbs(k))
    assert int(selection.cut_key(state)) == ordered[k - 1]
    kept = selection.keep_keys(keys, leaf, state)
    assert (np.asarray(kept) == (keys >= ordered[k - 1])).all()


def test_counts_beyond_32_bits():
  # Each of a thousand entries stands for sixteen million.
  many = 1 << 24
  x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
  leaf = pj.patches.placement.leaf_of(x)
  k = 300 * many
  narrow = jax.jit(narrowing.narrow)
  keys = ordering.magnitude_keys(x)
  state = selection.search(limbs(k), [(1000, many)], early=False)
  assert float(state.over) == 700 * many
  for _ in range(24):
    (counts,) = np.asarray(
      narrowing.count_at_least([keys], leaf, selection.stacked([state]))
    )
    total = ((counts[0].astype(np.int64) << LIMB) + counts[1]) * many
    assert total.max() < 1 << 42
    # Summed over leaves and shards, limbs are not carried.
    state = narrow(np.stack([limbs(int(n)) for n in total], 1), state)
  assert bool(state.done)
  found = ordering.magnitude_of(selection.cut_key(state))
  assert float(found) == np.sort(np.abs(x))[::-1][299]


def test_shapes_beyond_32_bits_trace():
  shape = jax.ShapeDtypeStruct((80, 8192, 57344), jnp.bfloat16)
  out = jax.eval_shape(
    pj.merge, {"w": shape}, [{"w": shape}], pj.merging.ties(density=0.2)
  )
  assert out["w"].shape == shape.shape
  # Ranks of so many entries are exact integers.
  rank = pj.patches.shares.entries_of(jnp.float32(0.2), 80 * 8192 * 57344)
  assert (int(rank[0]) << LIMB) + int(rank[1]) == 80 * 8192 * 57344 // 5


def test_steps_tell_their_keys():
  from patchjax.patches.trimming import TRIM

  assert TRIM.keys and TRIM.ranks and TRIM.exact and TRIM.key_bits == 31
  options = dict(pj.trim(density=0.5).stages[0][1])
  (key,) = TRIM.keys(None, (jnp.float32([-2.0, 1.0]),), {}, **options)
  assert ordering.magnitude_of(key).tolist() == [2.0, 1.0]
  assert not TRIM.exact(**options)
