"""Methods that choose among contributors, and masks of single tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import SelectionError
from tests.merging.models import same_bits
from tests.merging.test_sparse_methods import check, given, put, ragged
from tests.reference import merging_selective as reference


@pytest.mark.parametrize("flavour", ["paper", "mergekit"])
def test_sce_of_ragged_leaves(flavour):
  for ties in (True, False):
    base, others = given(ties=ties)
    if not ties:  # Of three the variances tie but for their rounding.
      others.append({**others[0], "stack": others[1]["stack"]})
    for density in (0.01, 0.4, 0.7, 1.0):
      method = pj.merging.sce(density=density, flavour=flavour)
      check(
        pj.merge(base, others, method),
        reference.sce(base, others, density=density, flavour=flavour),
      )


def test_sce_of_what_nobody_changed_is_the_base():
  base, _ = given(ties=False)
  for flavour in ("paper", "mergekit"):
    method = pj.merging.sce(density=0.5, flavour=flavour)
    copies = [{k: x.copy() for k, x in base.items()} for _ in range(2)]
    assert same_bits(pj.merge(base, copies, method), base)


@pytest.mark.parametrize("flavour", ["paper", "mergekit"])
def test_ram_of_ragged_leaves(flavour):
  base, others = given(ties=True)
  # One contributor that has nothing of its own, and one that has nothing.
  others += [dict(others[0]), dict(base)]
  check(pj.merge(base, others, pj.merging.ram()), reference.ram(base, others))
  numbers = {"r": 0.7, "threshold": 1.5}
  check(
    pj.merge(base, others, pj.merging.ramplus(**numbers, flavour=flavour)),
    reference.ramplus(base, others, **numbers, flavour=flavour),
  )


@pytest.mark.parametrize("flavour", ["paper", "mergekit"])
def test_nearswap_at_its_ends(flavour):
  base, (other, _) = given(ties=True)
  for t in (0.0, 1e-7, 1.0, 2.5):
    check(
      pj.merge(base, [other], pj.merging.nearswap(t=t, flavour=flavour)),
      reference.nearswap(base, [other], t=t, flavour=flavour),
    )
  near = {"w": np.float32([0, 0])}
  far = {"w": np.float32([5e-7, 1])}
  found = pj.merge(near, [far], pj.merging.nearswap(t=1e-6, flavour=flavour))
  np.testing.assert_allclose(found["w"], [5e-7, 1e-6], rtol=1e-6)
  floored = pj.merge(near, [far], pj.merging.nearswap(t=5e-7, flavour=flavour))
  wanted = 2.5e-7 if flavour == "mergekit" else 5e-7
  np.testing.assert_allclose(floored["w"], [wanted, 5e-7], rtol=1e-6)


def test_nearswap_has_a_derivative():
  base = {"w": np.float32([0, 0, 0])}
  tuned = {"w": np.float32([0, 1, -2])}

  def loss(t):
    return jnp.sum(pj.merge(base, [tuned], pj.merging.nearswap(t=t))["w"])

  np.testing.assert_allclose(jax.grad(loss)(jnp.float32(1.5)), -1)
  np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.5)), 0)


def test_arcee_fusion_of_ragged_leaves(mesh_explicit):
  base, (other, _) = given(ties=False)
  method = pj.merging.arcee_fusion()
  found = pj.merge(base, [other], method)
  check(found, reference.arcee_fusion(base, [other]))
  on_mesh = pj.merge(
    put(base, mesh_explicit), [put(other, mesh_explicit)], method
  )
  check(on_mesh, {name: np.asarray(x) for name, x in found.items()})


@pytest.mark.parametrize("name", ["arcee_fusion", "nearswap"])
def test_one_contributor_only(name):
  base, others = given(ties=True)
  method = getattr(pj.merging, name)(**({"t": 1.0} if "near" in name else {}))
  with pytest.raises(SelectionError, match="one contributor, got 2"):
    pj.merge(base, others, method)


def test_of_equal_magnitudes_the_last_is_the_largest():
  base = {"w": np.zeros(3, np.float32)}
  others = [{"w": np.float32(x)} for x in ([1, -2, 0], [-1, 1, 0], [1, 2, 0])]
  method = pj.merging.magmax(scale=1.0)
  assert pj.merge(base, others, method)["w"].tolist() == [1, 2, 0]
  assert pj.merge(base, others[:2], method)["w"].tolist() == [-1, -2, 0]


def test_tall_masks_and_consensus():
  base, others = given(ties=True)
  others.append(ragged(3, ties=True))
  ratios = [0.2, 0.4, 0.6]
  wanted = reference.tall_masks(base, others, threshold=ratios)
  patches = [others[0], pj.diff(base, others[1]), others[2]]
  found = pj.merging.tall_masks(base, patches, threshold=ratios)
  for mask, expected in zip(found, wanted, strict=True):
    for name, x in expected.items():
      assert mask[name].dtype == bool
      np.testing.assert_array_equal(mask[name], x)
  for agreement in (1, 2, 3):
    numbers = {"threshold": ratios, "agreement": agreement, "scale": 0.3}
    check(
      pj.merge(base, others, pj.merging.consensus_ta(**numbers)),
      reference.consensus_ta(base, others, **numbers),
    )


def test_masks_have_the_structure_of_the_base():
  base = {"a": [np.zeros(2, np.float32)], "n": np.int32([1, 2])}
  tuned = {"a": [np.ones(2, np.float32)], "n": np.int32([1, 2])}
  for make in (pj.merging.tall_masks, pj.merging.emr_masks):
    masks = make(base, [tuned, base])
    assert jax.tree.structure(masks[0]) == jax.tree.structure(base)
    assert np.asarray(masks[0]["a"][0]).all()
    assert not masks[0]["n"].any() and masks[0]["n"].dtype == bool


def test_emr(mesh_explicit):
  base, others = given(ties=True)
  others.append(ragged(3, ties=True))
  unified, wanted = reference.emr_unified(base, others)
  check(pj.merge(base, others, pj.merging.emr()), reference.emr(base, others))
  found = pj.merging.emr_masks(base, others)
  for mask, expected in zip(found, wanted, strict=True):
    for name, x in expected.items():
      np.testing.assert_array_equal(mask[name], x)
  rescalers = reference.emr_rescalers(base, others)
  np.testing.assert_allclose(
    pj.merging.emr_rescalers(base, others), rescalers, rtol=1e-6
  )
  on_mesh = (put(base, mesh_explicit), [put(x, mesh_explicit) for x in others])
  masks = pj.merging.emr_masks(*on_mesh)
  assert all(same_bits(x, y) for x, y in zip(masks, found))
  np.testing.assert_allclose(
    pj.merging.emr_rescalers(*on_mesh), rescalers, rtol=1e-6
  )


def test_one_task_is_recovered_from_emr():
  base, (other, _) = given(ties=False)
  merged = pj.merge(base, [other], pj.merging.emr())
  check(merged, other)
  (mask,) = pj.merging.emr_masks(base, [other])
  assert all(np.asarray(x).all() for x in mask.values())
  np.testing.assert_allclose(pj.merging.emr_rescalers(base, [other]), [1.0])


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_pcb_over_a_ragged_tree(density):
  base, others = given(ties=False)
  method = pj.merging.pcb(density=density, scale=1.2)
  check(
    pj.merge(base, others, method),
    reference.pcb(base, others, density=density, scale=1.2),
  )


def test_densities_have_no_derivative():
  base = {"w": np.zeros((4, 6), np.float32)}
  others = [{"w": np.full((4, 6), x, np.float32)} for x in (1, 2)]
  for make in (pj.merging.sce, pj.merging.pcb):

    def loss(density, make=make):
      return jnp.sum(pj.merge(base, others, make(density=density))["w"])

    with pytest.raises(SelectionError, match="has no derivative"):
      jax.grad(loss)(0.3)
