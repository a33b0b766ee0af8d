"""Encodings: lossless for every dtype, shape, region and kind of change."""

import hashlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import zstandard

import patchjax as pj
from patchjax.history.arrays import encodings
from patchjax.history.arrays.encodings import choosing, coding, factors, zigzag
from patchjax.patches import pinned
from patchjax.patches.codes import Dense, LowRank, Quantized, Sparse
from patchjax.patches.deltas import Delta
from patchjax.trees import digest, dtypes, tiles
from patchjax.trees.digest import Entry

DTYPES = [*sorted(dtypes.KINDS), "key<fry>", "key<rbg>"]
DELTAS = ("planes", "bits", "sparse")


def entry_of(dtype, shape):
  return Entry("", dtype, tuple(shape))


def random_words(dtype, shape, rng):
  """Any bit pattern: NaN payloads, -0.0 and denormals among them."""
  word = encodings.word_of(dtype)
  shape = encodings.words_shape(dtype, tuple(shape))
  bits = 8 * word.itemsize
  if dtype in dtypes.KINDS and dtypes.KINDS[dtype].bits < bits:
    bits = dtypes.KINDS[dtype].bits
  high = (1 << bits) - 1
  return rng.integers(0, high, shape, dtype=word, endpoint=True)


def changed(words, how, rng):
  """A version of some words that a kind of training may have left."""
  top = words.max(initial=0)  # keeps small numbers small
  new = words.copy()
  flat = new.reshape(-1)
  if how == "all":
    flat[:] = rng.permutation(flat)
  elif how == "near":
    step = rng.integers(0, 3, flat.size).astype(flat.dtype)
    flat[:] = np.minimum(flat ^ step, top)
  elif how == "few" and flat.size:
    at = rng.choice(flat.size, max(1, flat.size // 50), replace=False)
    flat[at] = rng.permutation(flat[at])
  elif how == "one" and flat.size:
    flat[rng.integers(flat.size)] ^= flat.dtype.type(1)
  return new


def round_trip(name, words, base, entry, region=None):
  encoding = encodings.ENCODINGS[name]
  arrays = encoding.encode(words, base, entry)
  assert arrays.keys() <= set(encoding.parts)
  if base is not None and region is not None:
    base = base[(*region, ...)]
  if base is not None:
    base = base.view()
    base.flags.writeable = False
  fetch = encodings.fetch_from(arrays)
  return encoding.decode(entry, region, fetch, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (70, 1, 130)])
def test_every_encoding_is_exact_for_every_dtype(dtype, shape):
  rng = np.random.default_rng(0)
  entry = entry_of(dtype, shape)
  base = random_words(dtype, shape, rng)
  plain = encodings.plain_encoding(dtype)
  assert np.array_equal(round_trip(plain, base, None, entry), base)
  for how in ("all", "near", "few", "one", "none"):
    new = changed(base, how, rng)
    for name in DELTAS:
      found = round_trip(name, new, base, entry)
      assert found.dtype == new.dtype and found.shape == new.shape
      assert np.array_equal(found, new), (name, how)


@pytest.mark.parametrize("name", DELTAS)
def test_differences_wrap_around(name):
  ends = np.uint16([0, 0xFFFF, 0x8000, 0x7FFF, 1])
  new, base = (x.reshape(-1) for x in np.meshgrid(ends, ends))
  entry = entry_of("uint16", new.shape)
  assert np.array_equal(round_trip(name, new, base, entry), new)


@st.composite
def leaves_and_regions(draw):
  dtype = draw(
    st.sampled_from(["float32", "bfloat16", "complex64", "uint4", "key<fry>"])
  )
  # Some of several tiles: a tile is at most 1 MiB.
  shape = draw(
    st.one_of(
      hnp.array_shapes(min_dims=0, max_dims=3, max_side=9),
      st.sampled_from([(1100, 300), (3, 700, 400), (2_100_000,), (513, 2050)]),
    )
  )
  bounds = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
  return dtype, shape, tuple(slice(*pair) for pair in bounds)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  leaves_and_regions(), st.sampled_from(["near", "few", "one"]), st.data()
)
def test_a_region_is_the_slice_of_the_whole(leaf, how, data):
  dtype, shape, region = leaf
  name = data.draw(st.sampled_from([*DELTAS, "plain"]))
  rng = np.random.default_rng(0)
  entry = entry_of(dtype, shape)
  base = random_words(dtype, shape, rng)
  new = changed(base, how, rng)
  if name == "plain":
    name, base = encodings.plain_encoding(dtype), None
  found = round_trip(name, new, base, entry, region)
  assert np.array_equal(found, new[region])


