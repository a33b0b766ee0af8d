"""DARE, DELLA, Breadcrumbs where leaves are ragged, tiny, zero, or tie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging import ranking, ranks
from patchjax.patches import counting, ordering, placement
from patchjax.trees.errors import NonFiniteError, SelectionError
from tests.merging import battery
from tests.merging.models import same_bits
from tests.reference import merging_sparse as reference

P = jax.sharding.PartitionSpec
SPECS = {
  "column": P(("x", "y"), None),
  "kernel": P("x", "y"),
  "number": P(),
  "stack": P(None, "x", "y"),
  "vector": P("y"),
}


def ragged(seed, *, ties):
  """Leaves of all ranks; with `ties`, of a few magnitudes, many of them 0."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    if ties:
      return np.float32(rng.integers(-3, 4, shape))
    return np.float32(rng.standard_normal(shape))

  return {
    "column": draw(8, 1),
    "kernel": draw(12, 10),
    "number": draw(),
    "stack": draw(2, 4, 6),
    "vector": draw(6),
  }


def given(*leaves, ties):
  """A base and two contributors, of which one left two leaves as they were.

  Of all leaves, or of those named: each is compiled for on its own.
  """
  base, *others = (ragged(seed, ties=ties) for seed in range(3))
  others[1]["kernel"] = base["kernel"].copy()
  others[1]["number"] = base["number"].copy()

  def some(tree):
    return {name: tree[name] for name in leaves or tree}

  return some(base), list(map(some, others))


def check(found, expected):
  for name, wanted in expected.items():
    np.testing.assert_allclose(
      found[name],
      wanted,
      rtol=0,
      atol=1e-6 * np.max(np.abs(wanted)),
      err_msg=name,
    )


def put(tree, mesh):
  return {
    name: jax.device_put(x, jax.sharding.NamedSharding(mesh, SPECS[name]))
    for name, x in tree.items()
  }


