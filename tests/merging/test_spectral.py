"""Merges by singular vectors: what the papers claim, worked out and held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import SelectionError
from tests.reference import merging_spectral as reference

m = pj.merging
INS, OUTS = 8, 6
METHODS = {
  "tsv_m": m.tsv_m(),
  "star": m.star(),
  "iso_c": m.iso_c(),
  "iso_cts": m.iso_cts(common=0.5),
  "wudi": m.wudi(),
  "knots": m.knots(method=m.magmax()),
  "svc": m.svc(),
}


def orthonormal(rng, n, count):
  return np.linalg.qr(rng.standard_normal((n, count)))[0]


def tree(x):
  return {"w": np.asarray(x, np.float32)}


ZERO = tree(np.zeros((INS, OUTS)))


def merged(tasks, method, base=ZERO):
  others = [tree(base["w"] + x) for x in tasks]
  return np.asarray(pj.merge(base, others, method)["w"])


def random_tasks(count=2, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal((INS, OUTS)) for _ in range(count)]


def orthogonal_tasks(values):
  """Tasks whose inputs, and whose outputs, are orthogonal."""
  rng = np.random.default_rng(1)
  count = sum(map(len, values))
  p, q = orthonormal(rng, INS, count), orthonormal(rng, OUTS, count)
  found, start = [], 0
  for own in values:
    here = slice(start, start + len(own))
    found.append(p[:, here] @ np.diag(own) @ q[:, here].T)
    start += len(own)
  return found


# ---------------------------------------------------------------------------
# Tasks that have nothing in common.


@pytest.mark.parametrize("ranks", [(3, 3), (2, 1)])
def test_tsv_m_recovers_orthogonal_tasks(ranks):
  """Those of fewer directions than there is room for, too."""
  values = [[5.0, 3.0, 2.0][:rank] for rank in ranks]
  tasks = orthogonal_tasks(values)
  np.testing.assert_allclose(merged(tasks, m.tsv_m()), sum(tasks), atol=2e-6)


def test_tsv_m_does_not_recover_tasks_that_overlap():
  tasks = random_tasks()
  assert np.abs(merged(tasks, m.tsv_m()) - sum(tasks)).max() > 0.1


def test_iso_cts_recovers_orthogonal_tasks_with_a_flat_spectrum():
  # Two directions are common, one of each task, and each adds its other two.
  tasks = orthogonal_tasks([[5.0, 2.5, 1.5], [4.0, 2.0, 1.0]])
  found = merged(tasks, m.iso_cts(common=0.4))
  directions = [u[:, :3] @ vt[:3] for u, _, vt in map(np.linalg.svd, tasks)]
  mean = np.mean([5.0, 2.5, 1.5, 4.0, 2.0, 1.0])
  np.testing.assert_allclose(found, mean * sum(directions), atol=5e-6)


def test_iso_cts_recovers_flat_orthogonal_tasks():
  tasks = orthogonal_tasks([[2.002, 2.0, 2.0001], [2.001, 1.9999, 1.9998]])
  found = merged(tasks, m.iso_cts(common=0.4))
  np.testing.assert_allclose(found, sum(tasks), atol=4e-3)


@pytest.mark.parametrize("solver", ["closed", "adam"])
def test_wudi_recovers_tasks_with_orthogonal_inputs(solver):
  """Whatever their outputs have in common."""
  rng = np.random.default_rng(2)
  p = orthonormal(rng, INS, 5)
  tasks = [
    p[:, :3] @ rng.standard_normal((3, OUTS)),
    p[:, 3:] @ rng.standard_normal((2, OUTS)),
  ]
  method = m.wudi(solver=solver, iterations=5)
  found = merged(tasks, method)
  # Adam makes steps of its learning rate even of rounding errors.
  bound = 3e-6 if solver == "closed" else 6e-5
  np.testing.assert_allclose(found, sum(tasks), atol=bound)
  for x in tasks:  # on its own inputs the merge acts as each task does
    np.testing.assert_allclose(x.T @ found, x.T @ x, atol=1e-3)


# ---------------------------------------------------------------------------
# What else is claimed.


def test_wudi_is_the_minimum():
  tasks = random_tasks(3)
  found = merged(tasks, m.wudi()).astype(np.float64)

  def loss(x):
    return sum(
      np.sum((d.T @ (x - d)) ** 2) / np.sum(d**2)
      for d in map(np.float64, tasks)
    )

  rng = np.random.default_rng(3)
  for _ in range(4):
    step = 1e-3 * rng.standard_normal(found.shape)
    assert loss(found) < loss(found + step)
  assert loss(found) < loss(sum(tasks)) / 3


def test_wudi_is_the_nearest_minimum_to_the_sum():
  # Inputs that no task has are left alone.
  tasks = random_tasks()
  for x in tasks:
    x[-1] = 0
  np.testing.assert_allclose(merged(tasks, m.wudi())[-1], 0, atol=1e-5)


def test_a_large_ridge_is_the_sum():
  tasks = random_tasks()
  found = merged(tasks, m.wudi(ridge=1e6))
  np.testing.assert_allclose(found, sum(tasks), atol=1e-4)


def test_the_difference_of_the_solvers_is_reported():
  tasks = random_tasks(3)
  others = [tree(x) for x in tasks]
  base = ZERO | {"bias": np.zeros(3, np.float32)}
  others = [x | {"bias": np.ones(3, np.float32)} for x in others]
  few = m.wudi_difference(base, others, iterations=3)
  many = m.wudi_difference(base, others, iterations=1500, learning_rate=1e-2)
  assert set(few) == set(many) == {"w"}
  few, many = few["w"], many["w"]
  assert few.start == many.start and few.closed == many.closed
  assert few.closed < few.adam < few.start
  # With steps that are long and many enough Adam is at the closed form.
  np.testing.assert_allclose(many.adam, many.closed, rtol=1e-5)
  assert many.distance < 1e-3 < 0.5 < few.distance
  closed = merged(tasks, m.wudi()).astype(np.float64)
  adam = merged(tasks, m.wudi(solver="adam", iterations=3))
  expected = np.linalg.norm(adam - closed) / np.linalg.norm(closed)
  np.testing.assert_allclose(few.distance, expected, rtol=1e-4)


def test_knots_of_one_model_is_the_model():
  (task,) = random_tasks(1)
  found = merged([task], m.knots(method=m.ties(density=1.0)))
  np.testing.assert_allclose(found, task, atol=3e-6)


def test_knots_of_a_linear_method_is_that_method():
  tasks = random_tasks(3)
  found = merged(tasks, m.knots(method=m.task_arithmetic(scale=0.5)))
  np.testing.assert_allclose(found, 0.5 * sum(tasks), atol=3e-6)


def test_knots_counts_directions_of_leaves_with_many_outputs():
  """Two tasks of two inputs have four directions of twenty outputs."""
  rng = np.random.default_rng(4)
  base = tree(np.zeros((2, 20)))
  others = [tree(rng.standard_normal((2, 20))) for _ in range(2)]
  found = pj.merge(base, others, m.knots(method=m.ties(density=0.4)))["w"]
  wanted = reference.knots(base, others, density=0.4)["w"]
  np.testing.assert_allclose(found, wanted, atol=3e-6)
  padded = reference.knots(base, others, density=1.0)["w"]
  assert np.abs(found - padded).max() > 0.01


def test_knots_and_dare_drop_aligned_parts():
  tasks = random_tasks()
  method = m.dare_linear(density=0.5, key=3)
  found = merged(tasks[:1], m.knots(method=method))
  u, s, vt = np.linalg.svd(tasks[0].T, full_matrices=False)
  part, aligned = s[:, None] * vt, u.T @ found.T
  kept = np.abs(aligned) > np.abs(part)
  assert 0.3 < kept.mean() < 0.7
  np.testing.assert_allclose(aligned, 2 * part * kept, atol=1e-5)


def test_tsv_m_counts_equal_tasks_once():
  (task,) = random_tasks(1)
  u, s, vt = np.linalg.svd(task, full_matrices=False)
  wanted = u[:, :3] @ np.diag(s[:3]) @ vt[:3]
  for svd in ("exact", "gram"):
    found = merged([task] * 2, m.tsv_m(svd=svd))
    np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_tsv_m_invents_no_directions():
  rng = np.random.default_rng(3)
  inputs = rng.standard_normal((INS, 2))
  tasks = [inputs @ rng.standard_normal((2, OUTS)) for _ in range(2)]
  found = merged(tasks, m.tsv_m())
  basis = np.linalg.qr(inputs)[0]
  np.testing.assert_allclose(found, basis @ (basis.T @ found), atol=5e-6)


def test_tsv_m_of_as_many_tasks_as_directions():
  n = 49  # int(49 * (1 / 49)) is 0
  x = np.outer(np.arange(n), np.ones(n)) / n
  base = tree(np.zeros((n, n)))
  found = merged([x] * n, m.tsv_m(), base)
  np.testing.assert_allclose(found, x, atol=1e-4)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_derivatives_need_no_distinct_values(name, shape):
  """All singular values in the nearest orthonormal matrix are one."""
  rng = np.random.default_rng(4)
  task, moved, out = (
    rng.standard_normal(shape).astype(np.float32) for _ in range(3)
  )
  base = np.zeros(shape, np.float32)

  def loss(x):
    return jnp.sum(pj.merge({"w": base}, [{"w": x}], METHODS[name])["w"] * out)

  grad = np.asarray(jax.grad(loss)(task))
  step = np.float32(1e-2)
  up, down = (float(loss(task + s * step * moved)) for s in (1, -1))
  slope = (up - down) / (2 * float(step))
  np.testing.assert_allclose(np.sum(grad * moved), slope, rtol=2e-2, atol=2e-2)


def test_a_task_that_changes_nothing_has_a_derivative():
  (task,) = random_tasks(1)

  def loss(x):
    return jnp.sum(pj.merge(ZERO, [tree(task), x], m.iso_c())["w"] ** 2)

  assert np.isfinite(jax.grad(loss)(ZERO)["w"]).all()


def test_knots_counts_no_more_directions_than_it_is_told():
  rng = np.random.default_rng(7)
  tasks = [
    rng.standard_normal((24, 2)) @ rng.standard_normal((2, 16))
    for _ in range(2)
  ]
  base = tree(np.zeros((24, 16)))
  method = m.knots(method=m.ties(density=0.3), rank=4)
  others = [tree(x) for x in tasks]
  wanted = reference.knots(base, others, density=0.3)["w"]
  np.testing.assert_allclose(merged(tasks, method, base), wanted, atol=2e-5)


def test_knots_of_a_rank_keeps_the_first_directions():
  (task,) = random_tasks(1)
  u, s, vt = np.linalg.svd(task)
  inner = m.task_arithmetic(scale=1.0)
  found = merged([task], m.knots(method=inner, rank=2))
  wanted = (u[:, :2] * s[:2]) @ vt[:2]
  np.testing.assert_allclose(found, wanted, atol=3e-6)


def test_svc_counts_equal_tasks_once():
  (task,) = random_tasks(1)
  for count in (2, 5):
    found = merged([task] * count, m.svc())
    np.testing.assert_allclose(found, task, atol=3e-6)


def test_svc_of_the_paper_never_grows_from_one_on():
  tasks = random_tasks(3)
  plain = merged(tasks, m.task_arithmetic(scale=0.7))
  inner = m.task_arithmetic(scale=0.7)
  found = merged(tasks, m.svc(method=inner, alpha=1.0, formula="paper"))
  before, after = (np.linalg.svd(x, compute_uv=False) for x in (plain, found))
  assert (after <= before + 1e-5).all() and (after < before - 1e-3).any()


def test_brackets_nest():
  (task,) = random_tasks(1)
  inner = m.knots(method=m.task_arithmetic(scale=0.3))
  found = merged([task] * 3, m.svc(method=inner))
  np.testing.assert_allclose(found, task, atol=5e-6)
  closing = m.svc().stages[-1]
  with pytest.raises(ValueError, match="opens"):
    pj.chain(m.mean(), pj.Transform(({"alpha": 0.1},), (closing,)))


@pytest.mark.parametrize("name", METHODS)
def test_permuted_units_are_merged_to_permuted_units(name):
  rng = np.random.default_rng(5)
  rows, columns = rng.permutation(INS), rng.permutation(OUTS)
  tasks = random_tasks()
  plain = merged(tasks, METHODS[name])
  found = merged([x[rows][:, columns] for x in tasks], METHODS[name])
  np.testing.assert_allclose(found, plain[rows][:, columns], atol=2e-5)


# ---------------------------------------------------------------------------
# Leaves.


@pytest.mark.parametrize("name", ["iso_cts", "wudi", "knots", "svc"])
def test_layouts_are_transposes(name):
  """Where outputs and inputs are not alike."""
  options = {"iso_cts": {"common": 0.5}, "knots": {"method": m.magmax()}}
  options = options.get(name, {})
  make = getattr(m, name)
  tasks = random_tasks()
  plain = merged(tasks, make(**options))
  turned = merged(
    [x.T for x in tasks],
    make(**options, layout="out_in"),
    tree(np.zeros((OUTS, INS))),
  )
  np.testing.assert_allclose(turned.T, plain, atol=1e-5)
  swapped = merged(tasks, make(**options, layout="out_in"))
  assert np.abs(swapped - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["tsv_m", "iso_cts", "wudi", "knots"])
def test_leading_axes_are_a_batch(name):
  tasks = [random_tasks(seed=seed) for seed in range(2)]
  stacked = [np.stack(x) for x in zip(*tasks)]
  base = tree(np.zeros((2, INS, OUTS)))
  found = merged(stacked, METHODS[name], base)
  for x, own in zip(found, tasks, strict=True):
    np.testing.assert_allclose(x, merged(own, METHODS[name]), atol=1e-5)


def test_axes_may_be_grouped():
  tasks = random_tasks()
  wide = merged(
    [x.reshape(INS, 2, OUTS // 2) for x in tasks],
    m.wudi(batch_axes=0),
    tree(np.zeros((INS, 2, OUTS // 2))),
  )
  plain = merged(tasks, m.wudi())
  np.testing.assert_allclose(wide.reshape(INS, OUTS), plain, atol=1e-6)
  two = merged(
    [x.reshape(2, INS // 2, OUTS) for x in tasks],
    m.wudi(in_axes=2),
    tree(np.zeros((2, INS // 2, OUTS))),
  )
  np.testing.assert_allclose(two.reshape(INS, OUTS), plain, atol=1e-6)


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (m.tsv_m(), 2.0),
    (m.star(), 2.0),
    (m.iso_c(scale=0.5), 1.0),
    (m.iso_cts(), 2.0),
    (m.wudi(), 0.0),
    (m.wudi(others="mean"), 2.0),
    (m.svc(), 1.2),
    (m.knots(method=m.task_arithmetic()), 4.0),
  ],
)
def test_vectors(method, expected):
  base = tree(np.zeros(3))
  others = [tree(np.full(3, x)) for x in (1, 3)]
  found = pj.merge(base, others, method)["w"]
  np.testing.assert_allclose(found, np.full(3, expected), atol=1e-6)


def test_empty_leaves_stay():
  base = tree(np.zeros((0, 4)))
  for method in (m.tsv_m(), m.wudi(), m.svc()):
    assert pj.merge(base, [tree(np.ones((0, 4)))], method)["w"].shape == (0, 4)


def test_a_task_that_changes_nothing_takes_no_part_in_wudi():
  (task,) = random_tasks(1)
  found = merged([task, 0 * task], m.wudi())
  np.testing.assert_allclose(found, task, atol=3e-6)


def test_tsv_c_keeps_a_share_of_the_directions():
  (task,) = random_tasks(1)
  patch = pj.diff(ZERO, tree(task))
  small = pj.compress(patch, pj.truncate(share=1 / 3, method="exact"))
  assert small.deltas["w"].code.rank == OUTS // 3
  u, s, vt = np.linalg.svd(task, full_matrices=False)
  wanted = u[:, :2] @ np.diag(s[:2]) @ vt[:2]
  np.testing.assert_allclose(small.deltas["w"].code.dense(), wanted, atol=5e-6)
  with pytest.raises(ValueError, match="share"):
    pj.truncate()


# ---------------------------------------------------------------------------
# Numbers.


def test_randomized_is_near_where_spectra_decay():
  rng = np.random.default_rng(6)
  n = 48

  def task():
    u, v = orthonormal(rng, n, n), orthonormal(rng, n, n)
    return u @ np.diag(0.6 ** np.arange(n)) @ v.T

  tasks = [task() for _ in range(2)]
  base = tree(np.zeros((n, n)))
  exact = merged(tasks, m.tsv_m(share=0.125), base)
  found = merged(tasks, m.tsv_m(share=0.125, svd="randomized"), base)
  gap = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  assert 0 < gap < 5e-3


GRAM = {
  "tsv_m": lambda svd: m.tsv_m(svd=svd),
  "star": lambda svd: m.star(svd=svd),
  "svc": lambda svd: m.svc(svd=svd),
  "knots": lambda svd: m.knots(method=m.magmax(), svd=svd),
}


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (10, 50)])
@pytest.mark.parametrize("name", GRAM)
def test_gram_matrices_say_what_the_decomposition_says(name, shape):
  rng = np.random.default_rng(8)
  n = min(shape)
  # Values down to a hundredth of the largest, and some that are none.
  values = np.concatenate([np.geomspace(1, 0.01, n - 3), np.zeros(3)])

  def task():
    u, v = (orthonormal(rng, side, n) for side in shape)
    return 5 * u @ np.diag(values) @ v.T

  tasks = [task() for _ in range(2)]
  base = tree(np.zeros(shape))
  exact, found = (
    merged(tasks, GRAM[name](svd), base) for svd in ("exact", "gram")
  )
  np.testing.assert_allclose(found, exact, atol=1e-3 * np.abs(exact).max())


def test_gram_matrices_tell_nearly_dependent_vectors_apart():
  a, c, b, d = np.eye(8)[:4]
  tasks = [np.outer(a, b), np.outer(a + 1e-3 * c, d)]
  base = tree(np.zeros((8, 8)))
  exact, found = (
    merged(tasks, m.tsv_m(share=0.125, svd=svd), base)
    for svd in ("exact", "gram")
  )
  assert np.abs(exact[1]).max() > 0.5
  np.testing.assert_allclose(found, exact, atol=1e-3)


@pytest.mark.parametrize("name", ["svc", "knots"])
def test_gram_matrices_lose_nothing_that_is_small(name):
  rng = np.random.default_rng(9)
  u, v = orthonormal(rng, 12, 12), orthonormal(rng, 12, 12)
  task = u @ np.diag(np.geomspace(1, 1e-5, 12)) @ v.T
  methods = {
    "svc": m.svc(method=m.task_arithmetic(), svd="gram"),
    "knots": m.knots(method=m.mean(), threshold=0.0, svd="gram"),
  }
  found = merged([task], methods[name], tree(np.zeros((12, 12))))
  np.testing.assert_allclose(found, task, atol=2e-6)


def test_knots_by_gram_matrices_loses_no_inputs():
  rng = np.random.default_rng(9)
  u, v = orthonormal(rng, 4, 4), orthonormal(rng, 20, 4)
  task = u @ np.diag([1, 1e-3, 1e-3, 1e-3]) @ v.T
  method = m.knots(method=m.mean(), threshold=0.0, svd="gram")
  found = merged([task], method, tree(np.zeros((4, 20))))
  np.testing.assert_allclose(found, task, atol=2e-6)


def test_scales_are_learned_and_eta_is_not():
  tasks = [tree(x) for x in random_tasks()]

  def loss(number, make):
    found = pj.merge(ZERO, tasks, make(number))["w"]
    return jnp.sum(found * found)

  grad = jax.grad(loss)(2.0, lambda scale: m.tsv_m(scale=scale))
  length = np.sum(merged(random_tasks(), m.tsv_m()) ** 2)
  np.testing.assert_allclose(grad, 2 * 2.0 * length, rtol=1e-4)
  with pytest.raises(SelectionError):
    jax.grad(loss)(40.0, lambda eta: m.star(eta=eta))


@pytest.mark.parametrize(
  "make",
  [
    lambda: m.tsv_m(share=0.0),
    lambda: m.tsv_m(svd="qr"),
    lambda: m.star(svd="randomized"),
    lambda: m.iso_cts(common=1.5),
    lambda: m.wudi(solver="sgd"),
    lambda: m.wudi(iterations=-1),
    lambda: m.wudi(layout="torch"),
    lambda: m.wudi(in_axes=0),
    lambda: m.svc(formula="mean"),
    lambda: m.knots(svd="randomized"),
    lambda: m.knots(rank=0),
    lambda: m.knots(method=pj.trim(density=0.5)),
    lambda: m.svc(method=m.linear(normalize=False)),
    lambda: m.core_space([], method=pj.trim(density=0.5)),
    lambda: m.core_space([]),
  ],
)
def test_bad_options_are_refused(make):
  with pytest.raises(ValueError):
    make()
