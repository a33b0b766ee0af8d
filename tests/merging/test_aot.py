"""Merges compiled for meshes: what they would send, without any parameters."""

import math

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import merging_aot

P = jax.sharding.PartitionSpec


METHODS = ("linear", "slerp", "ties, tree")


class Tiny(merging_aot.Llama):
  """Of two kinds of leaves."""

  def leaves(self):
    return {
      "gate, up": ((64, 96), P("fsdp", "tensor"), 4),
      "norms": ((64,), P("fsdp"), 5),
    }


@pytest.fixture(scope="module")
def programs():
  mesh = merging_aot.mesh_of(8)
  model = Tiny(2, 64, 96, 16, 128)
  return merging_aot.programs(model, mesh, only=METHODS)


def test_only_small_sums_are_sent(programs):
  # `programs` has checked each; here is what is left.
  assert tuple(programs) == METHODS
  for name, made in programs.items():
    for _, program in made:
      assert set(program.sent) == (
        {"all-reduce"} if name != "linear" else set()
      )


def test_memory_beside_arguments_and_result_is_small(programs):
  for made in programs.values():
    for _, program in made:
      assert program.temporary < 100_000


def test_leaves_of_one_kind_share_a_program(programs):
  assert [number for number, _ in programs["linear"]] == [4, 5]
  ((number, tree),) = programs["ties, tree"]
  assert number == 3
  # Base and four contributors, bfloat16, an eighth of the matrices and a
  # half of the norms, which lie on one axis of two.
  fsdp = merging_aot.mesh_of(8).shape["fsdp"]
  size = 2 * (4 * 64 * 96 // 8 + 5 * 64 // fsdp)
  assert tree.arguments == pytest.approx(5 * size, rel=0.02)


def test_what_sends_parameters_is_found():
  mesh = merging_aot.mesh_of(8)
  x = merging_aot.abstract((64, 32), P("fsdp", "tensor"), mesh, jnp.float32)

  def gathers(x):
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, P()))

  text = jax.jit(gathers).lower(x).compile().as_text()
  sent = merging_aot.sent(text)
  assert sent["all-gather"][1] >= 32 * 64 * 4 // 2
  with pytest.raises(AssertionError, match="parameters are sent"):
    merging_aot.Program(sent, 0, 0, 0).check()


def test_sizes_are_those_of_the_models():
  assert merging_aot.MODELS["70b"].size == pytest.approx(70.55e9, rel=1e-3)
  assert merging_aot.MODELS["405b"].size == pytest.approx(405.85e9, rel=1e-3)
  for model in merging_aot.MODELS.values():
    stacked = (math.prod(shape) for shape, _ in model.stacked().values())
    assert sum(stacked) == model.size
