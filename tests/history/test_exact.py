"""Exact history: every dtype and bit pattern survives, in any encoding."""

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import encodings
from patchjax.trees import dtypes
from tests.history.layouts import random_bits

PLAIN = sorted(dtypes.KINDS)
SMALL = {"int2", "uint2", "int4", "uint4", "float4_e2m1fn"}


def words(x):
  return dtypes.host(x)[0]


def same(a, b):
  (a, x), (b, y) = dtypes.host(a), dtypes.host(b)
  return x == y and a.shape == b.shape and np.array_equal(a, b)


@pytest.mark.parametrize("large", [False, True], ids=["blob", "payload"])
def test_every_dtype_round_trips(large):
  shape = (257, 129) if large else (3, 5)
  value = {name: random_bits(name, shape) for name in PLAIN}
  with Repo.temporary() as repo:
    repo.commit(value, message="host")
    kinds = {pack.split("/")[0] for pack in repo.index.packs()}
    assert kinds == {"payloads" if large else "blobs"}
    for like in (value, None):
      found = repo.checkout(like=like)
      assert found.keys() == value.keys()
      for name in PLAIN:
        assert same(found[name], value[name]), name
    assert repo.fsck().ok


def test_every_dtype_round_trips_from_devices():
  narrow = [n for n in PLAIN if dtypes.KINDS[n].dtype.itemsize < 8]
  narrow += ["complex64"]
  value = {
    name: jax.device_put(random_bits(name, (3, 5)))
    for name in narrow
    if name != "complex128"
  }
  with Repo.temporary() as repo:
    repo.commit(value, message="devices")
    found = Repo(repo.path).checkout(like=value)
    for name, leaf in value.items():
      assert isinstance(found[name], jax.Array)
      assert same(found[name], leaf), name


def test_wide_leaves_stay_on_the_host_when_x64_is_off():
  assert not jax.config.jax_enable_x64
  wide = ("int64", "uint64", "float64", "complex128")
  value = {name: random_bits(name, (4,)) for name in wide}
  with Repo.temporary() as repo:
    repo.commit(value, message="wide")
    found = repo.checkout()
  for name in wide:
    assert isinstance(found[name], np.ndarray)
    assert found[name].dtype == name
    assert same(found[name], value[name])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("count", [0, 3, 5000])
def test_prng_keys_keep_their_implementation(impl, count):
  keys = jax.random.split(jax.random.key(1, impl=impl), max(count, 1))[:count]
  value = {"keys": keys, "one": jax.random.key(2, impl=impl)}
  with Repo.temporary() as repo:
    repo.commit(value, message="keys")
    found = Repo(repo.path).checkout(like=value)
  for name, leaf in value.items():
    assert found[name].dtype == leaf.dtype
    assert found[name].shape == leaf.shape
    assert same(found[name], leaf)


def test_special_numbers_keep_their_bits():
  specials = np.uint32(
    [0x7F800001, 0xFFC12345, 0x80000000, 1, 0x807FFFFF, 0x7F800000]
  ).view(np.float32)
  with Repo.temporary() as repo:
    repo.commit({"x": specials}, message="numpy")
    repo.commit({"x": jax.device_put(specials)}, message="jax")
    assert repo.show("main").tree == repo.show("main~1").tree
    assert same(repo.checkout()["x"], specials)


def test_zero_size_and_scalar_leaves():
  value = {
    "none": np.zeros((0, 3), np.float32),
    "deep": {"none": np.zeros((2, 0), ml_dtypes.bfloat16)},
    "scalar": np.float16(1.5),
    "complex": np.zeros((0,), np.complex64),
  }
  with Repo.temporary() as repo:
    repo.commit(value, message="zero")
    found = repo.checkout(like=value)
    for name in ("none", "scalar", "complex"):
      assert same(found[name], value[name]), name
    assert found["deep"]["none"].shape == (2, 0)
    assert repo.fsck().ok
    # Only the scalar takes room.
    only_empty = {"none": value["none"]}
    repo.commit(only_empty, message="nothing")
    assert repo.checkout()["none"].shape == (0, 3)


