"""What a merge sends between devices: counts, never parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging import gram, masks
from patchjax.patches import (
  Step,
  Transform,
  counting,
  leafwise,
  narrowing,
  ordering,
  placement,
  selection,
  top_k,
)
from patchjax.patches.rank_cuts import cuts
from tests.merging.models import floats, models, put

COLLECTIVE = re.compile(
  r"= (\S[^=]*?) "
  r"(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(function, *args):
  """`(type, operation)` of each collective in the compiled program."""
  text = jax.jit(function).lower(*args).compile().as_text()
  return COLLECTIVE.findall(text)


def numbers(shape):
  """How many numbers an HLO type such as `s32[2,5]{1,0}` holds."""
  return int(
    sum(
      np.prod([int(d) for d in dims.split(",") if d] or [1])
      for dims in re.findall(r"\[([\d,]*)\]", shape)
    )
  )


HISTOGRAM = re.compile(r"s32\[\d+,1024\]")


def passes(shape):
  """The part of what is sent together that is no histogram of a sample."""
  return HISTOGRAM.sub("", shape)


def test_selection_sends_one_small_sum_a_pass(mesh_explicit):
  x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh_explicit, jax.P("x", "y"))
  x = jax.device_put(x, sharding)
  found = collectives(lambda x: top_k.kth_magnitude(x, 100), x)
  assert [operation for _, operation in found] == ["all-reduce"]
  assert found[0][0].startswith("s32[1,2,5]")


def test_a_sample_is_one_sum_before_the_passes(mesh_explicit):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((512, 128)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh_explicit, jax.P("x", "y"))
  x = jax.device_put(x, sharding)
  found = collectives(lambda x: top_k.kth_magnitude(x, 100), x)
  assert [operation for _, operation in found] == ["all-reduce"] * 2
  passes, sample = sorted((shape for shape, _ in found), key=numbers)
  assert passes.startswith("s32[1,2,5]")
  assert sample.startswith("s32[1,1024]")


def test_known_auto_mesh_sends_one_small_sum_a_pass(mesh_auto):
  x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh_auto, jax.P("x", "y"))
  leaf = placement.leaf_of(jax.device_put(x, sharding))
  state = selection.search(counting.limbs(100), [x.shape])

  def keys_at_least(x, leaf, state):
    keys = [ordering.magnitude_keys(x)]
    return narrowing.count_at_least(keys, leaf, selection.stacked([state]))

  def count(x):
    return placement.sum_over_shards(keys_at_least, x, leaf, state)

  found = collectives(count, jax.device_put(x, sharding))
  assert [operation for _, operation in found] == ["all-reduce"]
  assert found[0][0].startswith("s32[1,2,5]")


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_ties_never_gathers_parameters(mesh, request):
  base, others = models(2)
  mesh = request.getfixturevalue(mesh)
  base, others = put(base, mesh), [put(x, mesh) for x in others]
  method = pj.merging.ties(density=0.2)
  found = collectives(lambda b, o: pj.merge(b, o, method), base, others)
  assert found
  for shape, operation in found:
    assert "f32" not in shape, (shape, operation)
    # On a mesh that a jit cannot see, rows are counted before they are
    # added: a few integers a row at most.
    assert numbers(passes(shape)) <= 128, (shape, operation)


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_linear_sends_nothing(mesh, request):
  base, others = models(2)
  mesh = request.getfixturevalue(mesh)
  base, others = put(base, mesh), [put(x, mesh) for x in others]
  method = pj.merging.linear(weights=[1.0, 2.0])
  assert not collectives(lambda b, o: pj.merge(b, o, method), base, others)


def _angles(found, state, k):
  del state, k
  lengths = jnp.sqrt(jnp.diagonal(found))
  return jnp.sum(found / jnp.outer(lengths, lengths), axis=1)


ANGLES = Transform.of(gram.combination("test_angles", _angles), {})


def _dropped(leaf, deltas, base, state, shared):
  del base, shared
  kept = []
  for i, delta in enumerate(deltas):
    bits = masks.uniform_bits(state["key"], leaf, i)
    mask = masks.uniform(bits) < jnp.float32(0.5)
    kept.append(jnp.where(mask, delta, jnp.zeros_like(delta)))
  return tuple(kept)


DROPPED = pj.chain(
  Transform.of(Step("test_dropped", _dropped), {"key": jax.random.key(0)}),
  pj.merging.mean(),
)


def _medians(leaf, deltas, state):
  del leaf, state
  return tuple(map(ordering.ordered_bits, deltas))


def _middle(state, shapes, k):
  del state
  return (counting.limbs(np.prod(shapes[0]).item() // 2),) * k


def _centred(leaf, deltas, base, state, searches):
  del leaf, base, state
  middles = [ordering.value_of(selection.cut_key(s)) for s in searches]
  return tuple(d - m for d, m in zip(deltas, middles, strict=True))


CENTRED = pj.chain(
  Transform.of(
    Step(
      "test_centred",
      _centred,
      scope=lambda: "leaf",
      **cuts(_medians, _middle),
    ),
    {},
  ),
  pj.merging.mean(),
)


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
@pytest.mark.parametrize(
  "method", [ANGLES, CENTRED, DROPPED], ids=["gram", "cuts", "random"]
)
def test_only_small_sums_are_sent(method, mesh, request):
  base, others = models(2)
  auto = mesh == "mesh_auto"
  mesh = request.getfixturevalue(mesh)
  wanted = pj.merge(base, others, method)
  base, others = put(base, mesh), [put(x, mesh) for x in others]
  merge = jax.jit(lambda b, o: pj.merge(b, o, method))
  text = merge.lower(base, others).compile().as_text()
  found = COLLECTIVE.findall(text)
  assert bool(found) == (method is not DROPPED)
  for shape, operation in found:
    assert numbers(passes(shape)) <= 128, (shape, operation)
    # On a mesh that a jit cannot see, a few partial counts may be gathered.
    if not auto:
      assert operation == "all-reduce"
      assert numbers(passes(shape)) <= 2 * 2 * 5
  # One sum a leaf, for the Gram matrix or in each pass for the cuts, and one
  # before; those of both leaves may be sent together.
  if not auto:
    assert len(found) <= (2 if method is ANGLES else 4)
  merged = merge(base, others)
  for x, y in zip(floats(merged), floats(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [ANGLES, CENTRED], ids=["gram", "cuts"])
def test_known_auto_mesh_sends_one_small_sum(method, mesh_auto):
  """Eagerly an Auto mesh is known by the arrays."""
  base, others = models(2)
  base, others = put(base, mesh_auto), [put(x, mesh_auto) for x in others]
  x, xs = base["block"]["kernel"], [y["block"]["kernel"] for y in others]
  leaf = placement.leaf_of(x)
  stages = method.stages
  plan = leafwise.Plan(stages, method.space == "params")
  (step, options) = stages[0]
  start = step.start({}, [x.shape], 2, **dict(options))

  def count(x, xs):
    state, shared = ({},) * len(stages), (start,) + (None,) * (len(stages) - 1)
    number = len(plan.counts(0)) - 1
    return leafwise.count(plan, 0, number, leaf, x, tuple(xs), state, shared)

  found = collectives(count, x, xs)
  assert [operation for _, operation in found] == ["all-reduce"]
  assert numbers(found[0][0]) <= 2 * 2 * 5


def test_counting_keeps_no_copy():
  x = np.zeros((256, 1024), np.float32)
  compiled = jax.jit(lambda x: top_k.kth_magnitude(x, 100)).lower(x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 50


@pytest.mark.parametrize(
  "method, copies",
  [
    (pj.merging.ties(scope="leaf"), 0.05),
    (pj.merging.ties(flavour="mergekit"), 0.05),  # ties at the cut are told
    (pj.merging.sce(density=0.3, flavour="mergekit"), 1.3),  # keys, sums
  ],
  ids=["cuts", "exact", "kept"],
)
def test_a_leaf_is_merged_without_copies(method, copies):
  """Task vectors and indices are computed when they are read."""
  x = np.zeros((256, 2048), np.float32)
  merge = jax.jit(lambda x, y: pj.merge({"w": x}, [{"w": y}] * 2, method))
  stats = merge.lower(x, x).compile().memory_analysis()
  assert stats.temp_size_in_bytes < copies * x.nbytes


@pytest.mark.parametrize("count", [8, 4, 3])
@pytest.mark.parametrize("name", ["tsv_m", "iso_cts"])
def test_each_device_decomposes_some_of_the_tasks(name, count, mesh_explicit):
  rng = np.random.default_rng(0)
  base, *others = (
    {"w": rng.standard_normal((48, 32)).astype(np.float32)}
    for _ in range(count + 1)
  )
  method = getattr(pj.merging, name)()
  wanted = pj.merge(base, others, method)["w"]
  sharding = jax.sharding.NamedSharding(mesh_explicit, jax.P("x", "y"))
  base, *others = (jax.device_put(x, sharding) for x in (base, *others))
  merge = jax.jit(lambda b, o: pj.merge(b, o, method))
  text = merge.lower(base, others).compile().as_text()
  svds = re.findall(r"f32\[([\d,]+)\]\S* custom-call\(.*gesdd", text) + (
    re.findall(r"= \(f32\[([\d,]+)\].*custom-call\(.*gesdd", text)
  )
  batches = [int(dims.split(",")[0]) for dims in svds if dims.count(",") == 3]
  whole = 48 * 32
  sent = COLLECTIVE.findall(text)
  if count % 2 == 0:
    # On 4 x 2 devices 8 and 4 tasks are cut into parts, 3 are not.
    assert batches == [1]
    gathered = [numbers(s) for s, kind in sent if kind == "all-gather"]
    # What is gathered are the vectors that are kept, of all tasks together.
    assert max(gathered, default=0) <= whole
    assert "all-to-all" in {kind for _, kind in sent}
  else:
    assert batches == [3]
  np.testing.assert_allclose(merge(base, others)["w"], wanted, atol=1e-4)
