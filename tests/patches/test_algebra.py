"""compose, +, *, norm, stack and structural patches."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import (
  Delta,
  Dense,
  Insert,
  LowRank,
  Patch,
  Quantized,
  Sparse,
  pinned,
  structure_of,
)
from patchjax.trees.errors import (
  BaseMismatchError,
  DtypeError,
  LawError,
  MismatchError,
  StructureError,
)
from tests.patches import cases


def _two(law, one, other):
  first = cases.make(law, one, seed=1)
  second = cases.make(law, other, seed=2)
  return first.base, first.patch, second.patch


@pytest.mark.parametrize("law", ["add", "mul", "set", "bits"])
@pytest.mark.parametrize("one", cases.CODES)
@pytest.mark.parametrize("other", cases.CODES)
def test_compose_is_one_after_the_other(law, one, other):
  if (law, one) not in cases.LAW_CODES or (law, other) not in cases.LAW_CODES:
    return
  # Under jit only the unions of sparse indices are done in another way.
  jit = law == "add" and "dense" not in (one, other)
  base, first, second = _two(law, one, other)
  expected = np.asarray(pj.apply(pj.apply(base, first), second)["w"])
  for compose in (pj.compose, jax.jit(pj.compose))[: 1 + jit]:
    found = np.asarray(pj.apply(base, compose(first, second))["w"])
    if law in ("set", "bits"):
      np.testing.assert_array_equal(found, expected)
    else:
      np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


def test_sparse_sets_are_not_composed_inside_jit():
  _, first, second = _two("set", "sparse", "sparse")
  with pytest.raises(LawError, match="inside jit"):
    jax.jit(pj.compose)(first, second)


def test_compose_keeps_small_codes_small():
  _, first, second = _two("add", "low_rank", "low_rank")
  code = pj.compose(first, second).deltas["w"].code
  assert isinstance(code, LowRank) and code.rank == 6
  _, first, second = _two("add", "sparse", "sparse")
  code = pj.compose(first, second).deltas["w"].code
  assert isinstance(code, Sparse) and len(code.indices) <= 22
  assert (np.diff(code.indices) > 0).all()


@hypothesis.given(st.lists(st.integers(0, 2**31), min_size=3, max_size=3))
def test_exact_patches_compose_associatively(seeds):
  values = [{"w": cases.random(s)} for s in [*seeds, sum(seeds)]]
  p, q, r = (
    pj.diff(a, b, exact=True) for a, b in zip(values, values[1:], strict=False)
  )
  left = pj.compose(pj.compose(p, q), r)
  right = pj.compose(p, pj.compose(q, r))
  for patch in (left, right):
    found = pj.apply(values[0], patch)["w"]
    np.testing.assert_array_equal(np.asarray(found), values[-1]["w"])


def test_compose_refuses_what_one_delta_cannot_do():
  base = cases.make("add", "dense").base
  add = cases.make("add", "dense").patch
  mul = cases.make("mul", "dense").patch
  with pytest.raises(LawError, match="w: law 'add' and then 'mul'"):
    pj.compose(add, mul)
  rename = pj.patches.restructure(base, rename={"w": "v"})
  with pytest.raises(MismatchError, match="what the first gives"):
    pj.compose(rename, add)


@pytest.mark.parametrize("one", cases.CODES)
@pytest.mark.parametrize("other", cases.CODES)
def test_sum_and_scale(one, other):
  base, first, second = _two("add", one, other)
  total = 0.5 * (first + second)
  delta = sum(
    np.broadcast_to(p.deltas["w"].code.dense(np.float32), cases.SHAPE)
    for p in (first, second)
  )
  np.testing.assert_allclose(
    np.asarray(pj.apply(base, total)["w"]), base["w"] + delta / 2, 1e-4, 1e-5
  )
  np.testing.assert_allclose(
    float(pj.norm(total)), np.linalg.norm(delta) / 2, 1e-4
  )


@pytest.mark.parametrize("code", cases.CODES)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_norm_on_a_mesh(code, kind, request):
  mesh = request.getfixturevalue(f"mesh_{kind}")
  case = cases.make("add", code)
  expected = float(pj.norm(case.patch))
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
  whole = jax.sharding.NamedSharding(mesh, jax.P())
  placed = jax.tree.map(
    lambda x: jax.device_put(x, sharding if x.shape == (16, 8) else whole),
    case.patch,
  )
  np.testing.assert_allclose(float(pj.norm(placed)), expected, 1e-6)
  np.testing.assert_allclose(float(jax.jit(pj.norm)(placed)), expected, 1e-6)


def test_algebra_refuses_other_laws_and_bases():
  add, mul = cases.make("add", "dense").patch, cases.make("mul", "dense").patch
  with pytest.raises(LawError, match=r"w \(mul dense\)"):
    add + mul  # noqa: B018
  with pytest.raises(LawError, match="measured"):
    pj.norm(mul)
  with pytest.raises(LawError, match="scaled"):
    2 * mul  # noqa: B018
  with pytest.raises(BaseMismatchError, match="different bases"):
    add.replace(base="a") + add.replace(base="b")  # noqa: B018
  other = Patch({}, pj.patches.structure_of({"x": np.zeros(1, "f4")}))
  with pytest.raises(MismatchError):
    add + other  # noqa: B018
  with pytest.raises(TypeError):
    add + 1  # noqa: B018


def test_scaling_is_traced_and_differentiable():
  case = cases.make("add", "low_rank")
  numbers = np.asarray(case.patch.deltas["w"].code.dense())

  def total(c):
    return jnp.sum(pj.apply(case.base, c * case.patch)["w"])

  np.testing.assert_allclose(
    float(jax.jit(jax.grad(total))(1.0)), numbers.sum(), 1e-4
  )


def test_stack_refuses_unlike_patches():
  a, b = cases.make("add", "dense").patch, cases.make("add", "sparse").patch
  with pytest.raises(MismatchError, match="w: patch 1 is add sparse"):
    pj.stack([a, b])
  with pytest.raises(MismatchError, match="touches other leaves"):
    pj.stack([a, Patch({}, a.structure)])
  with pytest.raises(StructureError, match="at least one"):
    pj.stack([])


class TestStructural:
  base = {
    "layers": [{"w": cases.random(0)}, {"w": cases.random(1)}],
    "head": {"b": cases.random(3)},
    "by number": {0: cases.random(2), 1: cases.random(4)},
  }

  def test_diff_apply_revert(self):
    new = self.base | {"layers": [self.base["layers"][0]]}
    new["extra"] = {"deep": {"w": np.int32([1])}}
    with pytest.raises(MismatchError):
      pj.diff(self.base, new)
    patch = pj.diff(self.base, new, structural=True)
    found = pj.apply(self.base, patch)
    assert jax.tree.structure(found) == jax.tree.structure(new)
    assert patch.result() == pj.patches.structure_of(new)
    with pytest.raises(LawError, match="layers/1/w"):
      pj.revert(found, patch)

  def test_rename_and_insert_revert(self):
    patch = pj.patches.restructure(
      self.base,
      rename={"head/b": "head/bias"},
      insert={"new/w": np.float32([1])},
    )
    found = pj.apply(self.base, patch)
    assert found["head"]["bias"] is self.base["head"]["b"]
    assert list(found["by number"]) == [0, 1]  # int keys stay int
    back = pj.revert(found, patch)
    assert jax.tree.structure(back) == jax.tree.structure(self.base)

  def test_rows(self):
    rows = cases.random(9, (4, 8))
    patch = Patch(
      {"layers/0/w": Insert(rows, axis=0)},
      pj.patches.structure_of(self.base),
    )
    found = pj.apply(self.base, patch)
    assert found["layers"][0]["w"].shape == (20, 8)
    assert patch.result().leaves["layers/0/w"].shape == (20, 8)
    back = pj.revert(found, patch)
    np.testing.assert_array_equal(
      np.asarray(back["layers"][0]["w"]), self.base["layers"][0]["w"]
    )

  def test_other_containers_need_like(self):
    base = (np.zeros(2, "f4"), np.ones(2, "f4"))
    patch = pj.patches.restructure(base, rename={"0": "2"})
    with pytest.raises(StructureError, match="tuple.*like="):
      pj.apply(base, patch)
    found = pj.apply(base, patch, like={"1": base[1], "2": base[0]})
    assert found["2"] is base[0]

  def test_holes_and_collisions_are_refused(self):
    hole = pj.patches.restructure(self.base, delete=["layers/0/w"])
    with pytest.raises(StructureError, match="gap in the list at layers"):
      pj.apply(self.base, hole)
    with pytest.raises(MismatchError, match="already has head/b"):
      pj.patches.restructure(self.base, insert={"head/b": np.zeros(1)})
    with pytest.raises(MismatchError, match="no leaf 'nope'"):
      pj.patches.restructure(self.base, delete=["nope"])

  def test_compose(self):
    base = {"a": np.float32([1])}
    one = pj.patches.restructure(base, rename={"a": "b"})
    middle = pj.apply(base, one)
    two = pj.patches.restructure(middle, rename={"b": "c"})
    both = pj.compose(one, two)
    assert pj.apply(base, both) == {"c": base["a"]}
    add = Patch({"n": Delta(Dense(np.float32([2])), "add")})
    new = pj.patches.restructure(base, insert={"n": np.float32([1])})
    done = pj.apply(base, pj.compose(new, add))
    assert float(done["n"][0]) == 3

  def test_leaves_may_change_places(self):
    base = {"a": np.float32([1]), "b": np.float32([2, 2])}
    patch = pj.patches.restructure(base, rename={"a": "b", "b": "a"})
    found = pj.apply(base, patch)
    assert {k: v.tolist() for k, v in found.items()} == {"b": [1], "a": [2, 2]}
    back = pj.revert(found, patch)
    assert back["a"].tolist() == [1] and back["b"].tolist() == [2, 2]
    loose = patch.replace(structure=None)
    assert pj.revert(found, loose)["a"].tolist() == [1]

  def test_patches_that_rename_are_renamed(self):
    base = {"model": {"a": np.float32([1]), "c": np.float32([2])}}
    patch = pj.patches.restructure(base, rename={"model/a": "model/b"})
    found = pj.apply(base["model"], patch.rename({"model/(.*)": r"\1"}))
    assert sorted(found) == ["b", "c"]

  def test_compose_refuses_to_lose_a_renamed_leaf(self):
    base = {"a": np.float32([1]), "c": np.float32([2])}
    one = pj.patches.restructure(base, rename={"a": "b"})
    middle = pj.apply(base, one)
    two = pj.patches.restructure(middle, insert={"a": np.float32([3])})
    with pytest.raises(LawError, match="takes its name"):
      pj.compose(one, two)

  def test_a_leaf_below_a_leaf(self):
    base = {"w": np.float32([1])}
    patch = pj.patches.restructure(base, insert={"w/x": np.float32([3])})
    with pytest.raises(StructureError, match="also holds others"):
      pj.apply(base, patch)

  def test_lists_grow_past_ten(self):
    base = [np.float32([0])]
    more = {str(i): np.float32([i]) for i in range(11, 0, -1)}
    patch = pj.patches.restructure(base, insert=more)
    assert [x.item() for x in pj.apply(base, patch)] == list(range(12))


class TestOtherDtypes:
  """Numbers that float32 does not hold."""

  def test_compose_of_64_bits(self):
    a, b, c = ({"w": np.float64([x, 2])} for x in (1.1, 2.3, 7.7))
    exact = pj.compose(pj.diff(a, b, exact=True), pj.diff(b, c, exact=True))
    assert pj.apply(a, exact)["w"].tolist() == [7.7, 2]
    added = pj.compose(pj.diff(a, b), pj.diff(b, c)).deltas["w"].code.values
    np.testing.assert_array_equal(
      added, np.float64([(2.3 - 1.1) + (7.7 - 2.3), 0])
    )
    half = (0.5 * pj.diff(a, b)).deltas["w"].code.values
    np.testing.assert_array_equal(half, np.float64([0.5 * (2.3 - 1.1), 0]))

  def test_compose_of_sparse_64_bits(self):
    code = Sparse(np.float64([1.1]), np.int32([1]), (2,))
    sparse = Patch({"w": Delta(code, "add")})
    dense = Patch({"w": Delta(Dense(np.float64([0.1, 0.2])), "add")})
    both = pj.compose(sparse, dense).deltas["w"].code.values
    np.testing.assert_array_equal(both, np.float64([0.1, 1.1 + 0.2]))
    twice = pj.compose(sparse, sparse).deltas["w"].code
    assert twice.values.tolist() == [2.2]

  def test_64_bits_are_not_stacked(self):
    patch = pj.diff({"w": np.float64([1])}, {"w": np.float64([2])})
    with pytest.raises(DtypeError, match="jax_enable_x64"):
      pj.stack([patch, patch])
    with pytest.raises(DtypeError, match="jax_enable_x64"):
      jax.jit(lambda x: x * patch)(1.0)

  def test_complex_sums(self):
    a, b, c = ({"w": np.complex64([x])} for x in (1, 2j, 5 + 1j))
    for joined in (
      pj.compose(pj.diff(a, b), pj.diff(b, c)),
      pj.diff(a, b) + pj.diff(b, c),
    ):
      assert pj.apply(a, joined)["w"].tolist() == [5 + 1j]

  def test_a_complex_factor_of_real_numbers(self):
    a, b = ({"w": np.float32([x])} for x in (1, 2))
    with pytest.raises(LawError, match="complex factor"):
      _ = 1j * pj.diff(a, b)


def test_sparse_deltas_of_a_leaf_without_axes():
  base = {"s": np.float32(1)}
  code = Sparse(np.float32([2, 9]), np.int32([0, 1]), ())  # one of padding
  patch = Patch({"s": Delta(code, "add")}, structure_of(base))
  assert pj.apply(base, patch)["s"] == pinned.apply_named(base, patch)["s"] == 3
  assert code.dense() == 2


def test_stack_pads_blocks_of_quantized_entries():
  base = {"w": np.zeros(12, np.float32)}

  def patch(count):
    scales = np.arange(1, -(-count // 4) + 1, dtype=np.float32)
    values = Quantized(np.ones(count, np.int8), scales, 8, (4,))
    code = Sparse(values, np.arange(count, dtype=np.int32), (12,))
    return Patch({"w": Delta(code, "add")}, structure_of(base))

  patches = [patch(8), patch(10)]
  found = jax.vmap(lambda p: pj.apply(base, p)["w"])(pj.stack(patches))
  for row, one in zip(found, patches, strict=True):
    np.testing.assert_array_equal(row, pj.apply(base, one)["w"])
