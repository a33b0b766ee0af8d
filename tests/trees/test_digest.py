"""Digests depend on names, dtypes, shapes and bits, and on nothing else."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax import trees
from patchjax.trees import tiles
from patchjax.trees.errors import StructureError
from tests import containers


def test_the_digest_is_what_the_format_says():
  x = np.arange(5, dtype=np.float32)
  block = hashlib.sha256(b"\x00" + x.tobytes()).digest()
  head = b'{"dtype":"float32","shape":[5]}'
  want = hashlib.sha256(b"\x02" + block + head).hexdigest()
  assert trees.leaf_digest(x) == want


def merkle(tiles, dtype, shape):
  """The root as the format spells it, written again."""
  level = [hashlib.sha256(b"\x00" + tile.tobytes()).digest() for tile in tiles]
  while len(level) > 1:
    level = [
      hashlib.sha256(b"\x01" + b"".join(level[i : i + 2])).digest()
      if len(level[i : i + 2]) == 2
      else level[i]
      for i in range(0, len(level), 2)
    ]
  head = json.dumps({"dtype": dtype, "shape": shape}, separators=(",", ":"))
  return hashlib.sha256(b"\x02" + level[0] + head.encode()).hexdigest()


def test_many_tiles_are_a_merkle_tree():
  square = np.arange(1 << 20, dtype=np.uint32).reshape(1024, 1024)
  quarters = [
    square[i : i + 512, j : j + 512] for i in (0, 512) for j in (0, 512)
  ]
  assert trees.leaf_digest(square) == merkle(quarters, "uint32", [1024, 1024])
  odd = np.arange((1 << 19) + 1, dtype=np.uint32)
  thirds = np.split(odd, [131073, 262146, 393219])
  assert trees.leaf_digest(odd) == merkle(thirds, "uint32", [len(odd)])
  line = np.arange(1 << 17, dtype=np.complex64)
  assert len(line.tobytes()) == 1 << 20
  assert trees.leaf_digest(line) == merkle([line], "complex64", [1 << 17])


@pytest.mark.parametrize(
  "shape, itemsize, counts",
  [
    ((), 4, ()),
    ((0, 5), 4, (0, 1)),
    ((1 << 18,), 4, (1,)),
    ((1 << 19,), 4, (2,)),
    ((768, 3072), 4, (2, 8)),
    ((3072, 768), 4, (8, 2)),
    ((50257, 768), 4, (32, 8)),
    ((30522, 384), 4, (16, 4)),
    ((4096, 32, 128), 2, (32, 1, 1)),
    ((1000003, 3), 4, (16, 1)),
    ((1, 1, 3 << 20), 1, (1, 1, 4)),
  ],
)
def test_the_grid_is_as_specified(shape, itemsize, counts):
  grid = tiles.grid(shape, itemsize)
  assert grid.counts == counts
  seen = np.zeros(shape, np.uint8)
  for number, region in enumerate(grid):
    assert tiles.size_of(region) * itemsize <= 1 << 20
    assert grid.cover(region) == grid.inside(region) == [number]
    assert grid.widened(region) == region
    seen[region] += 1
  assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(768, 3072), (30522, 384), (4096, 32, 128)])
def test_shards_by_powers_of_two_are_whole_tiles(shape):
  grid = tiles.grid(shape, 4)
  for axis, length in enumerate(shape):
    parts = 2
    while length % parts == 0 and parts <= grid.counts[axis]:
      edges = range(0, length + 1, length // parts)
      assert set(edges) <= set(grid.edges[axis])
      parts *= 2


def test_covers_of_regions():
  grid = tiles.grid((1024, 1024), 4)
  assert grid.cover((slice(500, 513), slice(3, 4))) == [0, 2]
  assert grid.inside((slice(0, 1024), slice(1, 1024))) == [1, 3]
  assert grid.cover((slice(7, 7), slice(0, 9))) == []
  region = (slice(500, 512), slice(600, 601))
  assert grid.widened(region) == (slice(0, 512), slice(512, 1024))
  assert tiles.grid((), 4).cover(()) == [0]


def test_dtype_shape_and_every_bit_count():
  x = np.zeros((2, 3), np.float32)
  others = [x.view(np.int32), x.reshape(3, 2), x.reshape(6), -x]
  digests = {trees.leaf_digest(y) for y in [x, *others]}
  assert len(digests) == 5


def test_sharding_does_not_count(mesh_explicit, mesh_auto):
  x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  want = trees.leaf_digest(x)
  for mesh in (mesh_explicit, mesh_auto):
    for spec in (P(), P("x"), P("x", "y"), P(None, "y"), P(("x", "y"))):
      y = jax.device_put(x, NamedSharding(mesh, spec))
      assert trees.leaf_digest(y) == want


@pytest.mark.parametrize("container", containers.SHARED)
def test_containers_do_not_count(container):
  tree = containers.SHARED[container]()
  assert trees.tree_id(tree) == trees.tree_id(containers.pure_dict())
  other = containers.SHARED[container](1.0)
  assert trees.tree_id(other) != trees.tree_id(tree)


def test_names_count_and_order_does_not():
  x, y = jnp.ones(2), jnp.zeros(2)
  assert trees.tree_id({"a": x, "b": y}) != trees.tree_id({"a": y, "b": x})
  assert trees.tree_id({"a": x, "b": y}) == trees.tree_id({"b": y, "a": x})
  assert trees.tree_id({"a.b": x}) != trees.tree_id({"a": {"b": x}})


def test_objects_are_named_by_their_bytes_and_shared():
  e = trees.Entry("00", "int8", (1,))
  root, objects = trees.tree_objects({"a/w": e, "b/w": e, "c": e})
  assert len(objects) == 2 and root in objects
  for name, data in objects.items():
    assert hashlib.sha256(data).hexdigest() == name
    assert trees.canonical_json(json.loads(data)) == data


def test_a_leaf_cannot_hold_others():
  e = trees.Entry("00", "int8", (1,))
  for names in (["a", "a/b"], ["a/b", "a"]):
    with pytest.raises(StructureError):
      trees.tree_objects(dict.fromkeys(names, e))


def test_what_is_no_array_is_no_part_of_a_value():
  x = jnp.ones(2)
  assert trees.tree_id({"w": x, "f": len}) == trees.tree_id({"w": x})


def test_of_equal_lengths_the_first_is_halved():
  # What a tile is is part of every id: it must never change.
  assert tiles.grid((512, 512), 8).edges == ((0, 256, 512), (0, 512))