def test_a_region_of_a_stream_is_read_without_the_rest():
  rng = np.random.default_rng(0)
  entry = entry_of("bfloat16", (4096, 2048))
  base = random_words("bfloat16", entry.shape, rng)
  new = changed(base, "near", rng)
  stored = encodings.ENCODINGS["bits"].encode(new, base, entry)[""]
  count = 0

  def fetch(part, region=None, out=None):
    nonlocal count
    found = stored if region is None else stored[region]
    count += found.nbytes
    return found

  region = (slice(0, 100), slice(0, 2048))
  decode = encodings.ENCODINGS["bits"].decode
  found = decode(entry, region, fetch, base[region])
  assert np.array_equal(found, new[region])
  assert count < stored.nbytes / 6


def test_a_writeable_base_is_taken_over_and_another_left_alone():
  base = np.arange(5000, dtype=np.uint32)
  new = base.copy()
  new[77] = 1
  entry = entry_of("uint32", base.shape)
  sparse = encodings.ENCODINGS["sparse"]
  fetch = encodings.fetch_from(sparse.encode(new, base, entry))
  kept = base.view()
  kept.flags.writeable = False
  assert np.array_equal(sparse.decode(entry, None, fetch, kept), new)
  assert base[77] == 77
  assert np.shares_memory(sparse.decode(entry, None, fetch, base), base)


def test_versions_read_together_do_not_share_memory():
  value = {"x": np.arange(60_000, dtype=np.float32)}
  with pj.Repo.temporary() as repo:
    expected = {}
    for step in range(4):
      value = {"x": value["x"].copy()}
      value["x"][step] = -1
      expected[repo.commit(value, message="step")] = value["x"]
    repo = pj.Repo(repo.path)
    entries = {id_: repo.tree(id_)["x"] for id_ in expected}
    repo.index.refresh()
    places = repo.index.find(entry.digest for entry in entries.values())
    assert max(found[0].depth for found in places.values()) == 3
    words = repo.reader.read(entries)
    for id_, x in expected.items():
      assert np.array_equal(words[id_], dtypes.to_words(x))


# Against what plain Python says.


def code_of(new, old, bits):
  """The zigzag code of a difference, in integers of any size."""
  difference = (new - old) % 2**bits
  if difference >= 2 ** (bits - 1):
    difference -= 2**bits
  return 2 * difference if difference >= 0 else -2 * difference - 1


