"""The table of exactness: every dtype in every sharding, on eight devices."""

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax.trees import dtypes

SHAPE = (16, 8)
IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


def random_bits(name, shape, seed=0):
  """Any bit pattern a dtype has: NaN payloads, -0.0, denormals among them."""
  kind = dtypes.KINDS[name]
  rng = np.random.default_rng(seed)
  if kind.bits < 8:
    raw = rng.integers(0, 2**kind.bits, shape, dtype=np.uint8)
    if name == "bool":
      return raw.astype(bool)
    # Through integers: small dtypes keep their bits in the low end.
    if name == "float4_e2m1fn":
      return raw.view(kind.dtype)
    return raw.astype(np.int64).astype(kind.dtype)
  count = int(np.prod(shape)) * kind.dtype.itemsize
  return np.frombuffer(rng.bytes(count), kind.dtype).reshape(shape)


def host_value(seed):
  """Returns a tree of every dtype, and of awkward shapes, on the host."""
  value = {
    name: random_bits(name, SHAPE, seed + i)
    for i, name in enumerate(sorted(dtypes.KINDS))
  }
  rng = np.random.default_rng(seed)
  value["tiny"] = rng.standard_normal(8, dtype=np.float32)
  value["scalar"] = np.float32(seed)
  value["none"] = np.zeros((0, 8), ml_dtypes.bfloat16)
  # Several tiles, of 384 x 512, which eight rows of shards do not respect.
  value["large"] = rng.standard_normal((768, 1024), dtype=np.float32)
  return value


def keys(seed):
  """Returns PRNG keys of every implementation."""
  return {
    impl: jax.random.split(jax.random.key(seed, impl=impl), 16)
    for impl in IMPLS
  }


def meshes():
  """Returns eight devices as meshes of every kind of axes.

  In `crossed` the neighbours along an axis are of different processes.
  """
  devices = np.array(jax.devices())
  auto, explicit = AxisType.Auto, AxisType.Explicit
  names = ("x", "y")

  def mesh(devices, *kinds):
    return Mesh(devices, names, axis_types=kinds)

  grid = devices.reshape(4, 2)
  return {
    "auto": mesh(grid, auto, auto),
    "explicit": mesh(grid, explicit, explicit),
    "mixed": mesh(grid, auto, explicit),
    "crossed": mesh(devices.reshape(2, 4).T, explicit, explicit),
  }


LAYOUTS = {
  "numpy": None,
  "auto": ("auto", P("x", "y")),
  "explicit": ("explicit", P("y", "x")),
  "mixed": ("mixed", P("x", "y")),
  "replicated": ("explicit", P()),
  "partial": ("auto", P("y")),
  "rows": ("auto", P(("x", "y"))),
  "crossed": ("crossed", P(("x", "y"))),
}
"""Layout -> (mesh, spec): axes that a leaf does not have are left out."""


def sharding_of(layout, shape):
  """Returns the sharding of a leaf in a layout; None on the host."""
  if LAYOUTS[layout] is None:
    return None
  mesh, spec = LAYOUTS[layout]
  mesh = meshes()[mesh]
  fitting = []
  for length, part in zip(shape, spec):
    axes = (part,) if isinstance(part, str) else part or ()
    count = int(np.prod([mesh.shape[axis] for axis in axes]))
    fitting.append(part if length % count == 0 else None)
  return NamedSharding(mesh, P(*fitting))


def place(layout, value):
  """Returns a host tree in a layout, on the devices of all processes."""

  def put(x):
    sharding = sharding_of(layout, x.shape)
    if sharding is None:
      return x
    return jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    )

  return {name: put(x) for name, x in value.items()}


def place_keys(layout, value):
  """Returns keys in a layout."""
  placed = {}
  for impl, x in value.items():
    sharding = sharding_of(layout, x.shape)
    if sharding is None:
      placed[impl] = x
      continue
    data = np.asarray(jax.random.key_data(x))
    sharding = NamedSharding(sharding.mesh, P(*sharding.spec, None))
    data = jax.make_array_from_callback(
      data.shape, sharding, lambda index, data=data: data[index]
    )
    placed[impl] = jax.random.wrap_key_data(data, impl=impl)
  return placed


def check_local(found, want):
  """Checks the shards of this process against the host's value."""
  assert found.keys() == want.keys()
  for name, x in found.items():
    expected, dtype = dtypes.host(want[name])
    assert x.shape == want[name].shape, name
    assert dtypes.dtype_name(x) == dtype, name
    if isinstance(x, np.ndarray):
      assert np.array_equal(dtypes.host(x)[0], expected), name
      continue
    assert x.addressable_shards
    for shard in x.addressable_shards:
      bits = dtypes.host(shard.data)[0]
      assert np.array_equal(bits, expected[shard.index]), name