@pytest.mark.parametrize("name", PLAIN)
def test_planes_are_exact_for_any_difference(name):
  kind = dtypes.KINDS[name]
  a, b = (words(random_bits(name, (70_000,), seed)) for seed in (1, 2))
  for new, old in ((a, b), (b, a), (a, a)):
    planes = encodings.to_planes(new, old)
    assert planes.shape == (kind.word.itemsize, *new.shape)
    assert np.array_equal(encodings.from_planes(planes, old), new)


@hypothesis.given(
  st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 2), min_size=1)
)
def test_planes_wrap_around(pairs):
  new, old = np.array(pairs, np.uint16).T.copy()
  assert np.array_equal(
    encodings.from_planes(encodings.to_planes(new, old), old), new
  )


def test_encodings_are_chosen_by_measured_gain():
  rng = np.random.default_rng(0)
  base = rng.standard_normal((300, 200)).astype(np.float32)
  near = base * (1 + 1e-4 * rng.standard_normal(base.shape)).astype(np.float32)
  far = rng.standard_normal(base.shape).astype(np.float32)
  with Repo.temporary() as repo:
    repo.commit({"near": base, "far": base + 1}, message="base")
    repo.commit({"near": near, "far": far}, message="tuned")
    tree = repo.tree()
    repo.index.refresh()
    places = repo.index.find(e.digest for e in tree.values())
    [at_near] = places[tree["near"].digest]
    [at_far] = places[tree["far"].digest]
    assert (at_near.encoding, at_near.depth) == ("planes", 1)
    assert at_near.base == repo.tree("main~1")["near"].digest
    assert (at_far.encoding, at_far.depth) == ("dense", 0)
    assert same(repo.checkout()["near"], near)


def test_chains_are_bounded_and_exact():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((150, 200)).astype(np.float32)
  versions = [x]
  with Repo.temporary() as repo:
    for step in range(12):
      x = x.copy()
      x[step] += 1e-3
      versions.append(x)
    for version in versions:
      repo.commit({"x": version}, message="step")
    repo = Repo(repo.path)
    repo.index.refresh()
    depths = []
    for back, version in enumerate(reversed(versions)):
      ref = f"main~{back}"
      digest = repo.tree(ref)["x"].digest
      depths.append(repo.index.find([digest])[digest][0].depth)
      assert same(repo.checkout(ref, like={"x": x})["x"], version)
    assert max(depths) == encodings.MAX_DEPTH
    # After the longest chain a difference to its start comes next.
    assert depths.count(0) == 1 and depths.count(1) == 2


def test_restored_numpy_leaves_can_be_written_to():
  value = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
  with Repo.temporary() as repo:
    repo.commit(value, message="equal leaves")
    found = repo.checkout(like=value)
    found["a"][0] = 1
    assert found["b"][0] == 0
    assert repo.checkout(like=value)["a"][0] == 0


def test_a_changed_numpy_array_is_noticed():
  value = {"a": np.zeros(50_000, np.float32)}
  with Repo.temporary() as repo:
    repo.commit(value, message="one")
    value["a"][49_999] = 1
    repo.commit(value, message="two")
    assert repo.checkout("main")["a"][-1] == 1
    assert repo.checkout("main~1")["a"][-1] == 0


@pytest.mark.parametrize("axes", ["mesh_explicit", "mesh_auto"])
def test_sharded_values_have_the_id_of_the_host_value(axes, request):
  mesh = request.getfixturevalue(axes)
  rng = np.random.default_rng(0)
  host = {"x": rng.standard_normal((64, 32)).astype(np.float32)}
  spec = jax.sharding.PartitionSpec("y", "x")
  sharded = jax.device_put(host, jax.sharding.NamedSharding(mesh, spec))
  changed = jax.tree.map(lambda x: x + 1, sharded)
  with Repo.temporary() as repo:
    repo.commit(host, message="host")
    repo.commit(sharded, message="sharded")
    assert repo.show("main").tree == repo.show("main~1").tree
    repo.commit(changed, message="changed")
    found = repo.checkout(like=changed)["x"]
    assert found.sharding == changed["x"].sharding
    assert same(found, changed["x"])
