"""Lazy leaves: sliced like numpy arrays, verified, and not read in vain."""

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from patchjax.history import Repo
from patchjax.trees.errors import IntegrityError

BIG = (1536, 2048)  # 12 MiB in float32: tiles of 384 x 512, two chunks


@pytest.fixture(scope="module")
def value():
  rng = np.random.default_rng(0)
  return {
    "big": rng.standard_normal(BIG, dtype=np.float32),
    "other": rng.standard_normal(BIG, dtype=np.float32),
    "deep": {"small": np.arange(24.0).reshape(2, 3, 4), "scalar": np.int8(3)},
    "keys": jax.random.split(jax.random.key(0), 5),
    "none": np.zeros((0, 3), np.float32),
  }


@pytest.fixture(scope="module")
def repo(value):
  with Repo.temporary() as repo:
    repo.commit(value, message="first")
    # The tip is a difference to the first, tile by tile.
    tuned = {**value, "big": value["big"] * np.float32(1 + 1e-4)}
    repo.commit(tuned, message="tuned")
    yield repo


def bytes_read():
  [metric] = ts.experimental_collect_matching_metrics(
    "/tensorstore/kvstore/file/bytes_read"
  )
  return sum(item["value"] for item in metric["values"])


INDICES = [
  ...,
  (),
  0,
  -1,
  (slice(None), 0),
  (slice(100, 90, -3), slice(5, 2000, 700)),
  (slice(-5, None), None, slice(1, 1)),
  (..., slice(None, None, -1)),
  (3, ..., 4),
  (slice(2000, 1000), slice(None)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_are_those_of_numpy(repo, value, index):
  for ref in ("main", "main~1"):
    leaf = repo.open(ref)["big"]
    want = (
      value["big"]
      if ref == "main~1"
      else repo.checkout(ref, like={"big": value["big"]}, only="big")["big"]
    )
    found = leaf[index]
    assert found.shape == want[index].shape
    assert np.array_equal(found, want[index])


def test_leaves_say_what_they_are(repo, value):
  version = repo.open("main")
  assert set(version) == {
    "big",
    "other",
    "deep/small",
    "deep/scalar",
    "keys",
    "none",
  }
  big = version["big"]
  assert (big.shape, big.dtype, big.ndim, len(big)) == (
    BIG,
    np.float32,
    2,
    BIG[0],
  )
  assert big.nbytes == value["big"].nbytes
  assert np.array_equal(np.asarray(version["other"]), value["other"])
  assert version["deep"]["small"][1, 2, 3] == 23
  assert version["deep/scalar"].read() == 3
  assert version["none"].read().shape == (0, 3)
  keys = version["keys"]
  assert keys.dtype == value["keys"].dtype
  assert (keys[1:3] == value["keys"][1:3]).all()
  with pytest.raises(KeyError, match="did you mean 'other'"):
    version["othr"]
  for index in ((0, 0, 0), (..., ...), 1536, [1], True, 0.5):
    with pytest.raises(IndexError):
      big[index]


def test_a_slice_reads_its_chunks_alone(repo, value):
  repo.open("main~1")["other"][0, 0]  # opened, and the index is fresh
  before = bytes_read()
  row = repo.open("main~1")["other"][7, 3:9]
  read = bytes_read() - before
  assert np.array_equal(row, value["other"][7, 3:9])
  # At most one of the leaf's two chunks; its row of tiles at least.
  assert 1 << 20 < read < 7 << 20


def test_a_partial_checkout_reads_its_leaves_alone(repo, value):
  fresh = Repo(repo.path)
  before = bytes_read()
  found = fresh.checkout("main~1", like=value, only="deep/.*|keys")
  assert bytes_read() - before < 100_000
  assert np.array_equal(found["deep"]["small"], value["deep"]["small"])
  before = bytes_read()
  fresh.checkout("main~1", like=value, only="other")
  assert 10 << 20 < bytes_read() - before < 13 << 20


def test_a_shard_reads_its_chunks_alone(repo, value, mesh_explicit):
  sharding = NamedSharding(
    jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), P("x")
  )
  like = {"other": jax.ShapeDtypeStruct(BIG, np.float32, sharding=sharding)}
  before = bytes_read()
  found = repo.checkout("main~1", like=like, only="other")["other"]
  # Each chunk once, though two devices read.
  assert bytes_read() - before < 13 << 20
  assert found.sharding == sharding
  assert np.array_equal(found, value["other"])


def test_a_damaged_tile_is_found_and_the_others_are_read(tmp_path, value):
  repo = Repo.init(tmp_path / "repo")
  repo.commit({"x": value["big"]}, message="start")
  [pack] = repo.index.packs()
  folder = tmp_path / "repo" / pack
  largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  # Raw bytes of mantissas, which zstd leaves as they are, in the first chunk.
  data[len(data) // 4] ^= 1
  largest.write_bytes(data)
  leaf = Repo(repo.path).open("main")["x"]
  bad = 0
  for rows in range(0, BIG[0], 384):
    for columns in range(0, BIG[1], 512):
      try:
        tile = leaf[rows : rows + 384, columns : columns + 512]
      except IntegrityError as error:
        assert "x: float32[1536, 2048]" in str(error)
        bad += 1
      else:
        want = value["big"][rows : rows + 384, columns : columns + 512]
        assert np.array_equal(tile, want)
  assert 0 < bad < 16
  with pytest.raises(IntegrityError):
    leaf.read()
