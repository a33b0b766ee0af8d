"""Numbers of any method, by gradients and by search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.merging.learning import cma_es, grid, uniform
from patchjax.trees.errors import (
  NonFiniteError,
  SelectionError,
  StructureError,
)


def problem(seed=0, k=2):
  rng = np.random.default_rng(seed)
  base = {"w": np.float32(rng.standard_normal((6, 4)))}
  deltas = [np.float32(rng.standard_normal((6, 4))) for _ in range(k)]
  return base, [{"w": base["w"] + d} for d in deltas], deltas


def distance(p, target):
  return jnp.mean(jnp.square(p["w"] - target))


def test_least_squares_is_solved():
  base, tuned, deltas = problem()
  target = base["w"] + np.float32(0.7) * deltas[0] - np.float32(0.2) * deltas[1]
  found = pj.merging.fit_numbers(
    base,
    tuned,
    lambda n: pj.merging.task_arithmetic(weights=n["weights"]),
    {"weights": np.zeros(2)},
    distance,
    target,
    optimizer=optax.sgd(0.3, momentum=0.5),
    steps=60,
  )
  np.testing.assert_allclose(found.numbers["weights"], [0.7, -0.2], atol=1e-3)
  np.testing.assert_allclose(found.merged["w"], target, atol=1e-3)
  assert found.losses[-1] < 1e-5 < found.losses[0]


@pytest.mark.parametrize(
  "method",
  [
    lambda n: pj.chain(
      pj.merging.elect_sign(),
      pj.merging.disjoint_mean(weights=n["w"]),
      pj.merging.scale(n["s"]),
    ),
    lambda n: pj.merging.slerp(t=n["s"]),
    lambda n: {"w": pj.merging.linear(weights=n["w"])},
    lambda n: pj.merging.task_arithmetic(
      scale=pj.merging.per_leaf(
        {"w": np.zeros((6, 4), np.float32)}, {"w": [n["s"], n["w"][0]]}
      )
    ),
  ],
  ids=["elected", "slerp", "by group", "by leaf"],
)
def test_a_step_is_that_of_finite_differences(method):
  base, tuned, _ = problem(1)
  target = base["w"] * np.float32(0.9)
  start = {"w": np.float32([1.0, 2.0]), "s": np.float32(0.4)}

  def loss(numbers):
    return float(distance(pj.merge(base, tuned, method(numbers)), target))

  found = pj.merging.fit_numbers(
    base,
    tuned,
    method,
    start,
    distance,
    target,
    optimizer=optax.sgd(1.0),
    steps=1,
  )
  np.testing.assert_allclose(found.losses, [loss(start)], rtol=1e-5)
  step = np.float32(1e-2)
  for name, value in start.items():
    for place in np.ndindex(*np.shape(value)):
      slope = 0.0
      for sign in (1, -1):
        near = np.array(value)
        near[place] += sign * step
        slope += sign * loss(start | {name: near}) / (2 * step)
      moved = np.asarray(start[name] - found.numbers[name])[place]
      np.testing.assert_allclose(moved, slope, rtol=2e-2, atol=2e-3)


def test_a_density_is_refused():
  base, tuned, _ = problem(2)
  with pytest.raises(SelectionError, match="density has no derivative"):
    pj.merging.fit_numbers(
      base,
      tuned,
      lambda n: pj.merging.ties(density=n),
      0.5,
      distance,
      base["w"],
      steps=1,
    )


def test_without_a_base_and_from_an_iterator():
  _, tuned, _ = problem(3)
  target = tuned[1]["w"]
  seen = pj.merging.fit_numbers(
    None,
    tuned,
    lambda logits: pj.merging.linear(weights=jax.nn.softmax(logits)),
    np.zeros(2),
    distance,
    iter([target] * 5),
    optimizer=optax.adam(0.1),
    steps=4,
  )
  assert seen.losses.shape == (4,)
  assert seen.numbers[1] > 0 > seen.numbers[0]
  with pytest.raises(StructureError, match="iterator over batches is empty"):
    pj.merging.fit_numbers(
      None,
      tuned,
      lambda n: pj.merging.linear(weights=n),
      np.ones(2),
      distance,
      iter([]),
    )
  with pytest.raises(NonFiniteError, match="at step 1"):
    pj.merging.fit_numbers(
      None,
      tuned,
      lambda n: pj.merging.linear(weights=n, normalize=False),
      np.ones(2),
      lambda p, _: jnp.sum(p["w"] ** 2),
      target,
      optimizer=optax.sgd(1e38),
      steps=2,
    )


def test_half_precision_leaves_learn():
  base, tuned, _ = problem(4)
  base, *tuned = ({"w": x["w"].astype(jnp.bfloat16)} for x in (base, *tuned))
  found = pj.merging.fit_numbers(
    base,
    tuned,
    lambda n: pj.merging.task_arithmetic(weights=n),
    np.zeros(2),
    lambda p, t: jnp.mean(jnp.square(p["w"] - t).astype(jnp.float32)),
    tuned[0]["w"],
    optimizer=optax.adam(0.1),
    steps=40,
  )
  assert found.merged["w"].dtype == jnp.bfloat16
  assert found.losses[-1] < found.losses[0] / 10


def by_share(n):
  """A method whose share selects, and compiles in little time."""
  return pj.chain(
    pj.merging.drop(density=n["density"], key=3),
    pj.merging.mean(),
    pj.merging.scale(n["scale"]),
  )


def test_a_grid_is_the_loop():
  base, tuned, _ = problem(5)
  target = tuned[0]["w"]
  values = {"density": [0.1, 0.4, 1.0], "scale": [0.5, 1.0]}

  def score(p):
    return -distance(p, target)

  expected = [
    float(score(pj.merge(base, tuned, by_share({"density": d, "scale": s}))))
    for d in values["density"]
    for s in values["scale"]
  ]
  best = int(np.argmax(expected))
  for how in ({}, {"chunk": 4}, {"traced": False}):
    found = pj.merging.search_numbers(
      base, tuned, by_share, score, grid(values), **how
    )
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    assert found.numbers["density"] == np.float32(values["density"][best // 2])
    assert found.score == found.scores.max()
    np.testing.assert_allclose(score(found.merged), found.score, rtol=1e-5)
    assert found.tried["scale"].shape == (6,)


@pytest.mark.parametrize("kind", ["uniform", "cma_es"])
def test_search_in_a_box(kind):
  if kind == "cma_es":
    pytest.importorskip("cmaes")
  base, tuned, deltas = problem(6)
  target = base["w"] + np.float32(0.6) * deltas[0] + np.float32(0.3) * deltas[1]
  low, high = {"w": np.zeros(2)}, {"w": np.ones(2)}
  proposals = (
    uniform(low, high, count=300, seed=1)
    if kind == "uniform"
    else cma_es(low, high, generations=25, population=12, seed=1)
  )
  found = pj.merging.search_numbers(
    base,
    tuned,
    lambda n: pj.merging.task_arithmetic(weights=n["w"]),
    lambda p: -distance(p, target),
    proposals,
  )
  assert len(found.scores) == 300
  near = 0.1 if kind == "uniform" else 0.01
  np.testing.assert_allclose(found.numbers["w"], [0.6, 0.3], atol=near)


def test_one_number_alone_by_evolution():
  pytest.importorskip("cmaes")
  proposals = cma_es(-1.0, 3.0, generations=15, start=2.5, seed=0)
  candidates, best = next(proposals), []
  assert abs(candidates.mean() - 2.5) < 1
  try:
    while True:
      best = candidates
      scores = -np.abs(candidates)
      scores[0] = np.nan
      candidates = proposals.send(scores)
  except StopIteration:
    pass
  assert np.abs(best).max() < 0.5


def test_what_a_search_refuses():
  base, tuned, _ = problem(7)

  def run(proposals, score=lambda p: p["w"].sum()):
    return pj.merging.search_numbers(base, tuned, by_share, score, proposals)

  with pytest.raises(StructureError, match="no candidate"):
    run([])
  with pytest.raises(NonFiniteError, match="scores of all 2"):
    run(
      grid({"density": [0.5], "scale": [1.0, 2.0]}),
      lambda p: p["w"].sum() * jnp.nan,
    )
  with pytest.raises(ValueError, match="a grid needs values"):
    grid({"density": []})
  with pytest.raises(ValueError, match="below its high"):
    uniform({"t": 1.0}, {"t": 1.0}, count=3)
  with pytest.raises(ValueError, match="one structure"):
    uniform({"t": 1.0}, {"s": 1.0}, count=3)


def test_one_nan_is_worse_than_all():
  base, tuned, _ = problem(8)
  found = pj.merging.search_numbers(
    base,
    tuned,
    lambda n: pj.merging.task_arithmetic(scale=n["scale"]),
    lambda p: jnp.where(p["w"][0, 0] == base["w"][0, 0], jnp.nan, -1.0),
    grid({"scale": [0.0, 1.0]}),
  )
  assert found.numbers["scale"] == 1 and np.isnan(found.scores[0])
