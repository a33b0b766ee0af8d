"""How a row of the table in `battery.py` is called, and what it is held to."""

import functools
import importlib
import inspect
import pathlib

import jax
import numpy as np

import patchjax as pj
from patchjax.interop.files import read, write
from tests.merging.battery import CASES, method_of
from tests.merging.battery_models import DTYPES, models, named, put
from tests.merging.models import same_bits

ROWS = sorted(CASES)
NAMES = [name for name in ROWS if name == method_of(name)]
RANDOM = {method_of(name) for name in ROWS if CASES[name].masks is not None}
merge_jit = jax.jit(pj.merge)


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
  """The method of a row.

  Args:
    name: of the row.
    **others: options that replace its own.
  """
  case = CASES[name]
  make = getattr(pj.merging, method_of(name))
  return make(**{**case.options, **case.only_method, **others})


def masks(name, base, others, options):
  """What the reference of a random method is told; else nothing."""
  make = CASES[name].masks
  return {} if make is None else {"masks": make(base, others, options)}


def reference(name, base, others):
  """What the method should give, in float64.

  Args:
    name: of the row.
    base: None if there is none.
    others: the contributors.
  """
  case = CASES[name]
  base, others = base and named(base), list(map(named, others))
  given = masks(name, base, others, case.options)
  return references()[method_of(name)](base, others, **case.options, **given)


def given(name, dtype="float32"):
  """Base (or None), contributors."""
  base, others = models(CASES[name].contributors, dtype)
  return (base if CASES[name].base else None), others


@functools.cache
def eagerly(name):
  """What a row gives in float32, eagerly on one device."""
  return pj.merge(*given(name), method(name))


def each(function, base, others):
  """Base (or None) and contributors, each changed."""
  return base and function(base), list(map(function, others))


def on_mesh(base, others, mesh):
  return each(functools.partial(put, mesh=mesh), base, others)


def part(tree):
  """A model of one leaf only."""
  return {"layers": {"1": tree["layers"]["1"]}}


def from_files(folder, base, others, how):
  """The merge of what is written to files, and read from one."""
  paths = [folder / f"{i}.safetensors" for i in range(len(others) + 2)]
  for path, tree in zip(paths, [base, *others]):
    if tree is not None:
      write(path, tree)
  start = None if base is None else paths[0]
  pj.merging.merge_files(start, paths[1:-1], how, paths[-1])
  return read(paths[-1])


# ---------------------------------------------------------------------------
# What is held.


def assert_close(found, expected, bound=1e-6, what=""):
  """To a share of each leaf's largest number."""
  found = named(found)
  assert found.keys() == expected.keys()
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


def assert_rounded(found, expected, dtype, close=0.0):
  """To the nearest, in 99.9 % of all entries.

  Args:
    found: a tree.
    expected: leaves in float64.
    dtype: that the leaves are rounded to.
    close: how far what is rounded may be from what is expected, as a share of
      a leaf's largest number.
  """
  found, wrong, count = named(found), 0, 0
  for leaf, wanted in expected.items():
    gap = close * np.max(np.abs(wanted))
    low, high = (
      (wanted + d).astype(np.float32).astype(DTYPES[dtype]).astype(np.float32)
      for d in (-gap, gap)
    )
    wrong += np.sum((found[leaf] < low) | (found[leaf] > high))
    count += wanted.size
  assert wrong <= count / 1000, f"{wrong} of {count} entries"


def assert_fits(found, like):
  """Structure, shapes, dtypes, and places if there are any."""
  assert jax.tree.structure(found) == jax.tree.structure(like)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert x.shape == y.shape and x.dtype == y.dtype
    if isinstance(x, jax.Array) and isinstance(y, jax.Array):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    elif isinstance(y, jax.Array) and x.sharding is not None:
      # Of an abstract mesh: known while tracing, if axes are Explicit.
      assert x.sharding.spec == y.sharding.spec
