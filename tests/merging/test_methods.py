"""Every merge method, by the table in `battery.py`.

A compilation is what a test costs, so not everything is run everywhere. In
float32, on one device, eagerly, each row is held to its reference and to the
rest of what it says; all that shares one program, and so do files. Then each
method is run in three more ways, see `runs_of`: in every dtype, on one device
and on both kinds of meshes, eagerly and under jit with `eval_shape`. What is
combined with what goes round among the methods; no two stay apart.

Rows that are variants of a method leave out the three ways. Under jit there is
one leaf only, unless leaves depend on each other: a jit shares nothing between
them, and `test_battery.py` has some with several.
"""

import collections
import dataclasses
import functools
import inspect
import itertools

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.merging import methods
from tests.merging.battery import CASES, method_of
from tests.merging.battery_models import named
from tests.merging.calls import (
  NAMES,
  ROWS,
  assert_close,
  assert_fits,
  assert_rounded,
  assert_same,
  each,
  eagerly,
  from_files,
  given,
  merge_jit,
  method,
  on_mesh,
  part,
  reference,
  references,
)
from tests.merging.models import same_bits

# ---------------------------------------------------------------------------
# One device, float32.


def check_reference(name, request):
  del request
  base, others = given(name)
  assert_fits(eagerly(name), others[0])
  expected = reference(name, base, others)
  assert_close(eagerly(name), expected, CASES[name].close)


def check_shapes(name, request):
  del request
  base, others = given(name)
  assert_fits(jax.eval_shape(pj.merge, base, others, method(name)), others[0])


def check_files(name, request):
  folder = request.getfixturevalue("tmp_path")
  found = from_files(folder, *given(name), method(name))
  assert same_bits(found, eagerly(name))


def check_numbers(name, request):
  """Other numbers compile nothing."""
  del request
  new = broadcast(name, CASES[name].swept, CASES[name].contributors)
  base, others = given(name)
  eagerly(name)
  with jax.no_tracing():
    found = pj.merge(base, others, method(name, **new))
  assert not same_bits(found, eagerly(name))


def check_leaves(name, request):
  """Nor does their order matter, nor to local methods what others there are."""
  del request
  case = CASES[name]
  wanted = eagerly(name)

  def turned(tree):
    if not isinstance(tree, dict):
      return tree
    pairs = [(key, turned(x)) for key, x in tree.items()]
    return collections.OrderedDict(reversed(pairs))

  found = named(pj.merge(*each(turned, *given(name)), method(name)))
  for leaf, x in named(wanted).items():
    if case.exact:
      assert same_bits(found[leaf], x), f"order of leaves: {leaf}"
    np.testing.assert_allclose(
      found[leaf], x, rtol=0, atol=case.close * np.max(np.abs(x))
    )
  if case.local:
    found = pj.merge(*each(part, *given(name)), method(name))
    assert same_bits(found, part(wanted)), "a leaf alone"


def check_contributors(name, request):
  """Their order does not matter."""
  del request
  case = CASES[name]
  turned = {
    key: value[::-1]
    for key, value in case.options.items()
    if isinstance(value, list) and len(value) == case.contributors
  }
  base, others = given(name)
  found = pj.merge(base, others[::-1], method(name, **turned))
  assert_close(found, named(eagerly(name)), case.close)


def check_one(name, request):
  """A single contributor is the result."""
  del request
  base, others = given(name)
  how = method(name, **broadcast(name, CASES[name].alone, 1))
  found = pj.merge(base, others[:1], how)
  assert_close(found, named(others[0]), 2e-6)


def check_equal(name, request):
  """Contributors that are equal are the result; that compiles nothing."""
  del request
  count = CASES[name].contributors
  base, others = given(name)
  how = method(name, **broadcast(name, CASES[name].agreed, count))
  eagerly(name)
  with jax.no_tracing():
    found = pj.merge(base, others[:1] * count, how)
  assert_close(found, named(others[0]), 2e-6)


def broadcast(name, special, count):
  """Options, as many numbers of each as the row has of its own."""
  lists = {
    key: value[:count]
    for key, value in CASES[name].options.items()
    if isinstance(value, list)
  }

  def alike(key, value):
    one = key in lists and not isinstance(value, list)
    return [value] * len(lists[key]) if one else value

  return lists | {key: alike(key, value) for key, value in special.items()}


# ---------------------------------------------------------------------------
# Elsewhere.


@dataclasses.dataclass(frozen=True)
class Run:
  """One more way to run a method."""

  dtype: str
  place: str
  how: str

  def __str__(self):
    return f"{self.dtype}-{self.place}-{self.how}"