@pytest.mark.parametrize("word", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_zigzag_codes_are_those_of_integers(word):
  rng = np.random.default_rng(0)
  bits = 8 * np.dtype(word).itemsize
  new, old = (
    np.frombuffer(rng.bytes(bits // 8 * 500), word).copy() for _ in "ab"
  )
  new[:3], old[:3] = [0, 5, 7], [np.iinfo(word).max, 5, 8]
  found = zigzag.zigzag(new, old)
  expected = [code_of(int(a), int(b), bits) for a, b in zip(new, old)]
  assert found.tolist() == expected
  planes = encodings.to_planes(new, old)
  joined = [
    sum(int(planes[k, i]) << 8 * k for k in range(bits // 8))
    for i in range(500)
  ]
  assert joined == expected
  assert np.array_equal(zigzag.add_zigzag(found, old), new)


def sections_of(stream, tiles_count):
  """The sections of a stream, parsed by its description."""
  size, columns, flag = (
    int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(3)
  )
  at, rows = size, []
  for tile in range(tiles_count):
    row = []
    for column in range(columns):
      place = 12 + 4 * (tile * columns + column)
      spelled = int.from_bytes(stream[place : place + 4], "little")
      length = spelled & (1 << 30) - 1
      row.append((spelled >> 30, stream[at : at + length]))
      at += length
    rows.append(row)
  assert at == len(stream)
  return rows, flag


def bytes_of(section, count):
  form, data = section
  if form == 0:
    return data
  if not data:
    return bytes(count)
  if form == 3:
    low, high = digits_of(data[:8], data[8:], count)
    return bytes(a + 4 * b for a, b in zip(low, high))
  decoder = zstandard.ZstdDecompressor(
    format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=1 << 20
  )
  return decoder.decompress(data, max_output_size=count)


def digits_of(lengths, data, count):
  at = 0
  for spelled in np.frombuffer(lengths, "<u4").tolist():
    length = spelled & (1 << 30) - 1
    form, part = spelled >> 30, data[at : at + length]
    at += length
    if form == 2:
      yield rare_digits(part, count)
    else:
      packed = bytes_of((form, part), -(-count // 4))
      yield [packed[i // 4] >> 2 * (i % 4) & 3 for i in range(count)]


def test_a_sparse_stream_says_what_changed():
  rng = np.random.default_rng(0)
  base = rng.integers(0, 2**32, (3, 1000), np.uint32)
  new = base.copy()
  where = sorted(rng.choice(base.size, 70, replace=False).tolist())
  for flag, step in ((0, 3), (1, None)):
    if step is None:
      # Random words beside random words: differences gain nothing.
      base = rng.integers(0, 256, base.shape).astype(np.uint32) << 24
      new = base.copy()
      base.reshape(-1)[where] = rng.integers(0, 2**32, 70)
      new.reshape(-1)[where] = 1
    else:
      new.reshape(-1)[where] += np.uint32(step)
    [stream] = (
      encodings.ENCODINGS["sparse"]
      .encode(new, base, entry_of("uint32", base.shape))
      .values()
    )
    [row], found = sections_of(stream.tobytes(), 1)
    assert found == flag
    count = int.from_bytes(row[0][1], "little")
    changes = np.flatnonzero(new.reshape(-1) != base.reshape(-1))
    assert count == len(changes)
    gaps = [bytes_of(section, count) for section in row[1:5]]
    position, positions = -1, []
    for i in range(count):
      position += 1 + sum(gaps[k][i] << 8 * k for k in range(4))
      positions.append(position)
    assert positions == changes.tolist()
    values = [bytes_of(section, count) for section in row[5:]]
    for i, place in enumerate(positions):
      value = sum(values[k][i] << 8 * k for k in range(4))
      a, b = int(new.reshape(-1)[place]), int(base.reshape(-1)[place])
      assert value == (a if flag else code_of(a, b, 32))


def test_bits_hold_the_digits_of_the_codes():
  rng = np.random.default_rng(0)
  base = random_words("bfloat16", (301, 7), rng)
  new = changed(base, "near", rng)
  new[5, 5] ^= 0x4000  # one rare digit: held by its position
  [stream] = (
    encodings.ENCODINGS["bits"]
    .encode(new, base, entry_of("bfloat16", base.shape))
    .values()
  )
  [row], _ = sections_of(stream.tobytes(), 1)
  codes = [
    code_of(int(a), int(b), 16)
    for a, b in zip(new.reshape(-1), base.reshape(-1))
  ]
  assert {form for form, data in row if data} >= {1, 2}
  assert len(row) == 8
  for k, section in enumerate(row):
    expected = [code >> 2 * k & 3 for code in codes]
    if section[0] == 2:
      assert rare_digits(section[1], len(codes)) == expected
      continue
    packed = bytes_of(section, -(-len(codes) // 4))
    found = [packed[i // 4] >> 2 * (i % 4) & 3 for i in range(len(codes))]
    assert found == expected


def rare_digits(data, size):
  count, *lengths = np.frombuffer(data[:24], "<u4").tolist()
  at, planes = 24, []
  for spelled in lengths:
    length = spelled & (1 << 30) - 1
    planes.append((spelled >> 30, data[at : at + length]))
    at += length
  assert at == len(data)
  *gaps, values = planes
  gaps = [bytes_of(section, count) for section in gaps]
  values = bytes_of(values, count)
  digits, position = [0] * size, -1
  for i in range(count):
    position += 1 + sum(gaps[k][i] << 8 * k for k in range(4))
    digits[position] = values[i] + 1
  return digits


# Damage.


@pytest.mark.parametrize("name", ["bits", "sparse"])
def test_damaged_streams_are_refused_or_decode_to_something_else(name):
  rng = np.random.default_rng(0)
  base = random_words("bfloat16", (100, 50), rng)
  new = changed(base, "near", rng)
  new[3, 3] ^= 0x4000
  entry = entry_of("bfloat16", base.shape)
  encoding = encodings.ENCODINGS[name]
  good = encoding.encode(new, base, entry)[""]
  base.flags.writeable = False
  refused = 0
  for place in [*range(0, 80), *range(80, good.size, 37)]:
    bad = good.copy()
    bad[place] ^= 1 << place % 8
    try:
      encoding.decode(entry, None, encodings.fetch_from({"": bad}), base)
    except ValueError:
      refused += 1
  assert refused > 40
  for length in (0, 5, 12, 40, good.size - 1):
    cut = encodings.fetch_from({"": good[:length]})
    with pytest.raises(ValueError):
      encoding.decode(entry, None, cut, base)


def test_a_difference_needs_its_base():
  entry = entry_of("uint8", (4,))
  for name in (*DELTAS, "factors"):
    encoding = encodings.ENCODINGS[name]
    assert encoding.delta
    fetch = encodings.fetch_from({"": np.zeros((1, 4), np.uint8)})
    with pytest.raises((ValueError, KeyError)):
      encoding.decode(entry, None, fetch, None)


# Which is taken.


def tuned(scale, dtype, share=1.0, shape=(500, 400), relative=True):
  rng = np.random.default_rng(0)
  old = 0.02 * rng.standard_normal(shape)
  noise = scale * rng.standard_normal(shape)
  step = np.where(
    rng.random(shape) < share, noise * (old if relative else 1), 0
  )
  kind = dtypes.KINDS[dtype].dtype
  # As in training with float32 master weights.
  wide = dtypes.widened(kind)
  return [
    dtypes.to_words(x.astype(wide).astype(kind)) for x in (old, old + step)
  ]


@pytest.mark.parametrize(
  "name, dtype, scale, share",
  [
    ("planes", "float32", 1e-3, 1.0),
    ("bits", "bfloat16", 1e-3, 1.0),
    ("sparse", "bfloat16", 1e-3, 0.01),
    ("sparse", "float32", 1e-3, 0.01),
    ("sparse", "float32", 1e-1, 1e-5),
    ("dense", "float32", 1e3, 1.0),
    ("planes", "float64", 1e-3, 1.0),
  ],
)
def test_the_smallest_encoding_is_taken(name, dtype, scale, share):
  old, new = tuned(scale, dtype, share)
  entry = entry_of(dtype, old.shape)
  found, arrays = encodings.choose(new, old, entry)
  assert found == name
  decode = encodings.ENCODINGS[found].decode
  fetch = encodings.fetch_from(arrays)
  assert np.array_equal(decode(entry, None, fetch, old.copy()), new)
  if name != "dense":
    sizes = {
      other: sum(
        choosing.compressed(x)
        for x in encodings.ENCODINGS[other].encode(new, old, entry).values()
      )
      for other in ("dense", "planes", "bits", "sparse")
      if other != "bits" or old.itemsize <= 2
    }
    assert sizes[name] <= 1.05 * min(sizes.values())


def test_shards_may_only_be_encoded_elementwise():
  old, new = tuned(1e-3, "bfloat16")
  entry = entry_of("bfloat16", old.shape)
  name, arrays = encodings.choose(new, old, entry, elementwise=True)
  assert encodings.ENCODINGS[name].elementwise
  halves = [
    encodings.ENCODINGS[name].encode(new[:, part], old[:, part], entry)[""]
    for part in (slice(0, 100), slice(100, 400))
  ]
  assert np.array_equal(np.concatenate(halves, axis=2), arrays[""])


def plane_entropy(codes):
  planes = codes.reshape(-1, 1).view(np.uint8).T
  total = 0.0
  for plane in planes:
    shares = np.bincount(plane) / plane.size
    shares = shares[shares > 0]
    total -= (shares * np.log2(shares)).sum()
  return total / 8 * codes.size


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2])
def test_bytes_are_within_a_tenth_of_the_entropy_of_the_planes(
  dtype, scale, relative
):
  step = scale if relative else 0.02 * scale
  old, new = tuned(step, dtype, shape=(1024, 1024), relative=relative)
  name, arrays = encodings.choose(new, old, entry_of(dtype, old.shape))
  size = sum(choosing.compressed(x) for x in arrays.values())
  codes = zigzag.zigzag(new.reshape(-1), old.reshape(-1))
  assert size <= 1.1 * plane_entropy(codes), name


@pytest.mark.parametrize("share", [0.001, 0.005, 0.01, 0.05])
def test_sparse_takes_at_most_an_index_and_a_value(share):
  old, new = tuned(1.0, "float32", share)
  name, arrays = encodings.choose(new, old, entry_of("float32", old.shape))
  assert name == "sparse"
  count = np.count_nonzero(new != old)
  assert arrays[""].nbytes <= 1.05 * 8 * count


# Factors.


def low_rank(rng, batch=()):
  a = rng.standard_normal((*batch, 6, 7, 3)).astype(np.float32)
  b = rng.standard_normal((*batch, 3, 5)).astype(np.float32)
  return (
    (*batch, 6, 7, 5),
    LowRank(a, b, np.float32(0.3), batch=len(batch)),
  )


def patches(rng):
  """Deltas of every code, with the shape of their leaf."""
  yield low_rank(rng)
  yield low_rank(rng, (4,))
  shape = (30, 20)
  yield shape, Dense(rng.standard_normal(shape).astype(np.float32))
  yield shape, Dense(rng.standard_normal((30, 1)).astype(np.float32))
  words = rng.integers(-8, 8, shape).astype(np.int8)
  scales = rng.standard_normal((4, 20)).astype(np.float32)
  yield shape, Quantized(words, scales, 4, (8, 1))
  yield (
    shape,
    Quantized(words, rng.random((1, 1)).astype(np.float32), 4, (30, 20)),
  )
  at = np.sort(rng.choice(600, 50, replace=False)).astype(np.int32)
  at[-1] = 600  # padding
  values = rng.standard_normal(50).astype(np.float32)
  yield shape, Sparse(values, at, shape)
  small = Quantized(
    rng.integers(-2, 2, 50).astype(np.int8), values[:7], 2, (8,)
  )
  yield shape, Sparse(small, at, shape)
  yield (), Dense(np.float32(0.5))
  yield (), Sparse(np.float32([2.0]), np.int32([0]), ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("law", ["add", "mul", "set"])
def test_factors_reproduce_the_pinned_evaluation_of_any_region(law, dtype):
  rng = np.random.default_rng(0)
  for shape, code in patches(rng):
    delta = Delta(code, law)
    leaf = np.asarray(
      jax.device_put(rng.standard_normal(shape).astype(np.float32)), dtype
    )
    entry = entry_of(dtype, shape)
    base = dtypes.to_words(leaf)
    with np.errstate(all="ignore"):
      expected = dtypes.to_words(pinned.apply_host(leaf, delta))
    assert np.array_equal(
      factors.evaluate(entry, None, delta, base), expected
    ), code
    for _ in range(4):
      ends = [np.sort(rng.integers(0, n + 1, 2)).tolist() for n in shape]
      region = tuple(slice(*pair) for pair in ends)
      if 0 in tiles.shape_of(region):
        continue
      found = factors.evaluate(entry, region, delta, base[region])
      assert np.array_equal(found, expected[region]), (code, region)


def test_factors_of_bits_and_of_keys():
  rng = np.random.default_rng(0)
  for value in (
    {"w": rng.integers(0, 7, (9, 8)).astype(np.int8)},
    {"w": jax.random.split(jax.random.key(3), 5)},
  ):
    leaf = value["w"]
    other = {"w": leaf[::-1]}
    patch = pj.diff(value, other, exact=True)
    base, dtype = dtypes.host(leaf)
    expected = dtypes.host(other["w"])[0]
    entry = entry_of(dtype, leaf.shape)
    region = (slice(1, 4), *[slice(2, 6)] * (leaf.ndim - 1))
    delta = patch.deltas["w"]
    found = factors.evaluate(entry, region, delta, base[region])
    assert np.array_equal(found, expected[region])


def test_factors_are_read_from_the_patch_file(tmp_path):
  rng = np.random.default_rng(0)
  base = {"w": rng.standard_normal((60, 50)).astype(np.float32)}
  code = LowRank(
    rng.standard_normal((60, 2)).astype(np.float32),
    rng.standard_normal((2, 50)).astype(np.float32),
    np.float32(0.1),
  )
  patch = pj.Patch({"w": Delta(code, "add")}, None)
  patch.save(tmp_path / "patch")
  data = (tmp_path / "patch").read_bytes()
  name = hashlib.sha256(data).hexdigest()
  held = factors.Factors(name, "w", patch.deltas["w"])
  old = dtypes.to_words(base["w"])
  new = dtypes.to_words(pinned.apply_named(base, patch)["w"])
  entry = entry_of("float32", (60, 50))
  assert encodings.choose(new, old, entry, factors=held) == ("factors", {})
  assert encodings.object_of("factors", held.key) == name
  fetch = encodings.fetch_patch(held.key, {name: data}.__getitem__)
  region = (slice(10, 20), slice(0, 50))
  decode = encodings.ENCODINGS["factors"].decode
  assert np.array_equal(decode(entry, None, fetch, old), new)
  found = decode(entry, region, fetch, old[region])
  assert np.array_equal(found, new[region])
  # A value that the patch does not make is held by itself.
  other = new.copy()
  other[0, 0] ^= 1
  found, _ = encodings.choose(other, old, entry, factors=held)
  assert found != "factors"


def test_what_a_patch_file_made_is_known_to_be_its_own(tmp_path):
  rng = np.random.default_rng(0)
  named = {"w": rng.random((30, 20), np.float32), "v": np.float32([1, 2])}
  old = {name: digest.entry(x) for name, x in named.items()}
  delta = Delta(Dense(rng.random((30, 20), np.float32)), "add")
  pj.Patch({"w": delta}).save(tmp_path / "p.safetensors")
  data = (tmp_path / "p.safetensors").read_bytes()
  name = hashlib.sha256(data).hexdigest()
  changed = factors.applied(named, old, name, data)
  held = encodings.factors_of(name, {name: data}.__getitem__)["w"]
  base = old["w"].digest
  assert factors.is_made(changed["w"], held, base)
  assert not changed["w"].flags.writeable
  # Of another leaf, another base, a copy, and what the patch did not touch.
  assert not factors.is_made(changed["w"], held, old["v"].digest)
  assert not factors.is_made(changed["w"].copy(), held, base)
  assert not factors.is_made(changed["v"], held, base)
  count = len(factors._made)
  del changed
  assert len(factors._made) == count - 1


def test_digits_of_any_share_are_coded():
  rng = np.random.default_rng(0)
  for share in (0, 1e-4, 0.01, 0.05, 0.3, 0.5, 1):
    for size in (10_000, 10_001, 3, 0):
      chosen = rng.random(size) < share
      octets = (chosen * rng.integers(1, 4, size)).astype(np.uint8) << 4
      section = coding.code_digits(octets, 2)
      found = np.zeros(-(-size // 4) * 4, np.uint8)
      coding.add_digits(found, 2, section)
      assert np.array_equal(found[:size], octets)
      assert not found[size:].any()


def test_bytes_of_any_kind_are_coded():
  rng = np.random.default_rng(0)
  for largest in (0, 1, 3, 4, 255):
    for size in (10_001, 64, 63, 1, 0):
      octets = rng.integers(0, largest + 1, size).astype(np.uint8)
      found = coding.decode_bytes(coding.code_bytes(octets), size)
      assert np.array_equal(found, octets)


def test_a_section_that_claims_a_size_of_its_own_is_refused():
  # zstd would allocate what a damaged frame asks for.
  data = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(
      format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True
    )
  ).compress(bytes(1000))
  with pytest.raises(ValueError, match="its own size"):
    coding.decode_bytes((1, data), 1000)


def test_sections_in_sections_come_to_an_end():
  form, data = 3, b""
  for _ in range(5000):
    spelled = np.array([form << 30 | len(data), 0], "<u4")
    data = spelled.tobytes() + data
  with pytest.raises(ValueError, match="digits for"):
    coding.decode_bytes((form, data), 1 << 20)
