"""AdaMerging against its reference, and against its purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.merging.learning import prediction_entropy
from patchjax.patches.perleaf import PerLeaf
from patchjax.trees.errors import MismatchError, NonFiniteError
from tests.reference import merging_learning

IN, CLASSES, TASKS = 6, 4, 3


def problem(seed=0):
  """A linear model, specialists on it, and inputs of each task."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return np.float32(rng.standard_normal(shape))

  base = {"w": 0.3 * draw(IN, CLASSES), "b": 0.1 * draw(CLASSES)}
  tuned = [
    {n: x + np.float32(0.5) * draw(*x.shape) for n, x in base.items()}
    for _ in range(TASKS)
  ]
  return base, tuned, [draw(20 + i, IN) for i in range(TASKS)]


def apply_fn(p, x):
  return x @ p["w"] + jnp.broadcast_to(p["b"], (len(x), CLASSES))


def exact(tree):
  return {n: np.float64(x) for n, x in tree.items()}


def vectors_of(base, tuned):
  return [{n: np.float64(x[n] - base[n]) for n in base} for x in tuned]


@pytest.mark.parametrize("level", ["task", "leaf"])
@pytest.mark.parametrize("plus_plus", [False, True])
def test_a_gradient_step_is_the_one_written_by_hand(level, plus_plus):
  base, tuned, tasks = problem()
  vectors = vectors_of(base, tuned)
  if plus_plus:
    vectors = merging_learning.selected_entries(vectors, 0.3)
  start = {n: np.full(TASKS, 0.3) for n in base}
  loss, slope = merging_learning.adamerging_step(
    exact(base), vectors, tasks, start
  )
  if level == "task":
    total = sum(slope.values())
    slope = dict.fromkeys(slope, total)
  found = pj.merging.adamerging(
    base,
    tuned,
    apply_fn,
    tasks,
    level=level,
    plus_plus=plus_plus,
    density=0.3,
    optimizer=optax.sgd(0.5),
    steps=1,
  )
  np.testing.assert_allclose(found.losses, [loss], rtol=1e-5)
  for n in base:
    weights = found.numbers if level == "task" else found.numbers.at(n)
    expected = np.clip(0.3 - 0.5 * slope[n], 0, 1)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    merged = base[n] + sum(c * v[n] for c, v in zip(expected, vectors))
    np.testing.assert_allclose(found.merged[n], merged, rtol=1e-4, atol=1e-5)


def test_steps_of_adam_are_those_of_the_reference():
  base, tuned, tasks = problem(4)
  vectors = vectors_of(base, tuned)

  def slopes(coefficients):
    return merging_learning.adamerging_step(
      exact(base), vectors, tasks, coefficients
    )[1]

  start = {n: np.full(TASKS, 0.3) for n in base}
  expected = merging_learning.adam(start, slopes, 0.05, 16)
  every = np.concatenate(list(expected.values()))
  assert every.min() < 0 and every.max() > 1  # clipped: they get no gradient
  found = pj.merging.adamerging(
    base, tuned, apply_fn, tasks, optimizer=optax.adam(0.05), steps=16
  )
  for n in base:
    np.testing.assert_allclose(
      found.numbers.at(n), np.clip(expected[n], 0, 1), atol=2e-4
    )


def test_entropy_falls():
  base, tuned, tasks = problem(2)
  found = pj.merging.adamerging(
    base,
    tuned,
    apply_fn,
    tasks,
    optimizer=optax.adam(0.02),
    steps=40,
  )
  assert (np.diff(found.losses) < 1e-3).all()
  assert found.losses[-1] < 0.9 * found.losses[0]
  again = pj.merge(
    base, tuned, pj.merging.task_arithmetic(weights=found.numbers)
  )
  for n in base:
    np.testing.assert_allclose(again[n], found.merged[n], rtol=1e-5, atol=1e-6)
  # The last loss is that before the last step.
  after = jax.jit(
    lambda p: sum(prediction_entropy(apply_fn(p, x)).mean() for x in tasks)
  )
  assert after(found.merged) < found.losses[-1]


