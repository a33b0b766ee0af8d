"""Every merge method, by the table in `battery.py`.

A compilation is what a test costs, so not everything is run everywhere, but
every method in every way and at every place, and in every dtype:

  float32, one device, eagerly and from files; `eval_shape`: every row;
  float32, Explicit mesh: every method; rows take turns, eagerly or under jit;
  bfloat16, Auto mesh: every method, in turn under jit or eagerly;
  float16, one device, eagerly: every method that is not heavy.

Heavy methods are run eagerly only; under jit is what `test_battery.py` does
with the steps that they share. Rows that are variants of a method leave out
what is said of every method.
"""

import collections
import functools
import importlib
import inspect
import pathlib

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.interop.files import read, write
from patchjax.merging import methods
from tests.golden import recorded
from tests.merging.battery import CASES, DTYPES, method_of, models, named, put
from tests.merging.models import same_bits

ROWS = sorted(CASES)
NAMES = [name for name in ROWS if name == method_of(name)]
merge_jit = jax.jit(pj.merge)


def in_turn(name, *, second=False):
  """Half of the rows are run under jit, the other half eagerly."""
  if CASES[name].heavy:
    return pj.merge
  return (pj.merge, merge_jit)[(ROWS.index(name) + second) % 2]


@functools.cache
def references():
  """Every function of `tests/reference/merging_*.py` by name."""
  here = pathlib.Path(__file__).parents[1] / "reference"
  found = {}
  for path in sorted(here.glob("merging_*.py")):
    module = importlib.import_module(f"tests.reference.{path.stem}")
    for name, function in inspect.getmembers(module, inspect.isfunction):
      if function.__module__ == module.__name__:
        found[name] = function
  return found


def method(name, **others):
  case = CASES[name]
  make = getattr(pj.merging, method_of(name))
  return make(**{**case.options, **case.only_method, **others})


def masks(name, base, others, options):
  make = CASES[name].masks
  return {} if make is None else {"masks": make(base, others, options)}


def reference(name, base, others):
  """What the method should give, in float64."""
  case = CASES[name]
  base, others = named(base), list(map(named, others))
  function = references()[method_of(name)]
  given = masks(name, base, others, case.options)
  return function(base if case.base else None, others, **case.options, **given)


def given(name, dtype="float32"):
  """Base (or None), contributors."""
  base, others = models(CASES[name].contributors, dtype)
  return (base if CASES[name].base else None), others


def assert_close(found, expected, bound=1e-6, what=""):
  """To a share of each leaf's largest number."""
  found = named(found)
  for leaf, wanted in expected.items():
    np.testing.assert_allclose(
      found[leaf],
      wanted,
      rtol=0,
      atol=bound * np.max(np.abs(wanted)),
      err_msg=f"{what} {leaf}",
    )