SHARES = [(0.5, 0.2), (0.97, 0.1), (1.0, 0.3), (0.05, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize(
  "options",
  [{}, {"scope": "leaf"}, {"flavour": "mergekit"}],
  ids=lambda o: "-".join(o.values()) or "row",
)
def test_breadcrumbs_of_ragged_leaves(options):
  for ties in (True, False):
    base, others = given(ties=ties)
    for density, gamma in SHARES:
      numbers = {"density": density, "gamma": gamma}
      method = pj.merging.breadcrumbs(**numbers, **options)
      check(
        pj.merge(base, others, method),
        reference.breadcrumbs(base, others, **numbers, **options),
      )


def test_breadcrumbs_over_the_tree_is_the_leaf_of_all():
  base, others = given(ties=True)
  method = pj.merging.breadcrumbs(density=0.4, gamma=0.05, scope="tree")
  found = pj.merge(base, others, method)
  order = sorted(base)

  def joined(tree):
    return {"all": np.concatenate([np.ravel(tree[name]) for name in order])}

  wanted = reference.breadcrumbs(
    joined(base),
    [joined(x) for x in others],
    density=0.4,
    gamma=0.05,
    scope="leaf",
  )
  check(joined(found), wanted)


def masks(base, others, options):
  if "epsilon" in options:
    return battery.della_masks(base, others, options)
  return battery.dare_masks(base, others, options)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
  ("name", "numbers"),
  [
    ("dare_linear", {"density": [0.7, 0.3]}),
    ("della_linear", {"density": [0.7, 0.4], "epsilon": 0.25}),
  ],
)
def test_random_methods_of_ragged_leaves(name, numbers, rescale):
  for ties in (True, False):
    base, others = given(ties=ties)
    method = getattr(pj.merging, name)(**numbers, rescale=rescale, key=5)
    check(
      pj.merge(base, others, method),
      getattr(reference, name)(
        base,
        others,
        **numbers,
        rescale=rescale,
        masks=masks(base, others, {**numbers, "rescale": rescale}),
      ),
    )


def test_what_is_kept_without_ranks_has_their_probabilities():
  x = np.float32(np.random.default_rng(0).standard_normal((3, 4, 5)))
  x[0, :, 0] = 1.5  # of equal ones the first is the least likely
  base, others = {"w": np.zeros_like(x)}, [{"w": x}]
  keys = jax.random.split(jax.random.key(0), 4000)

  def frequencies(axis):
    def kept(key):
      step = pj.merging.drop_by_rank(
        density=0.45, epsilon=0.35, key=key, rescale=False, axis=axis
      )
      return pj.merge(base, others, step)["w"] != 0

    return np.asarray(jax.vmap(kept)(keys))

  for axis, flavour in ((-1, "paper"), (1, "mergekit")):
    drawn = frequencies(axis).reshape(len(keys), -1)
    p = reference.della_probabilities(x, 0.45, 0.35, flavour=flavour).ravel()
    z = (drawn.mean(0) - p) / np.sqrt(p * (1 - p) / len(keys))
    assert np.abs(z).max() < 4.5 and 0.7 < z.std() < 1.3
    # And no entry knows of another.
    joint = (drawn - p) / np.sqrt(p * (1 - p))
    apart = (joint.T @ joint / np.sqrt(len(keys)))[np.triu_indices(60, 1)]
    assert np.abs(apart).max() < 5 and 0.9 < apart.std() < 1.1


@pytest.mark.parametrize("rescale", [True, False])
def test_mergekit_della_of_ragged_leaves(rescale):
  numbers = {"density": [0.7, 0.4], "epsilon": 0.25, "flavour": "mergekit"}
  for ties in (True, False):
    base, others = given(ties=ties)
    method = pj.merging.della(**numbers, rescale=rescale, key=5)
    drawn = masks(base, others, numbers)
    check(
      pj.merge(base, others, method),
      reference.della(base, others, **numbers, rescale=rescale, masks=drawn),
    )


def test_l1_norms_are_kept():
  base, others = given(ties=False)
  method = pj.merging.dare_linear(density=0.5, key=5, flavour="mergekit")
  drawn = battery.dare_masks(base, others, {"density": 0.5})
  check(
    pj.merge(base, others, method),
    reference.dare_linear(
      base, others, density=0.5, masks=drawn, flavour="mergekit"
    ),
  )
  # Of what was left alone nothing is made, and of nothing no infinity.
  alone = pj.merge(base, [base, base], method)
  assert same_bits(alone, base)


def test_l1_norm_of_a_selection_that_counts():
  base, others = given("kernel", "vector", ties=True)
  numbers = {"density": 0.5, "gamma": 0.1}
  method = pj.merging.breadcrumbs(
    **numbers, rescale=True, flavour="mergekit", weights=[0.5, 2.0]
  )
  check(
    pj.merge(base, others, method),
    reference.breadcrumbs(
      base,
      others,
      **numbers,
      rescale=True,
      flavour="mergekit",
      weights=[0.5, 2.0],
    ),
  )


def test_dare_is_unbiased():
  base = {"w": np.zeros(4, np.float32)}
  tuned = {"w": np.float32([1, -2, 3, 0.5])}

  def mean(make):
    def one(key):
      return pj.merge(base, [tuned], make(key))["w"]

    return jax.vmap(one)(jax.random.split(jax.random.key(0), 4000)).mean(0)

  dare = mean(lambda key: pj.merging.dare_linear(density=0.25, key=key))
  np.testing.assert_allclose(dare, tuned["w"], rtol=0.15)
  della = mean(lambda key: pj.merging.della_linear(density=0.4, key=key))
  np.testing.assert_allclose(della, tuned["w"], rtol=0.15)


METHODS = {
  "dare_ties": pj.merging.dare_ties(density=0.7, trim=0.5, key=1),
  "della": pj.merging.della(density=0.5, epsilon=0.3, key=1),
  "della/unranked": pj.merging.della(
    density=0.5, epsilon=0.3, key=1, rescale=False
  ),
  "breadcrumbs": pj.merging.breadcrumbs(density=0.5, gamma=0.2),
}


@pytest.mark.parametrize("name", METHODS)
def test_bits_do_not_depend_on_the_mesh(name, mesh_explicit):
  base, others = given("kernel", "stack", ties=True)
  wanted = pj.merge(base, others, METHODS[name])
  found = pj.merge(
    put(base, mesh_explicit),
    [put(x, mesh_explicit) for x in others],
    METHODS[name],
  )
  assert same_bits(found, wanted)
  for leaf, x in found.items():
    assert x.sharding.spec == SPECS[leaf]


def test_rows_on_devices_are_handed_round_not_copied(mesh_explicit):
  x = np.float32(np.random.default_rng(0).standard_normal((6, 16)))
  sharding = jax.sharding.NamedSharding(mesh_explicit, P("y", "x"))

  @jax.jit
  def ranked(x):
    keys = ordering.magnitude_keys(x)
    return ranking.row_ranks(keys, placement.leaf_of(x))

  on_mesh = jax.device_put(x, sharding)
  text = ranked.lower(on_mesh).compile().as_text()
  assert "all-to-all" in text
  assert "all-gather" not in text
  wanted = np.argsort(np.argsort(np.abs(x), axis=1), axis=1)
  np.testing.assert_array_equal(ranked(on_mesh), wanted)


def test_others_on_devices_are_handed_round_too(mesh_explicit):
  x = np.float32(np.random.default_rng(0).integers(-9, 9, (6, 16)))
  others = np.random.default_rng(1).integers(0, 16, x.shape)
  own = np.arange(16)
  at = np.minimum(others + (others >= own), 15)
  there = np.take_along_axis(np.abs(x), np.where(others == 15, own, at), 1)
  wanted = np.abs(x) + (np.where(others == 15, own, at) < own) / 2 > there
  sharding = jax.sharding.NamedSharding(mesh_explicit, P("y", "x"))

  @jax.jit
  def larger(x, others):
    return ranking.outranks(x, others, placement.leaf_of(x))

  args = x, jnp.uint32(others)
  np.testing.assert_array_equal(larger(*args), wanted)
  on_mesh = [jax.device_put(y, sharding) for y in args]
  assert "all-gather" not in larger.lower(*on_mesh).compile().as_text()
  np.testing.assert_array_equal(larger(*on_mesh), wanted)


@pytest.mark.parametrize("shape", [(3, 5000), (70, 64), (4096, 1)])
def test_ranks_by_numpy_are_those_of_xla(shape):
  rng = np.random.default_rng(0)
  many = np.float32(rng.standard_normal(shape))
  some = np.float32(rng.integers(-9, 9, shape))
  odd = many * np.float32(10) ** rng.integers(-30, 30, shape).astype(np.float32)
  odd[0, 0] = np.inf
  for x in (many, some, odd, np.zeros_like(many)):
    keys = ordering.magnitude_keys(jnp.asarray(x))
    order = np.argsort(keys, axis=1, kind="stable")
    wanted = np.argsort(order, axis=1, kind="stable")
    np.testing.assert_array_equal(ranking.host_ranks(keys), wanted)
    leaf = placement.leaf_of(keys)
    found = ranking.row_ranks(keys, leaf)  # eagerly, called back if large
    np.testing.assert_array_equal(found, wanted)
    traced = jax.jit(lambda k: ranking.row_ranks(k, placement.leaf_of(k)))
    np.testing.assert_array_equal(traced(keys), wanted)


def test_leaf_of_more_entries_than_are_worth_a_callback():
  rng = np.random.default_rng(0)
  base = {"w": np.zeros((8, 1024), np.float32)}
  others = [{"w": np.float32(rng.standard_normal((8, 1024)))}]
  method = pj.merging.della_linear(density=0.5, key=5)
  eager = pj.merge(base, others, method)
  assert same_bits(eager, jax.jit(pj.merge)(base, others, method))
  drawn = battery.della_masks(base, others, {"density": 0.5})
  check(eager, reference.della_linear(base, others, masks=drawn))


def test_numbers_that_a_jit_knows_make_the_same_mask():
  rng = np.random.default_rng(0)
  base = {"w": np.zeros((8, 64), np.float32)}
  others = [{"w": np.float32(rng.standard_normal((8, 64)))} for _ in range(2)]
  method = pj.merging.della_linear(key=5, rescale=False)
  eager = pj.merge(base, others, method)
  inside = jax.jit(lambda base, others: pj.merge(base, others, method))
  assert same_bits(eager, inside(base, others))


@pytest.mark.parametrize("flavour", ["paper", "mergekit"])
def test_what_is_not_finite_is_seen_though_it_may_be_dropped(flavour):
  base = {"w": np.zeros((4, 64), np.float32)}
  for value in (np.nan, np.inf):
    x = np.ones((4, 64), np.float32)
    for at in range(3):
      x[1, at] = value
      for make in (pj.merging.dare_linear, pj.merging.della_linear):
        with pytest.raises(
          NonFiniteError, match=f"w: {at + 1} entries of the c"
        ):
          pj.merge(base, [{"w": x}], make(key=at, flavour=flavour))


@pytest.mark.parametrize(
  "make",
  [
    lambda x: pj.merging.dare_linear(density=x),
    lambda x: pj.merging.dare_linear(density=x, flavour="mergekit"),
    lambda x: pj.merging.della(density=x),
    lambda x: pj.merging.della(epsilon=x),
    lambda x: pj.merging.breadcrumbs(density=x),
    lambda x: pj.merging.breadcrumbs(gamma=x, scope="leaf"),
  ],
)
def test_shares_have_no_derivative(make):
  base = {"w": np.zeros((4, 6), np.float32)}
  tuned = {"w": np.ones((4, 6), np.float32)}

  def loss(share):
    return jnp.sum(pj.merge(base, [tuned], make(share))["w"])

  with pytest.raises(SelectionError, match="has no derivative"):
    jax.grad(loss)(0.3)


def test_weights_have_derivatives_and_shares_map():
  base, others = given(ties=False)
  base, *others = ({"w": x["kernel"]} for x in (base, *others))

  def merged(weight, density):
    weights = jnp.stack([weight, jnp.float32(2)])
    method = pj.merging.breadcrumbs(density=density, weights=weights)
    return pj.merge(base, others, method)["w"]

  slope = jax.grad(lambda w: jnp.sum(merged(w, 0.5)))(jnp.float32(1))
  step = jnp.sum(merged(jnp.float32(2), 0.5) - merged(jnp.float32(1), 0.5))
  np.testing.assert_allclose(slope, step, rtol=1e-4)
  densities = jnp.float32([0.2, 0.5, 1.0])
  many = jax.vmap(merged, (None, 0))(jnp.float32(1), densities)
  for row, density in zip(many, densities, strict=True):
    assert same_bits(row, merged(jnp.float32(1), density))


def test_one_number_a_leaf():
  base, others = given("kernel", "stack", ties=False)
  shares = pj.merging.per_leaf(base, {"kernel": 0.2}, default=1.0)
  found = pj.merge(
    base, others, pj.merging.breadcrumbs(density=shares, gamma=0.0)
  )
  all_ = pj.merge(base, others, pj.merging.task_arithmetic())
  few = pj.merge(base, others, pj.merging.breadcrumbs(density=0.2, gamma=0.0))
  assert same_bits(found["kernel"], few["kernel"])
  assert same_bits(found["stack"], all_["stack"])


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: pj.merging.dare_linear(density=0.0), r"\(0, 1\]"),
    (lambda: pj.merging.della(density=0.1), "epsilon smaller"),
    (lambda: pj.merging.breadcrumbs(gamma=-0.1), r"\[0, 1\]"),
    (lambda: pj.merging.breadcrumbs(scope="rows"), "scope"),
    (lambda: pj.merging.dare_ties(rng="philox"), "rng"),
    (lambda: pj.merging.della(flavour="papers"), "flavour"),
    (
      lambda: pj.merging.keep_l1(pj.merging.breadcrumbs()),
      "one step that counts",
    ),
    (lambda: pj.merging.keep_l1(pj.trim(density=0.5)), "single leaves"),
    (
      lambda: pj.merging.keep_l1(pj.merging.keep_varied(density=0.5)),
      "counts task vectors",
    ),
  ],
)
def test_bad_options(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_part_of_a_count(share):
  part = jax.jit(ranks.part)
  for count in (0, 1, 10, 4095, 4096, 10**6 + 1, (1 << 40) + 12345):
    high, low = part(share, counting.limbs(count))
    wanted = round(share * 10) * count // 10
    assert (int(high) << counting.LIMB) + int(low) == wanted