def runs_of(name):
  """The ways, going round among the methods."""
  turn = NAMES.index(name)
  meshes = ("Auto", "Explicit")[:: 1 if turn % 2 else -1]
  hows = ("eager", "jit")[:: 1 if turn // 2 % 2 else -1]
  short = ("bfloat16", "float16")[:: 1 if turn // 4 % 2 else -1]
  return (
    Run("float32", meshes[0], hows[0]),
    Run(short[0], meshes[1], hows[1]),
    Run(short[1], "one", "jit"),
  )


def check_run(name, request, run):
  case = CASES[name]
  base, others = given(name, run.dtype)
  alone = run.how == "jit" and case.local
  if alone:
    base, others = each(part, base, others)
  expected = reference(name, base, others)
  wide = each(functools.partial(cast, dtype=np.float32), base, others)
  wanted = part(eagerly(name)) if alone else eagerly(name)
  if run.dtype != "float32":
    # The same numbers in float32, which are merged by a program that exists,
    # rounded once.
    wanted = cast(pj.merge(*wide, method(name)), others[0])
  if run.place != "one":
    mesh = request.getfixturevalue(f"mesh_{run.place.lower()}")
    base, others = on_mesh(base, others, mesh)
  if run.how == "jit":
    assert_fits(merge_jit.eval_shape(base, others, method(name)), others[0])
  merge = merge_jit if run.how == "jit" else pj.merge
  found = merge(base, others, method(name))
  assert_fits(found, others[0])
  if run.dtype == "float32":
    assert_same(name, found, wanted, "as eagerly on one device")
  else:
    close = 0.0 if case.exact else case.close
    assert_rounded(found, expected, run.dtype, close)
    if case.exact:
      assert same_bits(found, wanted), "rounded once"


def cast(tree, dtype):
  """In another dtype, but for integers, or in that of another tree."""

  def to(x, dtype):
    return x if x.dtype == np.int32 else np.asarray(x).astype(dtype)

  if isinstance(dtype, dict):
    return jax.tree.map(lambda x, like: to(x, like.dtype), tree, dtype)
  return jax.tree.map(lambda x: to(x, dtype), tree)


# ---------------------------------------------------------------------------
# All of it, row by row: one process compiles what a row needs.


def checks_of(name):
  """The checks of a row by name."""
  case = CASES[name]
  found = [check_reference, check_files, check_leaves]
  if case.swept:
    found.append(check_numbers)
  if name not in NAMES:
    found.append(check_shapes)
  if case.symmetric and case.masks is None and case.contributors > 1:
    found.append(check_contributors)
  if case.alone is not None:
    found.append(check_one)
  if case.agreed is not None:
    found.append(check_equal)
  checks = {f.__name__.removeprefix("check_"): f for f in found}
  if name in NAMES:
    for run in runs_of(name):
      checks[str(run)] = functools.partial(check_run, run=run)
  return checks


@pytest.mark.parametrize(
  ("name", "check"),
  [
    pytest.param(name, check, id=f"{name}-{what}")
    for name in ROWS
    for what, check in checks_of(name).items()
  ],
)
def test_row(name, check, request):
  check(name, request)


def test_every_method_is_run_everywhere():
  seen = set()
  for name in NAMES:
    runs = [Run("float32", "one", "eager"), *runs_of(name)]
    for what, count in (("dtype", 3), ("place", 3), ("how", 2)):
      assert len({getattr(run, what) for run in runs}) == count, name
    for run in runs:
      seen.update(itertools.combinations(dataclasses.astuple(run), 2))
  kinds = (("float32", "bfloat16", "float16"), ("one", "Auto", "Explicit"))
  for one, other in itertools.combinations((*kinds, ("eager", "jit")), 2):
    assert seen >= set(itertools.product(one, other))


# ---------------------------------------------------------------------------
# The table.


def test_every_method_has_a_row_a_reference_and_a_source():
  rows = {method_of(name) for name in ROWS}
  listed = {function.__name__ for function in methods.METHODS}
  assert rows == listed
  for function in methods.METHODS:
    name = function.__name__
    assert name in references(), f"{name} has no reference"
    assert getattr(pj.merging, name) is function
    assert name in pj.merging.__all__
    assert "http" in (function.__doc__ or ""), f"{name} names no source"
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}, name


def test_defaults_are_those_of_the_references():
  for function in methods.METHODS:
    wanted = inspect.signature(references()[function.__name__]).parameters
    for name, parameter in inspect.signature(function).parameters.items():
      if name in wanted and name != "weights":
        default = wanted[name].default
        assert parameter.default == default, (function.__name__, name)


def test_rows_are_called_apart():
  """A row that repeats another's options tests nothing new."""
  seen = {}
  for name in ROWS:
    key = (method_of(name), repr(CASES[name]))
    assert key not in seen, f"{name} repeats {seen.get(key)}"
    seen[key] = name