def assert_same(name, found, wanted, what):
  """The same bits, or of methods that sum floats nearly the same."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  if CASES[name].exact:
    assert same_bits(found, wanted), what
  else:
    assert_close(found, named(wanted), CASES[name].close, what)


def assert_fits(found, like):
  """Structure, shapes, dtypes, and places if there are any."""
  assert jax.tree.structure(found) == jax.tree.structure(like)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert x.shape == y.shape and x.dtype == y.dtype
    if isinstance(y, jax.Array):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


# ---------------------------------------------------------------------------
# float32.


@pytest.mark.parametrize("name", ROWS)
def test_float32(name, tmp_path, mesh_explicit):
  case = CASES[name]
  base, others = given(name)
  like = others[0] if base is None else base
  wanted = pj.merge(base, others, method(name))
  assert_fits(wanted, like)
  assert_close(
    wanted, reference(name, like, others), case.close, "the reference"
  )
  shapes = jax.eval_shape(pj.merge, base, others, method(name))
  assert_fits(shapes, like)
  if base is not None:
    found = from_files(tmp_path, base, others, method(name))
    assert same_bits(found, wanted), "from files"
  new = dict(case.swept)
  for key, value in new.items():
    if isinstance(case.options.get(key), list) and not isinstance(value, list):
      new[key] = [value] * case.contributors
  changed = method(name, **new)
  with jax.no_tracing():
    swept = pj.merge(base, others, changed)
  if new:
    assert not same_bits(swept, wanted)
  check_order_of_leaves(name, base, others, wanted)
  check_order_of_contributors(name, base, others, wanted)
  check_identities(name, base, others)
  if name in NAMES:
    base, others = on_mesh(base, others, mesh_explicit)
    found = in_turn(name)(base, others, method(name))
    assert_fits(found, others[0])
    assert_same(name, found, wanted, "Explicit mesh")


def on_mesh(base, others, mesh):
  base = base if base is None else put(base, mesh)
  return base, [put(x, mesh) for x in others]


def from_files(folder, base, others, how):
  paths = [folder / f"{i}.safetensors" for i in range(len(others) + 2)]
  for path, tree in zip(paths, [base, *others]):
    write(path, tree)
  pj.merging.merge_files(paths[0], paths[1:-1], how, paths[-1])
  return read(paths[-1])


def check_order_of_leaves(name, base, others, wanted):
  """Nor does it matter, of local methods, which other leaves there are."""

  def turned(tree):
    if not isinstance(tree, dict):
      return tree
    pairs = [(key, turned(x)) for key, x in tree.items()]
    return collections.OrderedDict(reversed(pairs))

  found = pj.merge(
    base if base is None else turned(base),
    list(map(turned, others)),
    method(name),
  )
  for leaf, x in named(found).items():
    if CASES[name].exact:
      assert same_bits(x, named(wanted)[leaf]), f"order of leaves: {leaf}"
  assert_close(found, named(wanted), CASES[name].close, "order of leaves")
  if CASES[name].local:

    def part(tree):
      return {"layers": {"1": tree["layers"]["1"]}}

    found = pj.merge(
      base if base is None else part(base),
      list(map(part, others)),
      method(name),
    )
    assert same_bits(found, part(wanted)), "a leaf alone"


def check_order_of_contributors(name, base, others, wanted):
  case = CASES[name]
  k = case.contributors
  if not case.symmetric or case.masks is not None or k == 1:
    return
  turned = {
    key: value[::-1]
    for key, value in case.options.items()
    if isinstance(value, list) and len(value) == k
  }
  found = pj.merge(base, others[::-1], method(name, **turned))
  assert_close(found, named(wanted), case.close, "contributors in reverse")


def check_identities(name, base, others):
  case = CASES[name]

  def options(special, count):
    lists = {
      key: value[:count]
      for key, value in case.options.items()
      if isinstance(value, list)
    }
    return lists | dict(special)

  if case.alone is not None:
    how = method(name, **options(case.alone, 1))
    found = pj.merge(base, others[:1], how)
    assert_close(found, named(others[0]), 2e-6, "one contributor")
  if case.agreed is not None:
    how = method(name, **options(case.agreed, case.contributors))
    found = pj.merge(base, others[:1] * case.contributors, how)
    assert_close(found, named(others[0]), 2e-6, "equal contributors")


# ---------------------------------------------------------------------------
# Sixteen bits.


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_once(name, mesh_auto):
  base, others = given(name, "bfloat16")
  expected = reference(name, others[0] if base is None else base, others)
  base, others = on_mesh(base, others, mesh_auto)
  found = in_turn(name, second=True)(base, others, method(name))
  assert_fits(found, others[0])
  assert_rounded(found, expected, "bfloat16")


@pytest.mark.parametrize("name", [n for n in NAMES if not CASES[n].heavy])
def test_float16_is_rounded_once(name):
  base, others = given(name, "float16")
  like = others[0] if base is None else base
  found = pj.merge(base, others, method(name))
  assert_fits(found, like)
  assert_rounded(found, reference(name, like, others), "float16")


def assert_rounded(found, expected, dtype):
  """To the nearest, in 99.9 % of all entries."""
  found, wrong, count = named(found), 0, 0
  for leaf, wanted in expected.items():
    wanted = wanted.astype(np.float32).astype(DTYPES[dtype])
    wrong += np.sum(found[leaf] != wanted.astype(np.float32))
    count += wanted.size
  assert wrong <= count / 1000, f"{wrong} of {count} entries"


# ---------------------------------------------------------------------------
# mergekit's own answers.

RANDOM = {method_of(name) for name in ROWS if CASES[name].masks is not None}
GOLDEN = [case for case in recorded.cases() if case.dtype == "float32"]


def of_mergekit(case):
  """The method that a call of mergekit stands for."""
  make = getattr(pj.merging, case.method)
  options = dict(case.settings)
  known = inspect.signature(make).parameters
  if "flavour" in known:
    options["flavour"] = "mergekit"
  if "task_vectors" in known:
    options["task_vectors"] = case.base is not None
  if "from_base" in known:
    options["from_base"] = case.base is not None
  if case.method in RANDOM:
    options |= CASES[case.method].only_method
  return make(**options)


def leaves_of(case, first):
  """Leaves to be merged: each of another shape is one more compilation.

  The reference is held to all of them.
  """
  kinds = [
    x for x in ("layers.1.conv", "embed", *case.merged) if x in case.merged
  ]
  light = not CASES[case.method].heavy
  vector = ["norm.scale"] if first and light else []
  return [*kinds[:1], *(x for x in vector if x in case.merged)]


@pytest.mark.parametrize("name", sorted({case.method for case in GOLDEN}))
def test_mergekit(name):
  calls = [case for case in GOLDEN if case.method == name]
  for case in calls:
    few = leaves_of(case, case is calls[0])

    def cut(tree, few=few):
      return {leaf: tree[leaf] for leaf in few}

    base = case.base if case.base is None else cut(case.base)
    others = list(map(cut, case.models))
    found = pj.merge(base, others, of_mergekit(case))
    expected = case.merged
    if name in RANDOM:
      # Recorded draws are held against the reference elsewhere.
      settings = {**case.settings, "flavour": "mergekit"}
      own = masks(name, base, others, settings)
      expected = references()[name](
        base, others, flavour="mergekit", **case.settings, **own
      )
    for leaf in few:
      wanted = expected[leaf]
      np.testing.assert_allclose(
        found[leaf],
        wanted,
        rtol=0,
        atol=1e-6 * np.max(np.abs(wanted)),
        err_msg=f"{case.name} {case.settings} {leaf}",
      )


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
