"""One process with eight devices: any mesh in, any mesh out."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax import trees
from patchjax.history import Repo
from patchjax.history.arrays import digesting
from patchjax.trees import dtypes, tiles
from tests.history import layouts


@pytest.fixture(scope="module")
def host():
  # With x64 off, JAX would narrow what is wide: that stays on the host.
  value = layouts.host_value(5)
  narrow = {k: x for k, x in value.items() if not dtypes.is_wide(x)}
  return narrow | layouts.keys(5)


def placed(layout, host):
  keys = {name: host[name] for name in layouts.IMPLS}
  rest = {name: x for name, x in host.items() if name not in keys}
  return layouts.place(layout, rest) | layouts.place_keys(layout, keys)


@pytest.fixture(scope="module")
def repo(host):
  with Repo.temporary() as repo:
    repo.commit(host, message="host")
    yield repo


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_dtype_in_every_layout(repo, host, layout):
  value = placed(layout, host)
  layouts.check_local(repo.checkout(like=value), host)
  with Repo.temporary() as other:
    commit = other.commit(value, message=layout)
    assert other.show(commit).tree == trees.tree_id(host)
    found = Repo(other.path).checkout(like=value)
    layouts.check_local(found, host)
    for name, x in value.items():
      assert getattr(found[name], "sharding", None) == getattr(
        x, "sharding", None
      )
    assert other.fsck().ok


def test_a_subset_of_the_devices_and_one_device(repo, host):
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[3:5])
  for sharding in (
    NamedSharding(mesh, P("x")),
    NamedSharding(mesh, P()),
    jax.sharding.SingleDeviceSharding(jax.devices()[6]),
  ):
    like = {
      "large": jax.ShapeDtypeStruct((768, 1024), "float32", sharding=sharding)
    }
    found = repo.checkout(like=like, only="large")
    assert found["large"].sharding == sharding
    layouts.check_local(found, {"large": host["large"]})


@pytest.mark.parametrize(
  "spec", [P(("x", "y")), P("x", "y"), P(None, "x"), P("y")]
)
def test_straddled_tiles_are_joined_and_nothing_more(spec):
  shape = (768, 1024)  # tiles of 384 x 512
  mesh = jax.make_mesh((4, 2), ("x", "y"))
  x = np.arange(768 * 1024, dtype=np.float32).reshape(shape)
  grid = tiles.grid(shape, 4)
  fine, coarse = digesting.coarser(NamedSharding(mesh, spec), grid)
  before = NamedSharding(mesh, spec).devices_indices_map(shape)
  assert fine.devices_indices_map(shape) == before
  for device, index in coarse.devices_indices_map(shape).items():
    region = tiles.region_of(index, shape)
    mine = tiles.region_of(before[device], shape)
    assert grid.widened(region) == region  # whole tiles
    assert tiles.holds(region, mine)
    # No more than the tiles around the shard.
    assert region == grid.widened(mine)
  y = jax.device_put(x, fine)
  assert np.array_equal(jax.jit(lambda y: y, out_shardings=coarse)(y), x)
