"""What a merge sends between devices: counts, never parameters."""

import re

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import counting, placement, selection
from tests.merging.models import models, put

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


def test_selection_sends_one_small_sum_a_pass(mesh_explicit):
  x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh_explicit, jax.P("x", "y"))
  x = jax.device_put(x, sharding)
  found = collectives(lambda x: selection.kth_magnitude(x, 100), x)
  assert [operation for _, operation in found] == ["all-reduce"]
  assert found[0][0].startswith("s32[2,5]")


def test_known_auto_mesh_sends_one_small_sum_a_pass(mesh_auto):
  x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh_auto, jax.P("x", "y"))
  leaf = placement.leaf_of(jax.device_put(x, sharding))
  state = selection.search(counting.limbs(100))

  def count(x):
    return placement.sum_over_shards(selection.count_keys, x, leaf, state)

  found = collectives(count, jax.device_put(x, sharding))
  assert [operation for _, operation in found] == ["all-reduce"]
  assert found[0][0].startswith("s32[2,5]")


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
    assert numbers(shape) <= 128, (shape, operation)


@pytest.mark.parametrize("mesh", ["mesh_auto", "mesh_explicit"])
def test_linear_sends_nothing(mesh, request):
  base, others = models(2)
  mesh = request.getfixturevalue(mesh)
  base, others = put(base, mesh), [put(x, mesh) for x in others]
  method = pj.merging.linear(weights=[1.0, 2.0])
  assert not collectives(lambda b, o: pj.merge(b, o, method), base, others)


def test_counting_keeps_no_copy():
  x = np.zeros((256, 1024), np.float32)
  compiled = (
    jax.jit(lambda x: selection.kth_magnitude(x, 100)).lower(x).compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 50
