"""What Fisher, RegMean, MaTS and trust-region merges promise, on small models.

References and meshes are in the battery; here are the equations.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging import solving
from patchjax.statistics import Fisher, Gram, KFac, LinearLayer, gram
from patchjax.trees.errors import (
  FormatError,
  RepositoryError,
  SelectionError,
  StructureError,
)
from tests.reference import merging_statistical as reference

FLAT = LinearLayer((0,), (1,))
ROWS = (40, 15)


def linear(params, x):
  return x @ params["w"]


def tasks(rows=ROWS, inputs=6):
  """Data of linear tasks, and the fit to each by least squares."""
  rng = np.random.default_rng(0)
  found = []
  for n in rows:
    turn = rng.standard_normal((inputs, inputs))
    x = (rng.standard_normal((n, inputs)) @ turn).astype("f4")
    y = rng.standard_normal((n, 3)).astype("f4")
    found.append((x, y, np.linalg.lstsq(np.float64(x), y, rcond=None)[0]))
  return found


def pooled(found):
  x, y = (np.concatenate([np.float64(t[i]) for t in found]) for i in (0, 1))
  return np.linalg.lstsq(x, y, rcond=None)[0]


def models(found):
  return [{"w": w.astype("f4")} for _, _, w in found]


def error(merged, wanted):
  return np.max(np.abs(np.asarray(merged["w"]) - wanted)) / np.max(
    np.abs(wanted)
  )


def test_regmean_and_mats_solve_the_pooled_least_squares_and_fisher_does_not():
  found = tasks()
  known = [gram(linear, m, x) for m, (x, _, _) in zip(models(found), found)]
  wanted, weights = pooled(found), [float(n) for n in ROWS]
  options = {"weights": weights, "off_diagonal": 1.0}
  regmean = pj.merging.regmean(grams=known, **options)
  mats = pj.merging.mats(statistics=known, tolerance=1e-7, **options)
  for method in (regmean, mats):
    assert error(pj.merge(None, models(found), method), wanted) < 1e-4
  # The diagonal of the very same curvature.
  diagonals = [
    Fisher(
      {"w": np.repeat(np.diagonal(g.values["w"][0])[:, None], 3, axis=1)},
      g.n,
      "exact",
    )
    for g in known
  ]
  fisher = pj.merging.fisher(
    fishers=diagonals, weights=weights, normalize=False, floor=0.0
  )
  assert (
    error(
      pj.merge({"w": 0 * models(found)[0]["w"]}, models(found), fisher), wanted
    )
    > 0.05
  )


def test_answers_on_the_data_are_kept_where_inputs_do_not_overlap():
  # Three rows of six inputs each: both models keep all of their answers.
  found = tasks((3, 3))
  known = [gram(linear, m, x) for m, (x, _, _) in zip(models(found), found)]
  method = pj.merging.regmean(grams=known, off_diagonal=1.0)
  merged = pj.merge(None, models(found), method)
  for x, y, _ in found:
    np.testing.assert_allclose(x @ np.asarray(merged["w"]), y, atol=2e-3)


def test_what_no_data_sees_stays_at_the_mean_or_at_the_start():
  # Fewer rows than inputs in all, and an input that is always 0.
  found = tasks((2, 2))
  for x, _, _ in found:
    x[:, 5] = 0
  start = models(found)
  known = [gram(linear, m, x) for m, (x, _, _) in zip(start, found)]
  mean = sum(m["w"] for m in start) / 2
  _, _, unseen = np.linalg.svd(np.concatenate([x for x, _, _ in found]))
  unseen = unseen[4:]
  regmean = pj.merging.regmean(grams=known, off_diagonal=1.0)
  merged = np.asarray(pj.merge(None, start, regmean)["w"])
  np.testing.assert_allclose(unseen @ merged, unseen @ mean, atol=1e-4)
  assert np.abs(merged - mean).max() > 1e-2
  far = {"w": mean + 5}
  mats = pj.merging.mats(statistics=known, init=far)
  merged = np.asarray(pj.merge(None, start, mats)["w"])
  np.testing.assert_allclose(unseen @ merged, unseen @ far["w"], atol=1e-3)


def test_regmean_keeps_small_directions_that_data_has():
  # Rows that share a mean have one large direction, and 39 tiny ones.
  inputs, count = 64, (20, 20)
  rng = np.random.default_rng(4)
  rows = [1 + 0.1 * rng.standard_normal((n, inputs)) for n in count]
  leaves = [rng.standard_normal((inputs, 2)).astype("f4") for _ in count]
  grams = [(x.T @ x / len(x)).astype("f4") for x in rows]
  known = [
    solving.Curvature(left=jnp.asarray(g[None]), layer=FLAT) for g in grams
  ]
  start = sum(leaves) / 2
  found = solving.by_inputs(known, leaves, jnp.asarray(start))
  wide = np.concatenate(rows)
  answers = np.concatenate([x @ w for x, w in zip(rows, leaves)])
  wanted = start + np.linalg.pinv(wide) @ (answers - wide @ start)
  errors = [
    np.linalg.norm(wide @ w - answers) for w in (start, np.asarray(found))
  ]
  assert errors[1] < 1e-2 * errors[0]
  close = np.abs(wanted - start).max()
  np.testing.assert_allclose(found, wanted, atol=3e-2 * close)


def factors(shape, layer, seed):
  rng = np.random.default_rng(seed)
  batch, inputs, outputs = layer.sizes(shape)

  def squares(size):
    x = rng.standard_normal((batch, 20, size))
    return (np.swapaxes(x, 1, 2) @ x / 20).astype("f4")

  return squares(inputs), squares(outputs)


@pytest.mark.parametrize(
  "layer", [LinearLayer((1,), (2,), (0,)), LinearLayer((0, 2), (1,))]
)
def test_mats_equals_the_dense_kronecker_solve(layer):
  shape = (2, 3, 4)
  rng = np.random.default_rng(1)
  leaves = [rng.standard_normal(shape).astype("f4") for _ in range(2)]
  pairs = [factors(shape, layer, i) for i in range(2)]
  known = [
    KFac({"w": a}, {"w": s}, {"w": 20}, 20, "exact", (("w", layer),))
    for a, s in pairs
  ]
  method = pj.merging.mats(statistics=known, tolerance=1e-7)
  merged = pj.merge(None, [{"w": x} for x in leaves], method)["w"]
  merged = np.asarray(layer.matrices(jnp.asarray(merged)))
  stacked = [np.asarray(layer.matrices(jnp.asarray(x))) for x in leaves]
  for b in range(merged.shape[0]):
    left = right = 0
    for (a, s), x in zip(pairs, stacked):
      matrix = np.kron(np.float64(a[b]), np.float64(s[b]))
      left = left + matrix
      right = right + matrix @ np.float64(x[b]).reshape(-1)
    wanted = np.linalg.solve(left, right).reshape(merged[b].shape)
    np.testing.assert_allclose(merged[b], wanted, atol=2e-4)


def test_the_methods_agree_where_their_curvatures_do():
  rng = np.random.default_rng(2)
  base, *others = (
    {"w": rng.standard_normal((4, 4)).astype("f4")} for _ in "abc"
  )
  fishers = [
    Fisher({"w": rng.uniform(0.5, 2, (4, 4)).astype("f4")}, 9, "exact")
    for _ in others
  ]
  one = pj.merging.fisher(fishers=fishers, normalize=False)
  two = pj.merging.mats(statistics=fishers, tolerance=1e-7)
  np.testing.assert_allclose(
    pj.merge(base, others, one)["w"],
    pj.merge(base, others, two)["w"],
    atol=1e-5,
  )
  grams = [
    Gram({"w": factors((4, 4), FLAT, i)[0]}, {"w": 20}, 20, (("w", FLAT),))
    for i in range(2)
  ]
  one = pj.merging.regmean(grams=grams, off_diagonal=0.5, shrinkage=3.0)
  two = pj.merging.mats(
    statistics=grams, off_diagonal=0.5, shrinkage=3.0, tolerance=1e-7
  )
  np.testing.assert_allclose(
    pj.merge(None, others, one)["w"],
    pj.merge(None, others, two)["w"],
    atol=1e-5,
  )


def tiny(*values):
  return {"w": np.float32(values)}


def test_fisher_where_nobody_knows():
  base, a, b = tiny(1, 1, 1), tiny(3, 3, 3), tiny(5, 5, 5)
  known = [
    Fisher(tiny(0, 1e-9, 1), 1, "exact"),
    Fisher(tiny(0, 1e-9, 0), 1, "exact"),
  ]

  def merged(**options):
    method = pj.merging.fisher(fishers=known, normalize=False, **options)
    return pj.merge(base, [a, b], method)["w"].tolist()

  # 0/0 is the base's.
  np.testing.assert_allclose(merged(floor=0.0), [1, 4, 3], rtol=1e-6)
  np.testing.assert_allclose(merged(), [4, 4, 3], rtol=1e-5)
  np.testing.assert_allclose(merged(favor="first"), [3, 3.002, 3], rtol=1e-5)
  assert merged(favor="base") == [1, 1, 3]
  assert merged(weights=[0.0, 1.0], floor=0.0) == [1, 5, 1]


def network(params, x):
  for name in sorted(params):
    x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
  return x


def networks(count=2, sizes=(5, 6, 4, 3)):
  rng = np.random.default_rng(3)

  def one():
    return {
      str(i): {
        "w": rng.standard_normal((n, m)).astype("f4") / n**0.5,
        "b": rng.standard_normal(m).astype("f4") / 4,
      }
      for i, (n, m) in enumerate(zip(sizes, sizes[1:]))
    }

  data = [
    rng.standard_normal((60, sizes[0])).astype("f4") for _ in range(count)
  ]
  return [one() for _ in range(count)], data


def test_regmean_plus_plus_sees_what_the_merged_layers_give():
  others, data = networks()
  merged = pj.merging.regmean_plus_plus(network, others, data)
  wanted = reference.regmean_plus_plus(others, data)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), merged, wanted
  )
  known = [gram(network, m, x) for m, x in zip(others, data)]
  plain = pj.merge(None, others, pj.merging.regmean(grams=known))
  first, last = (np.abs(plain[i]["w"] - merged[i]["w"]).max() for i in "02")
  assert first < 1e-5 and last > 1e-2
  # In batches, in blocks that are told, and of a single model.
  again = pj.merging.regmean_plus_plus(
    network,
    others,
    [lambda x=x: iter([x[:50], x[50:]]) for x in data],
    blocks=["0/.*", "1/.*", "2/.*"],
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), again, merged
  )
  # Two layers in one: the second sees each model's own first.
  found = pj.merging.regmean_plus_plus(
    network, others, data, blocks=["[01]/.*", "2/.*"]
  )
  wanted = reference.regmean_plus_plus(others, data, blocks=[["0", "1"], ["2"]])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, wanted
  )
  assert np.abs(found["1"]["w"] - merged["1"]["w"]).max() > 1e-2
  with pytest.raises(SelectionError, match="in two blocks: 1/b, 1/w"):
    pj.merging.regmean_plus_plus(
      network, others, data, blocks=["[01]/.*", "[12]/.*"]
    )
  with pytest.raises(StructureError, match="as many data"):
    pj.merging.regmean_plus_plus(network, others, data[:1])


def test_trust_region_leaves_out_what_hurts():
  base, a, b = tiny(0, 0, 0, 0), tiny(1, 1, 1, 1), tiny(2, 2, 2, 2)
  steep = [tiny(0, 9, 0, 0), tiny(0, 0, 1, 0)]
  method = pj.merging.trust_region(gradients=steep, quantile=0.75, scale=1.0)
  # Conflicts 0, 18, 1, 0: below the largest of four.
  assert pj.merge(base, [a, b], method)["w"].tolist() == [3, 0, 3, 3]
  # Signed ones would cancel: 0, 9 (1 + 1) - 9 (1 + 1), 1 + 1, 0.
  signed = [tiny(0, 9, 0, 0), tiny(0, -9, 0, 0), tiny(0, 0, 1, 0)]
  method = pj.merging.trust_region(gradients=signed, quantile=0.75, scale=1.0)
  assert pj.merge(base, [a, a, a], method)["w"].tolist() == [3, 0, 3, 3]
  with pytest.raises(StructureError, match=r"of shape \(1,\), and its leaf"):
    pj.merge(base, [a, b], pj.merging.trust_region(gradients=[tiny(1)] * 2))
  method = pj.merging.trust_region(gradients=[{"v": a["w"]}] * 2)
  with pytest.raises(SelectionError, match="no gradient .* leaf w; take abs"):
    pj.merge(base, [a, b], method)
  with pytest.raises(SelectionError, match="quantile must be in"):
    pj.merging.trust_region(quantile=1.5)
  with pytest.raises(
    SelectionError, match="gradients of 2 contributors, got 1"
  ):
    pj.merge(base, [a, b], pj.merging.trust_region(gradients=steep[:1]))


def test_derivatives():
  found = tasks()
  others = models(found)
  known = [gram(linear, m, x) for m, (x, _, _) in zip(others, found)]

  def loss(weights, share, make):
    method = make(weights, share)
    return jnp.sum(pj.merge(others[0], others, method)["w"] ** 2)

  def regmean(weights, share):
    return pj.merging.regmean(grams=known, weights=weights, off_diagonal=share)

  def mats(weights, share):
    return pj.merging.mats(
      statistics=known, weights=weights, off_diagonal=share, tolerance=1e-7
    )

  at = jnp.float32([1.0, 2.0]), jnp.float32(0.5)
  one, two = (
    jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(*at, make)
    for make in (regmean, mats)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=1e-3),
    one,
    two,
  )
  # However small the loss is, also squared.
  back = jax.jit(lambda c: jax.vjp(lambda *x: loss(*x, mats), *at)[1](c))
  small = back(jnp.float32(1e-25))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(1e25 * x, y, rtol=1e-4, atol=1e-5),
    small,
    two,
  )
  step = 1e-2
  ahead, behind = (
    jax.jit(loss, static_argnums=2)(at[0], at[1] + s, regmean)
    for s in (step, -step)
  )
  np.testing.assert_allclose(one[1], (ahead - behind) / (2 * step), rtol=0.02)

  def kept(quantile):
    method = pj.merging.trust_region(quantile=quantile)
    return jnp.sum(pj.merge(others[0], others, method)["w"])

  with pytest.raises(SelectionError, match="no derivative"):
    jax.grad(kept)(jnp.float32(0.5))


def test_a_repository_knows_statistics_by_their_digest():
  base, a, b = tiny(0, 0), tiny(1, 2), tiny(3, 4)

  def method(f):
    fishers = [Fisher(tiny(1, f), 1, "exact"), Fisher(tiny(1, 1), 1, "exact")]
    return pj.merging.fisher(fishers=fishers)

  with pj.history.Repo.temporary() as repo:
    repo.commit(base, message="start")
    for name, tuned in (("a", a), ("b", b)):
      repo.branch(name)
      repo.commit(tuned, message=name, branch=name)
    repo.merge("main", ["a", "b"], method=method(3))
    assert repo.replay(method=method(3)).same
    with pytest.raises(FormatError, match="another numbers"):
      repo.replay(method=method(2))
    with pytest.raises(RepositoryError, match="give the method"):
      repo.replay()


def test_statistics_of_other_leaves_are_refused():
  leaf = np.zeros((4, 3), "f4")
  nested, others = {"params": {"w": leaf}}, [{"w": leaf}, {"w": leaf + 1}]

  def refused(method, error, match, **how):
    with pytest.raises(error, match=match):
      pj.merge(others[0], others, method, **how)

  def fishers(params):
    values = dict(pj.trees.named_leaves(params))
    return [Fisher(values, 3, "exact")] * 2

  def grams(name, size=4):
    values = {name: np.ones((1, size, size), "f4")}
    return [Gram(values, {name: 3}, 3, ((name, FLAT),))] * 2

  match = "of 'params/w', and what is merged is 'w'"
  refused(pj.merging.fisher(fishers=fishers(nested)), SelectionError, match)
  refused(pj.merging.regmean(grams=grams("params/w")), SelectionError, match)
  mats = pj.merging.mats(statistics=grams("params/w"))
  refused(mats, SelectionError, match)
  refused({"w": mats}, SelectionError, match, only="w")
  with pytest.raises(SelectionError, match=match):
    mats.init(others[0])
  mats = pj.merging.mats(statistics=grams("w"), init=nested)
  refused(mats, SelectionError, match)
  # What would broadcast, or be no product of matrices.
  mats = pj.merging.mats(statistics=grams("w"), init={"w": leaf[0]})
  refused(mats, StructureError, r"init is of shape \(3,\), expected \(4, 3\)")
  row = fishers({"w": leaf[0]})
  match = r"w: .*diagonal is of shape \(3,\), expected \(4, 3\)"
  refused(pj.merging.fisher(fishers=row), StructureError, match)
  refused(pj.merging.mats(statistics=row), StructureError, match)
  match = r"w: .*matrix of inputs is of shape \(1, 5, 5\), expected \(1, 4, 4\)"
  refused(pj.merging.regmean(grams=grams("w", 5)), StructureError, match)


def test_bad_input():
  found = tasks()
  others = models(found)
  known = [gram(linear, m, x) for m, (x, _, _) in zip(others, found)]
  fisher = Fisher(others[0], 3, "exact")
  with pytest.raises(StructureError, match="of one kind, got Fisher, Gram"):
    pj.merging.mats(statistics=[known[0], fisher])
  with pytest.raises(SelectionError, match="one statistic a contributor, 2"):
    pj.merge(None, others, pj.merging.regmean(grams=known[:1]))
  with pytest.raises(StructureError, match="got none"):
    pj.merging.regmean(grams=[])
  odd = dataclasses.replace(fisher, values={"v": others[0]["w"]})
  with pytest.raises(StructureError, match="only one has v, w"):
    pj.merging.fisher(fishers=[fisher, odd])
  turned = dataclasses.replace(
    known[0], layers=(("w", LinearLayer((1,), (0,))),)
  )
  with pytest.raises(StructureError, match="other layers in w"):
    pj.merging.regmean(grams=[known[0], turned])
  with pytest.raises(TypeError, match="got dict"):
    solving.of_statistics([{}])
  with pytest.raises(ValueError, match="favor must be"):
    pj.merging.fisher(fishers=[fisher], favor="last")
  with pytest.raises(ValueError, match="iterations must be"):
    pj.merging.mats(statistics=known, iterations=0)
