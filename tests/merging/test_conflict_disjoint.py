"""Disjoint supports: the merge is exact and free of order, to the bit."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import patchjax as pj
from tests.merging.models import same_bits

K = 3
SHAPES = {"w": (3, 4), "b": (5,)}
DTYPES = {
  "float32": np.float32,
  "bfloat16": jnp.bfloat16,
}
METHODS = {
  "task arithmetic": pj.merging.task_arithmetic(),
  "ties": pj.merging.ties(density=1.0),
  "ties of mergekit": pj.merging.ties(density=1.0, flavour="mergekit"),
}
# Rounding, cancellation and large numbers, far from the ends.
NUMBERS = st.sampled_from(
  [0.1, -0.1, 1 / 3, 1.0, -1.0, 3e-4, -7e-3, 1000.5, -4096.0, 2.0**-12]
)


# Who changes an entry, -1 for nobody, to be shuffled: as many each time, so
# that sparse patches have one shape and compile once.
OWNERS = {"w": [-1, 0, 1, 2] * 3, "b": [-1, 0, 0, 1, 1]}


@st.composite
def worlds(draw):
  """A base, and changes of which each entry has at most one owner."""
  dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
  base, changes = {}, [{} for _ in range(K)]
  for name, shape in SHAPES.items():
    size = len(OWNERS[name])
    numbers = st.lists(NUMBERS, min_size=size, max_size=size)
    base[name] = np.array(draw(numbers)).reshape(shape).astype(dtype)
    by = np.array(draw(numbers), np.float32).reshape(shape)
    owner = np.array(draw(st.permutations(OWNERS[name]))).reshape(shape)
    for i, change in enumerate(changes):
      change[name] = np.where(owner == i, by, np.float32(0))
  return base, changes


def as_patch(base, change, kind):
  """The change as a patch: of a pytree, dense, or sparse."""
  if kind == "pytree":
    tuned = {
      name: (x.astype(np.float32) + change[name]).astype(x.dtype)
      for name, x in base.items()
    }
    return pj.diff(base, tuned)
  zero = {name: np.zeros_like(change[name]) for name in change}
  patch = pj.diff(zero, change).replace(structure=None)
  return pj.compress(patch) if kind == "sparse" else patch


@pytest.mark.parametrize("kind", ["pytree", "dense", "sparse"])
@settings(max_examples=12)
@given(worlds())
def test_disjoint_changes_merge_to_their_sequence_in_any_order(kind, world):
  base, changes = world
  patches = [as_patch(base, change, kind) for change in changes]
  report = pj.merging.conflicts(base, patches)
  assert report.disjoint and report.total.several == 0
  ordered = []
  for order in itertools.permutations(range(K)):
    value = base
    for i in order:
      value = pj.apply(value, patches[i])
    ordered.append(value)
  assert all(same_bits(ordered[0], other) for other in ordered[1:])
  # What a patch is held as is all the same to what follows its task vector.
  methods = METHODS if kind == "pytree" else ["task arithmetic"]
  for name in methods:
    method = METHODS[name]
    for order in ([0, 1, 2], [2, 0, 1]):
      merged = pj.merge(base, [patches[i] for i in order], method)
      assert same_bits(merged, ordered[0]), name


@settings(max_examples=12)
@given(worlds())
def test_pytrees_count_through_their_difference(world):
  base, changes = world
  tuned = [
    pj.apply(base, as_patch(base, change, "dense")) for change in changes
  ]
  report = pj.merging.conflicts(base, tuned)
  assert report.disjoint
  wanted = base
  for x in tuned:
    wanted = pj.apply(wanted, pj.diff(base, x))
  assert same_bits(pj.merge(base, tuned, METHODS["task arithmetic"]), wanted)


@settings(max_examples=12)
@given(worlds(), st.integers(0, 11), st.integers(0, K - 1))
def test_one_shared_entry_is_no_longer_disjoint(world, at, other):
  base, changes = world
  for i in (other, (other + 1) % K):
    changes[i]["w"].flat[at] = np.float32(0.5)
  patches = [as_patch(base, change, "dense") for change in changes]
  report = pj.merging.conflicts(base, patches)
  assert not report.disjoint
  assert report.total.several == 1


def test_what_the_theorem_leaves_out():
  """Means and rescaling differ where supports are disjoint."""
  base = {"w": np.zeros(4, np.float32)}
  a, b = {"w": np.float32([1, 2, 0, 0])}, {"w": np.float32([0, 0, 3, 4])}
  assert pj.merging.conflicts(base, [a, b]).disjoint
  both = {"w": np.float32([1, 2, 3, 4])}
  for method in (
    pj.merging.linear(),
    pj.merging.task_arithmetic(scale=0.5),
    pj.merging.ties(density=0.1),
  ):
    assert not same_bits(pj.merge(base, [a, b], method), both)


def test_a_finding_is_never_disjoint():
  base = {"w": np.zeros(4, np.float32), "step": np.int32(1)}
  a = {"w": np.float32([1, 0, 0, 0]), "step": np.int32(2)}
  b = {"w": np.float32([0, 1, 0, 0]), "step": np.int32(3)}
  report = pj.merging.conflicts(base, [a, b])
  assert report.total.disjoint and not report.disjoint
