"""apply and revert: every law and code, every placement, every transform."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.patches import Delta, Dense, LowRank, Patch, Sparse
from patchjax.patches.pinned import apply_host
from patchjax.trees.errors import DtypeError, LawError, MismatchError
from tests.patches import cases

ALL = pytest.mark.parametrize("law, code", cases.LAW_CODES)


@ALL
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_equals_numpy(law, code, dtype, jit):
  case = cases.make(law, code, dtype)
  apply = jax.jit(pj.apply) if jit else pj.apply
  cases.check(apply(case.base, case.patch), case)


@ALL
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: d.__name__)
def test_pinned_equals_numpy(law, code, dtype):
  case = cases.make(law, code, dtype)
  found = apply_host(case.base["w"], case.patch.deltas["w"])
  assert type(found) is np.ndarray
  cases.check({"w": found, "other": case.base["other"]}, case)


@ALL
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [jax.P("x", "y"), jax.P(None, "x")], ids=str)
def test_keeps_sharding(law, code, kind, spec, request):
  mesh = request.getfixturevalue(f"mesh_{kind}")
  case = cases.make(law, code)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  base = cases.place(case.base, sharding)
  compiled = jax.jit(pj.apply).lower(base, case.patch).compile()
  assert "all-gather" not in compiled.as_text()
  for apply in (pj.apply, compiled):
    found = apply(base, case.patch)
    assert found["w"].sharding.is_equivalent_to(sharding, 2)
    cases.check(found, case)


@ALL
def test_revert_undoes(law, code):
  case = cases.make(law, code)
  changed = pj.apply(case.base, case.patch)
  if law == "set":
    with pytest.raises(LawError, match="old numbers of w"):
      pj.revert(changed, case.patch)
    return
  back = np.asarray(pj.revert(changed, case.patch)["w"])
  if law == "bits":
    np.testing.assert_array_equal(back, case.base["w"])
  else:
    # What was multiplied by zero is lost.
    known = np.isfinite(back)
    assert known.mean() > 0.8
    np.testing.assert_allclose(back[known], case.base["w"][known], 1e-4, 1e-5)


@ALL
def test_adam_trains_only_what_it_may(law, code):
  case = cases.make(law, code)
  values, rebuild = pj.trainable(case.patch)
  optimizer = optax.adam(1e-2)

  def loss(values):
    params = pj.apply(case.base, rebuild(values))
    return jnp.sum(jnp.square(params["w"].astype(jnp.float32)))

  @jax.jit
  def step(values, state):
    # optax itself is not written for strict promotion.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(jax.grad(loss)(values), state, values)
    return optax.apply_updates(values, updates), state

  state, first = optimizer.init(values), loss(values)
  for _ in range(5):
    values, state = step(values, state)
  trains = law != "bits" and not code.endswith("quantized")
  assert bool(values) == trains
  assert (loss(values) < first) == trains
  # All that is not trainable is there, the very same.
  old, new = case.patch.deltas["w"].code, rebuild(values).deltas["w"].code
  for field in ("indices", "words", "scales", "scale"):
    if hasattr(old, field):
      np.testing.assert_array_equal(getattr(old, field), getattr(new, field))
  params = np.asarray(pj.apply(case.base, rebuild(values))["w"])
  if isinstance(old, Sparse):
    flat = np.ones(params.size, bool)
    flat[old.indices[old.indices < old.end]] = False
    untouched = params.reshape(-1)[flat]
    np.testing.assert_array_equal(untouched, case.base["w"].reshape(-1)[flat])


@pytest.mark.parametrize("code", ["quantized", "sparse_quantized", "low_rank"])
def test_scales_are_trained_when_asked(code):
  case = cases.make("add", code)
  values, rebuild = pj.trainable(case.patch, scales=True)
  plain, _ = pj.trainable(case.patch)
  assert len(values["w"]) == len(plain.get("w", {})) + 1
  doubled = rebuild(jax.tree.map(lambda x: 2 * jnp.asarray(x), values))
  factor = 8 if code == "low_rank" else 2
  np.testing.assert_allclose(
    np.asarray(doubled.deltas["w"].code.dense(np.float32)),
    factor * np.asarray(case.patch.deltas["w"].code.dense(np.float32)),
    1e-5,
  )


@ALL
def test_stacked_patches_vmap(law, code):
  made = [cases.make(law, code, seed=seed) for seed in (0, 5)]
  base = made[0].base
  patches = [m.patch for m in made]
  found = jax.vmap(lambda p: pj.apply(base, p))(pj.stack(patches))
  for i, patch in enumerate(patches):
    one = pj.apply(base, patch)
    np.testing.assert_allclose(
      np.asarray(found["w"][i]), np.asarray(one["w"]), 1e-6
    )


def test_stack_pads_sparse_deltas():
  base = {"w": cases.random(0)}
  patches = [
    Patch(
      {
        "w": Delta(
          Sparse(cases.random(n, (n,)), np.arange(n, dtype="i4"), cases.SHAPE),
          "add",
        )
      }
    )
    for n in (2, 5)
  ]
  many = pj.stack([pj.stack(patches[:1]), pj.stack(patches[:1])])
  assert many.deltas["w"].code.indices.shape == (2, 1, 2)
  many = pj.stack(patches)
  indices = np.asarray(many.deltas["w"].code.indices)
  assert all(len(set(row)) == 5 for row in indices)  # unique, as promised
  found = jax.vmap(lambda p: pj.apply(base, p))(many)
  for i, patch in enumerate(patches):
    np.testing.assert_array_equal(
      np.asarray(found["w"][i]), np.asarray(pj.apply(base, patch)["w"])
    )


@pytest.mark.parametrize("code", list(cases.CODES))
def test_inside_scan_remat_and_shard_map(code, mesh_auto):
  case = cases.make("add", code)

  def twice(base):
    def body(base, _):
      return jax.checkpoint(pj.apply)(base, case.patch), None

    return jax.lax.scan(body, base, length=2)[0]

  expected = pj.apply(pj.apply(case.base, case.patch), case.patch)
  np.testing.assert_allclose(
    np.asarray(twice(case.base)["w"]), np.asarray(expected["w"]), 1e-5, 1e-6
  )
  # A replicated tree, patched by every device of a mesh.
  mapped = jax.shard_map(
    lambda b, p: pj.apply(b, p),
    mesh=mesh_auto,
    in_specs=jax.P(),
    out_specs=jax.P(),
  )
  cases.check(mapped(case.base, case.patch), case)


def test_two_bases_of_one_structure_trace_once():
  case, other = cases.make("add", "sparse"), cases.make("add", "sparse", seed=9)
  traces = []

  @jax.jit
  def apply(base, patch):
    traces.append(1)
    return pj.apply(base, patch)

  apply(case.base, case.patch.replace(base="a" * 64))
  apply(other.base, other.patch.replace(base="b" * 64))
  assert len(traces) == 1


def test_dtype_keeps_updates_that_rounding_swallows():
  base = {"w": np.ones(4, ml_dtypes.bfloat16), "n": np.int32(1)}
  patch = Patch({"w": Delta(Dense(np.full(4, 1e-4, np.float32)), "add")})
  assert (np.asarray(pj.apply(base, patch)["w"]) == 1).all()
  found = pj.apply(base, patch, dtype=jnp.float32)
  assert found["w"].dtype == jnp.float32
  np.testing.assert_array_equal(
    np.asarray(found["w"]), np.float32(1) + np.float32(1e-4)
  )
  assert found["n"] is base["n"]


def test_untouched_entries_keep_their_bits():
  odd = np.uint32([0x7FC00001, 0x80000000, 1, 0x7F800000]).view(np.float32)
  patch = Patch(
    {"w": Delta(Sparse(np.float32([1]), np.int32([3]), (4,)), "add")}
  )
  found = np.asarray(pj.apply({"w": odd}, patch)["w"])
  np.testing.assert_array_equal(
    found.view(np.uint32)[:3], odd.view(np.uint32)[:3]
  )


def test_donation_reuses_the_buffer():
  case = cases.make("add", "dense")
  base = {name: jnp.array(leaf) for name, leaf in case.base.items()}
  found = pj.apply(base, case.patch, donate=True)
  assert base["w"].is_deleted() and not base["other"].is_deleted()
  cases.check({"w": found["w"], "other": base["other"]}, case)


def test_a_patch_of_many_leaves_costs_one_program_a_shape():
  # A shape that no other test has compiled.
  base = {f"layer{i}": cases.random(i, (7, 13)) for i in range(6)}
  patch = Patch(
    {name: Delta(Dense(leaf.copy()), "mul") for name, leaf in base.items()}
  )
  compiled = []

  def note(event, *_, **__):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  pj.apply(base, patch)
  jax.monitoring.clear_event_listeners()
  assert sum("backend_compile" in event for event in compiled) == 1


def test_abstract_evaluation():
  case = cases.make("add", "low_rank", ml_dtypes.bfloat16)
  shapes = jax.eval_shape(pj.apply, case.base, case.patch)
  assert shapes["w"].dtype == jnp.bfloat16


def test_low_rank_on_stacked_and_many_axes():
  # [layers, in, heads, head] as one product a layer.
  a, b = cases.random(0, (2, 5, 3)), cases.random(1, (2, 3, 4, 6))
  base = {"w": cases.random(2, (2, 5, 4, 6))}
  patch = Patch({"w": Delta(LowRank(a, b, np.float32(2), batch=1), "add")})
  expected = base["w"] + 2 * np.einsum("lir,lrhd->lihd", a, b)
  found = np.asarray(pj.apply(base, patch)["w"])
  np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
  pinned = apply_host(base["w"], patch.deltas["w"])
  np.testing.assert_allclose(pinned, expected, 1e-5, 1e-5)
  square = float(np.sum((expected - base["w"]) ** 2))
  np.testing.assert_allclose(float(pj.norm(patch)) ** 2, square, 1e-4)


def test_leaves_past_int32_have_split_positions():
  from patchjax.patches.codes import split_axis, unravel

  shape = (4, 2**15, 2**15)  # 4.3e9 entries
  axis = split_axis(shape)
  assert axis == 1
  at = np.int32([[0, 5], [3, 2**30 - 1]])
  parts = unravel(at, shape)
  assert [p.tolist() for p in parts] == [[0, 3], [0, 32767], [5, 32767]]
  patch = Patch({"w": Delta(Sparse(np.float32([1, 2]), at, shape), "add")})
  base = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  assert jax.eval_shape(pj.apply, base, patch)["w"].shape == shape


def test_wide_leaves_stay_exact_outside_jit_and_are_refused_inside():
  old = {"n": np.int64([2**53 + 1]), "x": np.float64([0.1])}
  new = {"n": np.int64([-(2**60) - 1]), "x": np.float64([np.pi])}
  patch = pj.diff(old, new, exact=True)
  found = pj.apply(old, patch)
  assert found["n"].dtype == np.int64
  np.testing.assert_array_equal(found["n"], new["n"])
  np.testing.assert_array_equal(found["x"], new["x"])
  back = pj.revert(found, patch)
  np.testing.assert_array_equal(back["n"], old["n"])
  with pytest.raises(DtypeError, match="x: .*jax_enable_x64"):
    jax.jit(lambda p: pj.apply({"x": old["x"]}, p))(
      Patch({"x": Delta(Dense(np.float32([1])), "add")})
    )


class TestMisfits:
  base = {"a": {"w": np.zeros((2, 3), np.float32)}, "b": np.zeros(2, "f4")}

  def patch(self):
    new = jax.tree.map(lambda x: x + 1, self.base)
    return pj.diff(self.base, new)

  def test_missing(self):
    with pytest.raises(MismatchError, match=r"(?s)1 missing.* - b: float32\[2"):
      pj.apply({"a": self.base["a"]}, self.patch())
    found = pj.apply({"a": self.base["a"]}, self.patch(), missing="keep")
    assert np.asarray(found["a"]["w"]).sum() == 6

  def test_extra(self):
    more = self.base | {"c": np.zeros(1, "f4")}
    with pytest.raises(MismatchError, match=r"(?s)1 extra.* \+ c: float32\[1"):
      pj.apply(more, self.patch())
    assert pj.apply(more, self.patch(), extra="ignore")["c"] is more["c"]

  def test_renamed(self):
    with pytest.raises(MismatchError, match="did you mean 'b'"):
      pj.apply({"a": self.base["a"], "bb": self.base["b"]}, self.patch())

  @pytest.mark.parametrize(
    "leaf, what",
    [
      (np.zeros((3, 2), np.float32), "another shape"),
      (np.zeros((2, 3), np.float16), "another dtype"),
    ],
  )
  def test_shape_and_dtype(self, leaf, what):
    with pytest.raises(MismatchError, match=f"(?s)a/w.*{what}"):
      pj.apply(self.base | {"a": {"w": leaf}}, self.patch())

  def test_all_are_listed(self):
    with pytest.raises(MismatchError) as error:
      pj.apply(
        {"a": {"w": np.zeros(1, "i4")}, "z": self.base["b"]}, self.patch()
      )
    for part in ("- a/w", "+ a/w", "- b", "+ z"):
      assert part in str(error.value)

  def test_no_patch(self):
    with pytest.raises(TypeError, match="expected a Patch, found dict"):
      pj.apply(self.base, self.base)

  def test_arithmetic_on_integers(self):
    patch = Patch({"n": Delta(Dense(np.float32([1])), "add")})
    with pytest.raises(LawError, match="n: there is no arithmetic on int32"):
      pj.apply({"n": np.int32([1])}, patch)
