"""Numbers and methods that differ by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches.perleaf import PerLeaf, per_leaf
from patchjax.trees.errors import SelectionError, StructureError
from tests.merging.models import models, put, same_bits


def layers(*values):
  """A model of single numbers: layers, an embedding, a norm."""
  return {
    "embed": np.float32([values[0]]),
    "layers": [{"w": np.float32([v])} for v in values],
    "norm": np.float32([values[-1]]),
  }


def test_gradients_are_those_of_mergekit():
  params = layers(*range(5))
  found = per_leaf(params, {".*": [0.0, 1.0, 4.0]}).values
  # t = layer / (n - 1) of the way through the list; others at its start.
  expected = {0: 0.0, 1: 0.5, 2: 1.0, 3: 2.5, 4: 4.0}
  assert {i: found[f"layers/{i}/w"] for i in range(5)} == expected
  assert found["embed"] == found["norm"] == 0.0
  one = per_leaf({"a.7.w": np.zeros(1)}, {".*": [2.0, 3.0]})
  assert one.at("a.7.w") == 3.0
  assert per_leaf(params, {".*": [2]}).at("layers/3/w") == 2.0


@pytest.mark.parametrize(
  "name", ["h_{}/w", "model.layers.{}.w", "{}", "l/{}/0"]
)
def test_layers_are_found_in_names(name):
  params = pj.trees.nested({name.format(i): np.zeros(1) for i in (4, 5, 6)})
  found = per_leaf(params, {".*": [0.0, 1.0]}).values
  assert sorted(found.values()) == [0.0, 0.5, 1.0]


def test_first_rule_wins_and_default_fills():
  params = layers(1, 2)
  found = per_leaf(
    params, {"layers/1.*": 3, "layers.*": (1, 2)}, default=0.5
  ).values
  assert found["layers/1/w"] == 3.0 and found["norm"] == 0.5
  assert found["layers/0/w"].tolist() == [1.0, 2.0]
  with pytest.raises(SelectionError, match="nope"):
    per_leaf(params, {"nope": 1.0})
  with pytest.raises(SelectionError, match="is empty"):
    per_leaf(params, {".*": []})
  with pytest.raises(SelectionError, match="no number is given for the leaf"):
    per_leaf(params, {"norm": 1.0}).at("embed")


@pytest.mark.parametrize("run", [pj.merge, jax.jit(pj.merge)])
def test_scales_and_weights_by_leaf(run):
  base, one, two = layers(0, 0, 0), layers(1, 1, 1), layers(2, 4, 8)
  scale = per_leaf(base, {"layers.*": [1.0, 3.0]}, default=10.0)
  weights = per_leaf(base, {"norm": (0.0, 1.0)}, default=(1.0, 0.5))
  method = pj.merging.task_arithmetic(scale=scale, weights=weights)
  merged = run(base, [one, two], method)
  assert [x["w"].tolist() for x in merged["layers"]] == [[2.0], [6.0], [15.0]]
  assert merged["embed"].tolist() == [20.0]
  assert merged["norm"].tolist() == [80.0]


def test_density_by_leaf_needs_the_scope_of_a_leaf():
  base, others = models(2)
  density = per_leaf(base, {"block.*": 0.1}, default=1.0)
  merged = pj.merge(
    base, others, pj.merging.ties(density=density, scope="leaf")
  )
  for key, share in (("block", 0.1), ("heads", 1.0)):
    alone = pj.merging.ties(density=share, scope="leaf")
    part = pj.merge({key: base[key]}, [{key: x[key]} for x in others], alone)
    whole = pj.merge(base, others, alone)
    # The sign of entries that cancel is elected by the whole model.
    assert same_bits(merged[key], whole[key]) or same_bits(merged[key], part)
  with pytest.raises(SelectionError, match="scope='leaf'"):
    pj.merge(base, others, pj.merging.ties(density=density))


def test_gradient_lists_are_learned():
  base, one = layers(0, 0, 0), layers(1, 1, 1)

  @jax.jit
  def loss(knots):
    scale = per_leaf(base, {"layers.*": list(knots)}, default=1.0)
    merged = pj.merge(base, [one], pj.merging.task_arithmetic(scale=scale))
    return jnp.sum(jnp.concatenate([x["w"] for x in merged["layers"]]))

  np.testing.assert_allclose(jax.grad(loss)(jnp.float32([1, 2])), [1.5, 1.5])


def test_other_numbers_do_not_compile_again():
  base, others = models(2)

  def run(low):
    scale = per_leaf(base, {"block.*": low}, default=1.0)
    return pj.merge(base, others, pj.merging.task_arithmetic(scale=scale))

  first = run(0.5)
  with jax.no_tracing():
    second = run(2)
  assert not same_bits(first["block"], second["block"])
  assert same_bits(first["heads"], second["heads"])


def test_is_a_pytree():
  found = jax.tree.map(lambda x: 2 * x, PerLeaf({"a": 1.0, "b": 2.0}))
  assert found == PerLeaf({"a": 2.0, "b": 4.0})
  state = pj.merging.task_arithmetic(scale=found).init({"a": 0.0})
  assert state[1]["scale"].at("b").dtype == jnp.float32


METHODS = {
  ".*kernel": pj.merging.ties(density=0.2),
  "heads.*": pj.merging.linear(weights=[1.0, 3.0]),
}


@pytest.mark.parametrize("place", ["single", "mesh_explicit"])
def test_a_method_for_each_group(place, request):
  base, others = models(2)
  kernel = pj.merge(
    base["block"], [x["block"] for x in others], METHODS[".*kernel"]
  )
  heads = pj.merge(None, [x["heads"] for x in others], METHODS["heads.*"])
  if place != "single":
    mesh = request.getfixturevalue(place)
    base, others = put(base, mesh), [put(x, mesh) for x in others]
  for run in (pj.merge, jax.jit(lambda b, o: pj.merge(b, o, METHODS))):
    merged = (
      run(base, others, METHODS) if run is pj.merge else run(base, others)
    )
    assert same_bits(merged["block"], kernel)
    assert same_bits(merged["heads"], heads)


def test_groups():
  base, others = models(2)
  # The first that picks a leaf decides; what none picks stays.
  method = {"block.*": pj.merging.mean(), "block/k.*": pj.merging.ties()}
  merged = pj.merge(base, others, method)
  alone = pj.merge(base, others, pj.merging.mean())
  assert same_bits(merged["block"], alone["block"])
  assert merged["heads"][0] is base["heads"][0]
  first = pj.merge(None, others, {"heads.*": pj.merging.linear()})
  assert first["block"]["kernel"] is others[0]["block"]["kernel"]
  with pytest.raises(StructureError, match="needs the base"):
    pj.merge(None, others, METHODS)
  with pytest.raises(SelectionError, match="nope"):
    pj.merge(base, others, {"nope": pj.merging.mean()})
  state = {"heads.*": pj.merging.linear(weights=[1.0, 0.0]).init(base)}
  taken = pj.merge(base, others, {"heads.*": METHODS["heads.*"]}, state=state)
  assert same_bits(taken["heads"], others[0]["heads"])