def test_a_layer_shares_its_coefficients():
  rng = np.random.default_rng(0)

  def model():
    def draw():
      return np.float32(rng.standard_normal((3, 3)))

    return {
      "in": {"w": draw()},
      "blocks": [{"a": draw(), "b": draw()} for _ in range(2)],
      "Dense_0": {"w": draw()},
      "out": draw(),
    }

  def run(p, x):
    x = x @ p["in"]["w"]
    for block in p["blocks"]:
      x = jnp.tanh(x @ block["a"]) @ block["b"]
    return x @ p["Dense_0"]["w"] @ p["out"]

  base, tuned = model(), [model(), model()]
  x = np.float32(rng.standard_normal((2, 5, 3)))
  found = pj.merging.adamerging(
    base, tuned, run, list(x), level="layer", optimizer=optax.sgd(0.1), steps=2
  )
  values = found.numbers.values
  for i in range(2):
    a, b = (values[f"blocks/{i}/{leaf}"] for leaf in "ab")
    np.testing.assert_array_equal(a, b)
  rows = {tuple(np.asarray(v).tolist()) for v in values.values()}
  assert len(rows) == 5


def test_heads_of_their_own_and_batches_from_an_iterator():
  base, tuned, tasks = problem(3)
  heads = [lambda p, x, i=i: apply_fn(p, x)[:, : 2 + i] for i in range(TASKS)]
  found = pj.merging.adamerging(
    base, tuned, heads, iter([tasks, tasks]), steps=None
  )
  assert found.losses.shape == (2,)
  with pytest.raises(ValueError, match="2 functions"):
    pj.merging.adamerging(base, tuned, heads[:2], tasks, steps=1)
  with pytest.raises(ValueError, match="level"):
    pj.merging.adamerging(base, tuned, apply_fn, tasks, level="block")


def test_patches_and_other_leaves():
  base, tuned, tasks = problem(4)
  base = base | {"step": np.int32(3)}
  tuned = [x | {"step": np.int32(3)} for x in tuned]
  patches = [pj.diff(base, x) for x in tuned]
  one, two = (
    pj.merging.adamerging(base, given, apply_fn, tasks, steps=3)
    for given in (tuned, patches)
  )
  assert isinstance(one.numbers, PerLeaf) and "step" not in one.numbers.values
  assert one.merged["step"] == 3
  for n in ("w", "b"):
    np.testing.assert_allclose(one.merged[n], two.merged[n], rtol=1e-6)
  tuned[1] = tuned[1] | {"step": np.int32(4)}
  with pytest.raises(MismatchError, match="step"):
    pj.merging.adamerging(base, tuned, apply_fn, tasks, steps=1)


def test_infinite_entropy_is_an_error():
  base, tuned, tasks = problem(5)
  with pytest.raises(NonFiniteError, match="at step 0 of 1"):
    pj.merging.adamerging(
      base, tuned, lambda p, x: apply_fn(p, x) * jnp.nan, tasks, steps=1
    )


def test_on_a_mesh(mesh_explicit):
  base, tuned, tasks = problem(6)
  place = jax.sharding.NamedSharding(
    mesh_explicit, jax.sharding.PartitionSpec(None, "x")
  )

  whole = jax.sharding.NamedSharding(
    mesh_explicit, jax.sharding.PartitionSpec()
  )

  def put(tree):
    return tree | {"w": jax.device_put(tree["w"], place)}

  def on_mesh(p, x):
    w = jax.sharding.reshard(p["w"], whole)
    return apply_fn(p | {"w": w}, x)

  alone = pj.merging.adamerging(base, tuned, apply_fn, tasks, steps=2)
  there = pj.merging.adamerging(
    put(base), [put(x) for x in tuned], on_mesh, tasks, steps=2
  )
  assert there.merged["w"].sharding == place
  np.testing.assert_allclose(there.merged["w"], alone.merged["w"], rtol=1e-5)
