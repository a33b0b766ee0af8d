"""What a merge refuses, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchjax as pj
from patchjax.trees.errors import (
  BaseMismatchError,
  DtypeError,
  FormatError,
  MismatchError,
  NonFiniteError,
  StructureError,
)

MEAN = pj.merging.mean()


def base():
  return {
    "a": np.float32([1, 2, 3]),
    "b": np.float32([[1.0, 2.0]]),
    "n": np.int32(3),
  }


def test_leaves_that_do_not_fit_are_all_listed():
  other = {"a": np.zeros(4, np.float32), "B": base()["b"], "n": np.int32(3)}
  with pytest.raises(MismatchError) as error:
    pj.merge(base(), [base(), other], MEAN)
  text = str(error.value)
  assert "contributor 1" in text
  for part in ("- a: float32[3]", "+ a: float32[4]", "- b:", "+ B:"):
    assert part in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", [MEAN, pj.merging.ties(density=0.5)])
def test_non_finite_numbers_are_named(value, method):
  other = base() | {"b": np.float32([[1.0, value]])}
  with pytest.raises(NonFiniteError, match="b: 1 entries"):
    pj.merge(base(), [other, base()], method)


def test_overflow_of_the_result_is_named():
  start = {"w": np.zeros(3, np.float16)}
  other = {"w": np.float16([1, 60000, 2])}
  method = pj.merging.task_arithmetic(scale=3.0)
  with pytest.raises(NonFiniteError, match="w: 1 entries of the result"):
    pj.merge(start, [other], method)


def test_leaves_without_a_mean_must_agree():
  other = base() | {"n": np.int32(4)}
  with pytest.raises(MismatchError, match="n: int32"):
    pj.merge(base(), [base(), other], MEAN)
  assert pj.merge(base(), [other, other], MEAN)["n"] == 4
  assert pj.merge(base(), [base(), other], MEAN, only="[ab]")["n"] == 3
  patch = pj.diff(base(), other)
  with pytest.raises(MismatchError, match="n: int32"):
    pj.merge(base(), [base(), patch], MEAN)
  assert pj.merge(base(), [patch, other], MEAN)["n"] == 4


def test_keys_must_agree():
  start = {"w": np.float32([1]), "key": jax.random.key(0)}
  assert pj.merge(start, [start, start], MEAN)["key"] == jax.random.key(0)
  with pytest.raises(MismatchError, match="key: key<fry>"):
    pj.merge(start, [start, start | {"key": jax.random.key(1)}], MEAN)


def test_wide_leaves_are_refused_with_the_remedy():
  start = {"w": np.zeros(3, np.float64)}
  with pytest.raises(DtypeError, match="jax_enable_x64"):
    pj.merge(start, [start], MEAN)


def test_nothing_to_merge():
  with pytest.raises(StructureError, match="contributors is empty"):
    pj.merge(base(), [], MEAN)
  with pytest.raises(StructureError, match="no arrays"):
    pj.merge({}, [{}], MEAN)
  with pytest.raises(TypeError, match="list of pytrees or patches"):
    pj.merge(base(), base(), MEAN)


def test_zero_size_leaves_pass():
  start = {"w": np.float32([1, 2]), "none": np.zeros((0, 3), np.float32)}
  other = jax.tree.map(lambda x: x + 1, start)
  merged = pj.merge(start, [other], pj.merging.ties(density=0.5))
  assert merged["none"].shape == (0, 3)


def test_a_chain_needs_one_reducing_step():
  with pytest.raises(ValueError, match="has no reducing step"):
    pj.merge(base(), [base(), base()], pj.trim(density=0.5))
  with pytest.raises(ValueError, match="at most one reducing step .* got 2"):
    pj.chain(pj.merging.mean(), pj.merging.weighted_sum())


def test_patches_that_do_not_fit():
  patch = pj.diff(base(), base())
  wrong = {"other": np.float32([1])}
  with pytest.raises(MismatchError, match="other"):
    pj.merge(wrong, [patch], MEAN)
  grown = pj.diff(base(), base() | {"new": np.float32([1])}, structural=True)
  with pytest.raises(StructureError, match="inserts, deletes or renames"):
    pj.merge(base(), [grown], MEAN)
  one, two = patch.replace(base="1" * 64), patch.replace(base="2" * 64)
  with pytest.raises(BaseMismatchError, match="111111"):
    pj.merging.combine([one, two], MEAN)
  exact = pj.diff(base(), base(), exact=True)
  with pytest.raises(StructureError, match="base is needed"):
    pj.merging.combine([exact], MEAN)


def test_files(tmp_path):
  from patchjax.interop.files import write

  good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
  out = tmp_path / "out.safetensors"
  write(good, base())
  bad.write_bytes(good.read_bytes()[:-3])
  with pytest.raises(FormatError, match="truncated"):
    pj.merging.merge_files(good, [bad], MEAN, out)
  write(bad, base() | {"a": np.float32([1, np.nan, 3])}, overwrite=True)
  with pytest.raises(NonFiniteError, match="a: 1"):
    pj.merging.merge_files(good, [bad], MEAN, out)
  patch = tmp_path / "patch.safetensors"
  moved = base() | {"a": np.float32([5, 2, 3])}
  pj.diff(moved, base()).save(patch, base=moved)
  with pytest.raises(BaseMismatchError, match="was made for"):
    pj.merging.merge_files(good, [patch], MEAN, out)
  with pytest.raises(FileNotFoundError):
    pj.merging.merge_files(good, [tmp_path / "none.safetensors"], MEAN, out)
  assert not out.exists() and len(list(tmp_path.iterdir())) == 3


def test_files_keep_what_is_not_merged(tmp_path):
  from patchjax.interop.files import read, write

  paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
  write(paths[0], base())
  write(paths[1], jax.tree.map(lambda x: x + x.dtype.type(1), base()))
  with pytest.raises(MismatchError, match="n: int32"):
    pj.merging.merge_files(paths[0], [paths[1], paths[0]], MEAN, paths[2])
  pj.merging.merge_files(paths[0], [paths[1]], MEAN, paths[2], only="a")
  merged = read(paths[2])
  assert merged["a"].tolist() == [2, 3, 4]
  assert merged["b"].tolist() == [[1, 2]] and merged["n"] == 3


def test_passengers_must_be_equal():
  start = {"w": jnp.ones(2), "name": "gelu"}
  assert pj.merge(start, [start], MEAN)["name"] == "gelu"
  with pytest.raises(MismatchError, match="name"):
    pj.merge(start, [start | {"name": "relu"}], MEAN)
