"""The transform protocol: specs, chains, and steps of one's own."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import Step, Transform, register_step, transform
from patchjax.trees.errors import FormatError, NonFiniteError, SelectionError


def halved(leaf, deltas, base, state, shared, *, sign):
  del leaf, base, shared
  return tuple(sign * d * jnp.float32(state["factor"]) for d in deltas)


HALVE = register_step(Step("test_halve", halved))


def norm_start(state, shapes, k):
  del state, shapes
  return np.zeros(k, np.float32)


def norm_reduce(leaf, deltas, state, carry):
  del leaf, state, carry
  return jnp.stack([jnp.sum(jnp.square(d)) for d in deltas])


def norm_finish(total, carry):
  del carry
  return jnp.sqrt(total), jnp.asarray(True)


def unit(leaf, deltas, base, state, norms):
  del leaf, base, state
  return tuple(d / norms[i] for i, d in enumerate(deltas))


UNIT = register_step(
  Step(
    "test_unit",
    unit,
    start=norm_start,
    counts=transform.one_count(norm_reduce, norm_finish),
  )
)


def noise_init(numbers, shapes):
  assert {s.shape for s in shapes.values()} <= {(2,), (3,)}
  return {"key": numbers["key"]}


def noise(leaf, deltas, base, state, shared):
  del base, shared
  key = state["key"]
  for word in (leaf.identity[0], leaf.identity[1]):
    key = jax.random.fold_in(key, word)
  return tuple(jax.random.normal(key, d.shape, d.dtype) for d in deltas)


NOISE = register_step(Step("test_noise", noise, init=noise_init))


def halve(factor, sign=1):
  return Transform.of(HALVE, {"factor": factor}, sign=sign)


def trees():
  base = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
  one = {"a": np.float32([3, 0]), "b": np.float32([0, 4, 0])}
  two = {"a": np.float32([0, 2]), "b": np.float32([0, 0, 0])}
  return base, [one, two]


def test_own_step_in_a_chain():
  base, others = trees()
  method = pj.chain(halve(0.5, sign=-1), pj.merging.mean())
  merged = pj.merge(base, others, method)
  assert merged["a"].tolist() == [-0.75, -0.5]


@pytest.mark.parametrize("run", [pj.merge, jax.jit(pj.merge)])
def test_own_counting_step(run):
  base, others = trees()
  method = pj.chain(Transform.of(UNIT, {}), pj.merging.weighted_sum())
  merged = run(base, others, method)
  np.testing.assert_allclose(merged["a"], [0.6, 1.0], rtol=1e-6)
  np.testing.assert_allclose(merged["b"], [0, 0.8, 0], rtol=1e-6)
  # The norm is taken after the steps before it, so a factor cancels.
  again = run(base, others, pj.chain(halve(7.0), method))
  np.testing.assert_allclose(again["b"], [0, 0.8, 0], rtol=1e-6)


def test_random_step_depends_on_names_alone():
  base, others = trees()
  method = pj.chain(
    Transform.of(NOISE, {"key": jax.random.key(0)}), pj.merging.mean()
  )
  both = pj.merge(base, others, method)
  alone = pj.merge({"b": base["b"]}, [{"b": x["b"]} for x in others], method)
  assert (both["b"] == alone["b"]).all()
  jitted = jax.jit(pj.merge)(base, others, method)
  assert (both["b"] == jitted["b"]).all()


def test_spec_and_numbers_rebuild_and_store():
  method = pj.merging.ties(density=0.3, scale=0.5, weights=[1.0, 2.0])
  stored = json.loads(json.dumps(method.spec))
  numbers = json.loads(
    json.dumps(
      [
        {k: np.asarray(v).tolist() for k, v in n.items()}
        for n in method.numbers
      ]
    )
  )
  numbers = [
    {k: np.float32(v) if isinstance(v, list) else v for k, v in n.items()}
    for n in numbers
  ]
  again = pj.from_spec(stored, numbers)
  assert again.spec == method.spec and hash(again.spec) == hash(method.spec)
  base, others = trees()
  assert (
    pj.merge(base, others, again)["b"] == pj.merge(base, others, method)["b"]
  ).all()
  with pytest.raises(FormatError, match="unknown step 'nope'"):
    pj.from_spec(("nope", ()), {})
  with pytest.raises(FormatError, match="as many dicts"):
    pj.from_spec(method.spec, [{}])


def test_is_a_pytree_of_its_numbers():
  method = pj.merging.ties(density=0.3, scale=0.5)
  assert sorted(jax.tree.leaves(method)) == [0.3, 0.5]
  doubled = jax.tree.map(lambda x: 2 * x, method)
  assert doubled.numbers[0] == {"density": 0.6}
  assert doubled.spec == method.spec


def test_chain_is_flat_and_checks():
  inner = pj.chain(pj.trim(density=0.5), pj.merging.mean())
  assert len(pj.chain(inner, pj.merging.scale(2.0)).stages) == 3
  with pytest.raises(ValueError, match="at least one"):
    pj.chain()
  with pytest.raises(ValueError, match="go together"):
    Step("half", halved, counts=transform.one_count(norm_reduce, norm_finish))


def test_names_of_steps_are_not_taken_over():
  other = Step("trim", halved)
  with pytest.raises(ValueError, match="already registered"):
    register_step(other)
  assert register_step(HALVE) is HALVE


def test_init_gives_float32_arrays():
  state = pj.merging.ties(density=0.3).init({"w": np.zeros(3)})
  assert state[0]["density"].dtype == jnp.float32
  assert len(state) == 4


def test_per_contributor():
  assert transform.per_contributor(2.0, 3) == (2.0, 2.0, 2.0)
  with pytest.raises(SelectionError, match="one number or 3"):
    transform.per_contributor(np.zeros(2), 3)


def test_own_reducing_step_may_use_the_base():
  def shrink(leaf, deltas, base, state, shared):
    del leaf, state, shared
    return deltas[0] - base * jnp.float32(0.5)

  step = register_step(Step("test_shrink", shrink, reducing=True))
  base = {"w": jnp.bfloat16([2, 4])}
  merged = pj.merge(base, [base | {"w": base["w"] + 1}], Transform.of(step, {}))
  assert merged["w"].dtype == jnp.bfloat16 and merged["w"].tolist() == [2, 3]


CALLS: list[int] = []


def slow(leaf, deltas, base, state, shared, *, dear):
  """Opens a bracket; the host sees how often it is run."""
  del leaf, base, state, shared, dear

  def called(x):
    CALLS.append(1)
    return np.asarray(x) * np.float32(2)

  out = tuple(
    jax.pure_callback(called, jax.ShapeDtypeStruct(d.shape, d.dtype), d)
    for d in deltas
  )
  return out, out[0]


def last(leaf, deltas, base, state, shared, held):
  del leaf, base, state, shared
  return tuple(d + held for d in deltas)


SLOW = {
  dear: register_step(
    Step(f"test_slow_{dear}", slow, bracket="opens", dear=dear)
  )
  for dear in (False, True)
}
LAST = register_step(Step("test_last", last, bracket="closes"))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_dear_steps_are_made_once_for_all_passes(jitted, outer):
  random = np.random.default_rng(0)
  base, one, two = (
    {
      name: random.standard_normal(size).astype(np.float32)
      for name, size in (("a", 50), ("b", 70))
    }
    for _ in range(3)
  )
  found, calls = {}, {}
  for dear, step in SLOW.items():
    inner = [
      halve(0.5),
      Transform.of(step, {}, dear=dear),
      pj.trim(density=0.3),
      pj.merging.mean(),
      Transform.of(LAST, {}),
    ]
    if outer:  # Brackets open before it, and stay open.
      plain = Transform.of(SLOW[False], {}, dear=False)
      inner = [plain, *inner, Transform.of(LAST, {})]
    method = pj.chain(*inner)
    merge = functools.partial(pj.merge, method=method)
    CALLS.clear()
    found[dear] = (jax.jit(merge) if jitted else merge)(base, [one, two])
    jax.block_until_ready(found[dear])
    calls[dear] = len(CALLS)
  # Two leaves of two contributors, one or two such steps.
  assert calls[True] == (8 if outer else 4)
  if not jitted:
    assert calls[False] > calls[True]
  for name, value in found[True].items():
    assert np.array_equal(value, found[False][name]), name
    assert np.abs(value - base[name]).max() > 0.1


def test_dear_steps_name_the_leaf_that_is_not_finite():
  base, others = trees()
  others[1]["b"][1] = np.nan
  method = pj.chain(
    Transform.of(SLOW[True], {}, dear=True),
    pj.trim(density=0.5),
    pj.merging.mean(),
    Transform.of(LAST, {}),
  )
  with pytest.raises(NonFiniteError, match="b: 1 entries of the contrib"):
    pj.merge(base, others, method)
