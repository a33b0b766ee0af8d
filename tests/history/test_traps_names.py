"""Traps of names and leaves: what a value may be, and what is refused."""

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.history import Repo
from patchjax.trees import errors
from tests.history.accidents import files_below

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((200, 300)).astype(np.float32)


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def test_dotted_and_nested_keys_do_not_collide(repo):
  value = {
    "a.b": LARGE + 1,
    "a": {"b": LARGE + 2},
    "a/b": LARGE + 3,
    "~": {"": LARGE + 4, "..": LARGE + 5, "\n\x00": LARGE + 6},
    "üñ %41": LARGE + 7,
  }
  repo.commit(value, message="names")
  assert repo.index.packs()[0].startswith("payloads/")
  found = repo.checkout(like=value)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, value))
  assert repo.fsck().ok


def test_integer_and_string_keys_that_collide_are_refused(repo):
  with pytest.raises(errors.StructureError, match="keys"):
    repo.commit({"x": {1: LARGE}, "y": [{"1": LARGE, 1: LARGE}]}, message="")
  assert repo.branches() == {}


def test_integer_keys_come_back_in_the_users_tree(repo):
  value = {0: LARGE, 1: [LARGE + 1, (LARGE + 2,)]}
  repo.commit(value, message="integers")
  found = repo.checkout(like=value)
  assert jax.tree.structure(found) == jax.tree.structure(value)
  assert np.array_equal(found[1][1][0], value[1][1][0])


def test_a_bare_array_is_a_value(repo):
  repo.commit(LARGE, message="bare")
  assert np.array_equal(repo.checkout(like=LARGE), LARGE)


def test_names_that_are_no_text_are_refused(repo):
  with pytest.raises(errors.DtypeError, match="Unicode"):
    repo.commit({"\udc80": LARGE}, message="surrogate")


def test_empty_trees_are_refused(repo):
  for value in ({}, [], None, {"a": None}, {"f": np.sum}):
    with pytest.raises(errors.StructureError, match="no leaves"):
      repo.commit(value, message="empty")
  assert repo.branches() == {}


def test_leaves_without_bits_are_all_listed(repo):
  deleted = jax.numpy.ones(3)
  deleted.delete()
  value = {
    "good": np.ones(2),
    "abstract": jax.ShapeDtypeStruct((2,), np.float32),
    "deleted": deleted,
    "objects": np.array([None, 1], object),
    "text": np.array(["a"]),
  }
  with pytest.raises(errors.DtypeError) as info:
    repo.commit(value, message="bad")
  for name in ("abstract", "deleted", "objects", "text", "nothing was"):
    assert name in str(info.value)
  assert "good" not in str(info.value)
  assert files_below(repo.path) == [repo.files.path("patchjax.json")]


def test_traced_values_are_refused(repo):
  with pytest.raises(errors.DtypeError, match="outside of jit"):
    jax.jit(lambda x: repo.commit({"x": x}, message="traced"))(np.ones(2))


@pytest.mark.parametrize("more", [{}, {"w": LARGE}])
def test_leaves_without_entries_live_in_the_tree(repo, more):
  """Orbax raises for them, or hangs at the end of the process."""
  empty = {
    "none": np.zeros((0, 3), np.float32),
    "keys": jax.random.split(jax.random.key(0), 0),
    "int4": np.zeros((2, 0), "int4"),
  }
  repo.commit({**empty, **more}, message="empty")
  assert len(repo.index.packs()) == len(more)
  found = repo.checkout(like={**empty, **more})
  assert found["none"].shape == (0, 3)
  assert found["none"].dtype == np.float32
  assert found["int4"].shape == (2, 0)
  assert repo.fsck().ok


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_numbers_of_less_than_a_byte_are_kept(repo, dtype):
  """Orbax cannot write uint4."""
  x = (np.arange(60_000) % 4).reshape(200, 300).astype(dtype)
  repo.commit({"x": x}, message="small numbers")
  found = repo.checkout(like={"x": x})["x"]
  assert found.dtype == x.dtype
  assert np.array_equal(found.view(np.uint8), x.view(np.uint8))


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_64_bits_stay_64_bits_without_x64(repo, dtype):
  """With x64 off, jax would halve them without a word."""
  assert not jax.config.read("jax_enable_x64")
  x = (np.arange(30_000) + 2**40).astype(dtype) / np.ones((), dtype)
  x = x.astype(dtype)
  repo.commit({"x": x}, message="wide")
  found = repo.checkout()["x"]
  assert isinstance(found, np.ndarray)
  assert found.dtype == x.dtype
  assert np.array_equal(found, x)


def test_value_ids_are_those_of_the_trees_package(repo):
  value = {"a": {"x": LARGE}, "b": jax.random.key(3)}
  repo.commit(value, message="start")
  assert repo.show().tree == pj.trees.tree_id(value)
