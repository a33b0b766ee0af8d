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
from patchjax.trees.errors import StructureError
from tests import containers


def test_the_digest_is_what_the_format_says():
  x = np.arange(5, dtype=np.float32)
  block = hashlib.sha256(b"\x00" + x.tobytes()).digest()
  head = b'{"dtype":"float32","shape":[5]}'
  want = hashlib.sha256(b"\x02" + block + head).hexdigest()
  assert trees.leaf_digest(x) == want


@pytest.mark.parametrize("blocks", [2, 3, 5, 8])
def test_many_blocks_are_a_merkle_tree(blocks):
  data = np.arange(blocks * (1 << 18) - 7, dtype=np.uint32)
  raw = data.tobytes()
  level = [
    hashlib.sha256(b"\x00" + raw[i : i + (1 << 20)]).digest()
    for i in range(0, len(raw), 1 << 20)
  ]
  while len(level) > 1:
    level = [
      hashlib.sha256(b"\x01" + b"".join(level[i : i + 2])).digest()
      if len(level[i : i + 2]) == 2
      else level[i]
      for i in range(0, len(level), 2)
    ]
  head = json.dumps(
    {"dtype": "uint32", "shape": [len(data)]}, separators=(",", ":")
  )
  want = hashlib.sha256(b"\x02" + level[0] + head.encode()).hexdigest()
  assert trees.leaf_digest(data) == want


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
