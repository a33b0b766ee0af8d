"""What may be permuted: inferred, given, checked, refused, applied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax import patches as codes
from patchjax.merging import alignment
from patchjax.merging.alignment import assigning, infer_permutations, specs
from patchjax.trees.errors import (
  MismatchError,
  NonFiniteError,
  StructureError,
)
from tests.merging import networks
from tests.merging.networks import drawn
from tests.reference import merging_alignment

# By hand: for each dimension that moves, where it is; and what it is within.
EXPECTED = {
  networks.mlp: [("b0:0 w0:1 w1:0", ""), ("b1:0 w1:1 w2:0", "")],
  networks.residual: [
    ("down:0 up:1 up_bias:0", ""),
    ("down:1 in:1 out:0 up:0", ""),
  ],
  networks.norm_mlp: [
    ("bias:0 down:1 in:1 out:0 scale:0 up:0", ""),
    ("down:0 up:1", ""),
  ],
  networks.attention: [
    ("in:1 k:0 o:1 out:0 q:0 v:0", ""),
    ("k:1 kb:0 o:0 q:1 qb:0 v:1 vb:0", ""),
    ("k:1 kb:0 q:1 qb:0", "heads"),
    ("o:0 v:1 vb:0", "heads"),
  ],
  networks.stacked: [
    ("down:1 up:2", "layers"),
    ("down:2 in:1 out:0 up:1", ""),
  ],
  networks.conv: [("b0:0 c0:3 c1:2 each:3", ""), ("c1:3 out:0", "")],
  networks.tagged: [("embed:1 w:0", ""), ("out:0 w:1", "")],
}
SPECS = {}


def spec_of(network):
  if network not in SPECS:
    params = drawn(networks.SHAPES[network])
    SPECS[network] = infer_permutations(
      network, params, networks.inputs(network)
    )
  return SPECS[network]


def places(spec, name):
  return " ".join(
    f"{leaf}:{i}"
    for leaf, axes in spec.axes.items()
    for i, axis in enumerate(axes)
    if name in axis
  )


@pytest.mark.parametrize("network", EXPECTED, ids=lambda f: f.__name__)
def test_dimensions_are_those_found_by_hand(network):
  spec = spec_of(network)
  outer = {"": 0, "heads": networks.HEADS, "layers": 3}
  found = {
    (places(spec, name), spec.dimensions[name].within) for name in spec.moving
  }
  sizes = {
    (where, sum(spec.dimensions[d].size for d in within))
    for where, within in found
  }
  assert sizes == {(where, outer[kind]) for where, kind in EXPECTED[network]}
  assert spec.error < 1e-5


@pytest.mark.parametrize("network", EXPECTED, ids=lambda f: f.__name__)
def test_a_planted_permutation_is_found(network):
  a, spec = drawn(networks.SHAPES[network]), spec_of(network)
  planted = alignment.random_permutations(spec, 5)
  b = pj.merging.permute(spec, planted, a)
  assert any((a[name] != b[name]).any() for name in a)
  found = pj.merging.weight_matching(spec, a, b)
  back = pj.merging.permute(spec, found, b)
  for name in a:
    np.testing.assert_array_equal(back[name], a[name])
  both = alignment.composed(spec, planted, found)
  for table in both.values():
    assert (table == np.arange(table.shape[-1])).all()


@pytest.mark.parametrize(
  "network",
  [networks.mlp, networks.norm_mlp, networks.attention, networks.conv],
  ids=lambda f: f.__name__,
)
def test_a_planted_permutation_is_found_by_activations(network):
  a, spec = drawn(networks.SHAPES[network]), spec_of(network)
  b = pj.merging.permute(spec, alignment.random_permutations(spec, 6), a)
  x = networks.inputs(network, 3)
  x = np.concatenate([x, 2 * x[:, ::-1]])
  found = pj.merging.activation_matching(spec, network, a, b, x)
  back = pj.merging.permute(spec, found, b)
  for name in a:
    np.testing.assert_array_equal(back[name], a[name])


def test_align_keeps_the_function():
  a, b = (drawn(networks.SHAPES[networks.mlp], seed) for seed in (0, 1))
  x = networks.inputs(networks.mlp)
  spec = spec_of(networks.mlp)
  for by in ("weights", "activations"):
    found = pj.merging.align(networks.mlp, a, b, x, by=by, spec=spec)
    before, after = (networks.mlp(p, x) for p in (b, found.params))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    assert found.agreement[1] > found.agreement[0]


def test_one_hidden_layer_is_matched_optimally():
  from scipy.optimize import linear_sum_assignment

  def net(p, x):
    return jnp.tanh(x @ p["w0"]) @ p["w1"]

  shapes = {"w0": (3, 7), "w1": (7, 2)}
  a, b = drawn(shapes, 0), drawn(shapes, 1)
  spec = infer_permutations(net, a, np.ones((2, 3), np.float32))
  found = pj.merging.weight_matching(spec, a, b)
  likeness = a["w0"].T @ b["w0"] + a["w1"] @ b["w1"].T
  _, best = linear_sum_assignment(likeness, maximize=True)
  assert found["w0:1"].tolist() == best.tolist()


@pytest.mark.parametrize(
  "network", [networks.mlp, networks.norm_mlp], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("seed", range(3))
def test_weight_matching_is_the_algorithm_of_the_paper(network, seed):
  a, b = (drawn(networks.SHAPES[network], i) for i in (seed, seed + 10))
  spec = spec_of(network)
  rng = np.random.default_rng(seed)
  axes = {
    leaf: tuple(f if isinstance(f, str) else None for (f,) in own)
    for leaf, own in spec.axes.items()
  }
  expected, total = merging_alignment.weight_matching(
    axes,
    a,
    b,
    lambda _: [spec.moving[i] for i in rng.permutation(len(spec.moving))],
  )
  found = pj.merging.weight_matching(spec, a, b, seed=seed)
  for name in spec.moving:
    assert found[name].tolist() == expected[name].tolist()
  back = pj.merging.permute(spec, found, b)
  np.testing.assert_allclose(
    sum(np.vdot(a[name], back[name]) for name in a), total, rtol=1e-5
  )


def coded(rng, kind, shape):
  """A code of a delta for a leaf of some shape."""
  full = np.float32(rng.standard_normal(shape))
  if kind == "sparse":
    places = np.sort(rng.choice(full.size, full.size // 3, replace=False))
    return codes.Sparse(full.ravel()[places], places.astype(np.int32), shape)
  if kind == "low rank" and len(shape) == 2:
    a = np.float32(rng.standard_normal((shape[0], 2)))
    b = np.float32(rng.standard_normal((2, shape[1])))
    return codes.LowRank(a, b, np.float32(0.5))
  if kind == "quantized":
    words = rng.integers(-8, 8, shape).astype(np.int8)
    scales = np.ones([1] * len(shape), np.float32)
    return codes.Quantized(words, scales, 4, shape)
  if kind == "one axis" and len(shape) == 2:
    return codes.Dense(full[:, :1])
  return codes.Dense(full)


@pytest.mark.parametrize(
  "kind", ["dense", "sparse", "low rank", "quantized", "one axis"]
)
def test_patches_go_along(kind):
  rng = np.random.default_rng(0)
  network = networks.attention
  spec = spec_of(network)
  planted = alignment.random_permutations(spec, 2)
  leaves = {
    name: codes.Delta(coded(rng, kind, shape), "add")
    for name, shape in networks.SHAPES[network].items()
  }
  base, patch = drawn(networks.SHAPES[network], 3), pj.Patch(leaves)
  turned = pj.merging.permute_patch(spec, planted, patch)
  expected = pj.merging.permute(spec, planted, pj.apply(base, patch))
  found = pj.apply(pj.merging.permute(spec, planted, base), turned)
  for name, shape in networks.SHAPES[network].items():
    np.testing.assert_allclose(
      found[name], expected[name], rtol=1e-6, atol=1e-6
    )
    code = turned.deltas[name].code
    if kind != "quantized":
      assert type(code) is type(leaves[name].code)
    if kind == "sparse":
      assert (np.diff(code.indices) > 0).all()
    if kind == "one axis" and name in ("in", "q"):
      assert code.shape == (shape[0], 1)
  gone = pj.Patch({"q": pj.patches.Delete()})
  with pytest.raises(StructureError, match="cannot be permuted"):
    pj.merging.permute_patch(spec, planted, gone)


@pytest.mark.parametrize(
  "kind", ["dense", "sparse", "low rank", "quantized", "one axis"]
)
def test_refuses_patches_of_other_shapes(kind):
  spec = spec_of(networks.mlp)
  planted = alignment.random_permutations(spec, 2)
  rng = np.random.default_rng(0)
  other = codes.Delta(coded(rng, kind, (20, 24)), "add")
  found = (20, 1) if kind == "one axis" else (20, 24)
  with pytest.raises(MismatchError) as error:
    pj.merging.permute_patch(spec, planted, pj.Patch({"w1": other}))
  assert f"w1: expected shape (24, 20), got {found}" in str(error.value)


@pytest.mark.parametrize("order", [("v", "q", "o"), ("o", "q", "v")])
def test_sizes_are_found_in_any_order(order):
  axes = {
    "v": (None, ("h", "e")),
    "q": (None, ("h", "s")),
    "o": (("s", 3), None),
  }
  shapes = {"v": (8, 15), "q": (8, 12), "o": (12, 8)}
  found = specs.from_axes(
    drawn(shapes), {name: axes[name] for name in order}, {}
  )
  assert [found.dimensions[d].size for d in "hes"] == [3, 5, 4]
  with pytest.raises(MismatchError, match="q: the sizes of h, s are not known"):
    specs.from_axes(
      drawn(shapes), {name: axes[name] for name in ("v", "q")}, {}
    )


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_align_hands_its_options_on(by, monkeypatch):
  network, seen = networks.mlp, []
  a, spec = drawn(networks.SHAPES[network]), spec_of(network)

  def assigned(spec, *_, seed, most, **__):
    seen.append((seed, most))
    return specs.identities(spec)

  monkeypatch.setattr(assigning, "assigned", assigned)
  x = networks.inputs(network)
  pj.merging.align(network, a, a, x, by=by, spec=spec, seed=7, sweeps=3)
  assert seen == [(7, 3)]


def test_align_has_the_tolerance_and_the_doubts_of_its_spec():
  network = networks.residual
  a, x = drawn(networks.SHAPES[network]), networks.inputs(network)
  spec = spec_of(network)
  b = pj.merging.permute(spec, alignment.random_permutations(spec, 1), a)
  strict = infer_permutations(network, a, x, tolerance=1e-3)
  assert strict.tolerance == 1e-3

  def nearly(p, x):  # places of units change the outputs a little
    near = 1 + np.float32(0.02) * jnp.arange(24, dtype=np.float32)
    return network(p | {"down": p["down"] * near[:, None]}, x)

  for own, given in (
    (spec, 0.9),
    (dataclasses.replace(spec, tolerance=0.9), None),
  ):
    pj.merging.align(nearly, a, b, x, spec=own, tolerance=given)
  with pytest.raises(MismatchError, match="compute something else"):
    pj.merging.align(nearly, a, b, x, spec=spec)

  def doubted(p, x):
    return network(p, x) + unknown(p, x[:3, :4]).sum()

  more = drawn({"a": (4, 6), "b": (3, 6)}, 2)
  with pytest.raises(StructureError, match="cannot be proven"):
    pj.merging.align(doubted, a | more, b | more, x)
  pj.merging.align(doubted, a | more, b | more, x, on_doubt="fix")


def test_sharded_leaves_stay_where_they_are(mesh_explicit):
  P = jax.sharding.PartitionSpec
  spec = spec_of(networks.mlp)
  a = drawn(networks.SHAPES[networks.mlp])
  planted = alignment.random_permutations(spec, 0)
  expected = pj.merging.permute(spec, planted, a)["w1"]
  place = jax.sharding.NamedSharding(mesh_explicit, P("x", "y"))
  there = a | {"w1": jax.device_put(a["w1"], place)}
  found = pj.merging.permute(spec, planted, there)["w1"]
  assert found.sharding == place
  np.testing.assert_array_equal(found, expected)


COSINES = np.cos(np.outer(np.arange(3), [1, 0.1, 1, 0.1]))
COSINES = np.float32(COSINES)[:, None]


def test_grouped_heads_rotations_and_experts():
  """Queries in groups that share keys; halves that are rotated; experts."""

  def net(p, x):
    q = (x @ p["q"]).reshape(*x.shape[:-1], 2, 3, 4)  # groups, heads, numbers
    k = (x @ p["k"]).reshape(*x.shape[:-1], 2, 4)
    first, last = jnp.split(k, 2, axis=-1)
    turned = jnp.concatenate([-last, first], axis=-1)
    k = k * jnp.broadcast_to(COSINES, k.shape) + turned
    scores = jnp.einsum("bthid,bshd->bhits", q, k)
    v = (x @ p["v"]).reshape(*x.shape[:-1], 2, 4)
    y = jnp.einsum("bhits,bshd->bthid", jax.nn.softmax(scores), v)
    y = y.reshape(*x.shape[:-1], -1) @ p["o"]
    share = jax.nn.softmax(y @ p["router"])
    top = jnp.argmax(share, -1)
    share = share * jax.nn.one_hot(top, 5, dtype=share.dtype)
    hidden = jax.nn.relu(jnp.einsum("btd,edf->btef", y, p["up"]))
    return jnp.einsum("btef,efd,bte->btd", hidden, p["down"], share)

  params = drawn(
    {
      "q": (6, 24),
      "k": (6, 8),
      "v": (6, 8),
      "o": (24, 6),
      "router": (6, 5),
      "up": (5, 6, 7),
      "down": (5, 7, 6),
    }
  )
  spec = infer_permutations(net, params, drawn({"x": (2, 3, 6)}, 1)["x"])
  found = {
    places(spec, d): [places(spec, o) for o in spec.dimensions[d].within]
    for d in spec.moving
  }
  groups = "k:1 o:0 q:1 v:1"
  assert found == {
    groups: [],
    "o:0 q:1": [groups],  # heads, in each group
    "o:0 v:1": [groups],  # numbers of values; of keys they are rotated
    "down:1 up:2": ["down:0 router:1 up:0"],  # units, in each expert
    "o:1 router:0 up:1": [],
  }
  assert "constant" in spec.reasons["k:1.2"]
  assert "argmax" in spec.reasons["router:1"]


def test_matrices_that_make_several_things_at_once():
  """The gates of a cell, queries, keys and values: chunks that move alike."""

  def cell(p, xs):
    def step(h, x):
      r, z = jnp.split(jax.nn.sigmoid(x @ p["gates"] + h @ p["own"]), 2, -1)
      return z * h + (1 - z) * jnp.tanh(
        x @ p["new"] + (r * h) @ p["back"]
      ), None

    h, _ = jax.lax.scan(step, jnp.zeros((2, 6)), xs)
    return h @ p["out"]

  shapes = {
    "gates": (5, 12),
    "own": (6, 12),
    "new": (5, 6),
    "back": (6, 6),
    "out": (6, 3),
  }
  params, xs = drawn(shapes), drawn({"x": (4, 2, 5)}, 1)["x"]
  spec = infer_permutations(cell, params, xs)
  (name,) = spec.moving
  assert places(spec, name) == "back:0 back:1 gates:1 new:1 out:0 own:0 own:1"
  b = pj.merging.permute(spec, alignment.random_permutations(spec, 0), params)
  found = pj.merging.align(cell, params, b, xs, spec=spec)
  for leaf in params:
    np.testing.assert_array_equal(found.params[leaf], params[leaf])

  def fused(p, x):
    y = x @ p["qkv"]
    q, k, v = (y[..., 8 * i : 8 * i + 8].reshape(2, 4, 2, 4) for i in range(3))
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    y = jnp.einsum("bhts,bshd->bthd", scores, v).reshape(2, 4, 8)
    return y @ p["out"]

  params = drawn({"qkv": (5, 24), "out": (8, 3)})
  spec = infer_permutations(fused, params, drawn({"x": (2, 4, 5)}, 1)["x"])
  assert {places(spec, d) for d in spec.moving} == {"out:0 qkv:1"}
  assert sorted(map(spec.table, spec.moving)) == [(2,), (2, 4)]

  def unequal(p, x):
    y = jnp.tanh(x @ p["w"])
    return jnp.concatenate([y[..., :3], y], axis=-1) @ p["out"]

  params = drawn({"w": (5, 8), "out": (11, 3)})
  with pytest.raises(StructureError, match="w:1: slice reads its entries"):
    infer_permutations(unequal, params, np.ones((2, 5), np.float32))


def test_the_sentence_encoder():
  from patchjax.demo import model

  shape = model.Shape(20, 8, 12, 16, layers=1, heads=3)
  params = jax.eval_shape(lambda: model.initial(jax.random.key(0), shape))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), params
  )
  ids = np.random.default_rng(0).integers(0, 20, (2, 5)).astype(np.int32)

  def encode(p, ids):
    return model.encode(p, ids, ids > 2, heads=3)

  spec = infer_permutations(encode, params, ids)
  tables = sorted(spec.table(d) for d in spec.moving)
  assert tables == [(3,), (3, 4), (3, 4), (16,)]
  assert "output" in spec.reasons["embed/word:1"]
  assert "gather" in spec.reasons["embed/word:0"]
  planted = alignment.random_permutations(spec, 1)
  other = pj.merging.permute(spec, planted, params)
  found = pj.merging.align(encode, params, other, ids, spec=spec)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(found.params)):
    np.testing.assert_array_equal(x, y)


def test_a_norm_shared_by_heads_binds_their_numbers_together():
  def net(p, x):
    y = (x @ p["w"]).reshape(*x.shape[:-1], 3, 4)
    y = jnp.tanh(y) * jnp.broadcast_to(p["scale"], y.shape)
    return y.reshape(*x.shape[:-1], 12) @ p["out"]

  params = drawn({"w": (5, 12), "scale": (4,), "out": (12, 2)})
  spec = infer_permutations(net, params, np.ones((2, 5), np.float32))
  assert [spec.dimensions[d].within for d in spec.moving if d == "out:0.1"] == [
    ()
  ]
  # Heads, for each of their numbers: either may be the outer one, if not both.
  assert [spec.table(d) for d in spec.moving] == [(4, 3), (4,)]


def unknown(p, x):
  return jnp.linalg.qr((x @ p["a"]).T)[0] @ p["b"]


def test_refuses_what_has_no_rule_by_name():
  params, x = drawn({"a": (4, 6), "b": (3, 6)}), np.ones((3, 4), np.float32)
  with pytest.raises(StructureError, match=r"qr|householder|geqrf") as error:
    infer_permutations(unknown, params, x)
  assert "a:1" in str(error.value) and "on_doubt='fix'" in str(error.value)
  with pytest.raises(StructureError, match="no hidden dimension"):
    infer_permutations(unknown, params, x, on_doubt="fix")


def test_refuses_wrong_specs_by_name():
  network = networks.mlp
  params, x = drawn(networks.SHAPES[network]), networks.inputs(network)
  right = {
    "w0": (None, "one"),
    "b0": ("one",),
    "w1": ("one", "two"),
    "b1": ("two",),
    "w2": ("two", None),
  }
  spec = pj.merging.given_permutations(right, network, params, x)
  assert spec.moving == ("one", "two")
  wrong = {k: v for k, v in right.items() if k != "b1"}
  with pytest.raises(MismatchError, match="two, in w1, w2") as error:
    pj.merging.given_permutations(wrong, network, params, x)
  assert "one" not in str(error.value)
  with pytest.raises(MismatchError, match="one is 24 and 20"):
    pj.merging.given_permutations(right | {"b1": ("one",)}, network, params, x)
  with pytest.raises(StructureError, match="no leaf is named"):
    pj.merging.given_permutations({"nope": (None,)}, network, params, x)
  with pytest.raises(StructureError, match="what a dimension lies within"):
    pj.merging.given_permutations(
      right, network, params, x, within={"two": ["three"]}
    )
  unchecked = alignment.PermutationSpec(spec.dimensions, spec.axes)
  with pytest.raises(StructureError, match="was not checked"):
    pj.merging.weight_matching(unchecked, params, params)


def test_heads_can_be_given():
  network = networks.attention
  params, x = drawn(networks.SHAPES[network]), networks.inputs(network)
  spec = pj.merging.given_permutations(
    {
      "q": (None, ("heads", 4)),
      "qb": (("heads", 4),),
      "k": (None, ("heads", 4)),
      "kb": (("heads", 4),),
      "v": (None, ("heads", "each")),
      "vb": (("heads", "each"),),
      "o": (("heads", "each"), None),
    },
    network,
    params,
    x,
    within={"each": ["heads"]},
  )
  assert spec.table("each") == (3, 4)


def test_refuses_what_does_not_fit():
  spec = spec_of(networks.mlp)
  params = drawn(networks.SHAPES[networks.mlp])
  with pytest.raises(MismatchError, match="not every unit occurs once"):
    pj.merging.permute(spec, {"b0:0": np.zeros(24, np.int32)}, params)
  with pytest.raises(MismatchError, match="no dimension of the model"):
    pj.merging.permute(spec, {"w0:0": np.arange(10)}, params)
  with pytest.raises(MismatchError, match=r"w1: expected shape \(24, 20\)"):
    pj.merging.permute(spec, {}, params | {"w1": params["w1"].T})
  with pytest.raises(MismatchError, match="b0: missing"):
    pj.merging.permute(spec, {}, {k: params[k] for k in ("w0", "w1")})
  bad = params | {"w0": np.full_like(params["w0"], np.nan)}
  with pytest.raises(NonFiniteError, match="nothing can be checked"):
    infer_permutations(networks.mlp, bad, networks.inputs(networks.mlp))
  spec = spec_of(networks.stacked)
  stacked = drawn(networks.SHAPES[networks.stacked])
  with pytest.raises(StructureError, match="match by weights"):
    pj.merging.activation_matching(
      spec,
      networks.stacked,
      stacked,
      stacked,
      networks.inputs(networks.stacked),
    )
