"""Statistics shrunk, spot-checked, written and read."""

import dataclasses

import jax
import numpy as np
import pytest

import patchjax as pj
from patchjax.statistics import (
  Fisher,
  absolute_gradients,
  fisher_diagonal,
  gram,
  kfac,
  load,
  save,
  shrink,
  spot_check,
)
from patchjax.trees.errors import (
  BaseMismatchError,
  FormatError,
  StructureError,
)

RNG = np.random.default_rng(3)
PARAMS = {"w": RNG.standard_normal((6, 3)).astype("f4")}
X = RNG.standard_normal((512, 6)).astype("f4")
# Inputs that depend on each other: another layer's matrix is another.
X[:, 1] += X[:, 0]


def model(params, x):
  return x @ params["w"]


def grams(data):
  return gram(model, PARAMS, data)


def factors(data):
  return kfac(model, PARAMS, data, labels="exact", chunk=64)


def diagonals(data):
  return fisher_diagonal(model, PARAMS, data, labels="exact", chunk=64)


KINDS = [grams, factors, diagonals]


def test_shrinking():
  few = grams(X[:3])
  value = np.float64(few.values["w"][0])
  found = shrink(few, 9.0).values["w"][0]
  wanted = (3 * value + 9 * np.trace(value) / 6 * np.eye(6)) / 12
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  assert np.linalg.matrix_rank(value, tol=1e-5) == 3
  assert np.linalg.cond(found) < 50
  assert shrink(few, 0.0) is few
  none = shrink(few, np.float32(0))
  np.testing.assert_allclose(none.values["w"], few.values["w"], rtol=1e-6)
  both = factors(X[:3])
  np.testing.assert_allclose(
    np.trace(shrink(both, 2.0).outputs["w"][0]),
    np.trace(both.outputs["w"][0]),
    rtol=1e-5,
  )
  # Axes of a leaf are no matrices to a diagonal.
  cube = Fisher({"w": RNG.random((2, 3, 4)).astype("f4")}, 6, "exact")
  found = shrink(cube, 6).values["w"]
  mean = cube.values["w"].mean()
  np.testing.assert_allclose(found, (cube.values["w"] + mean) / 2, rtol=1e-5)
  with pytest.raises(TypeError, match="got dict"):
    shrink({}, 1)


@pytest.mark.parametrize("measure", KINDS)
def test_spot_checks(measure):
  honest = measure(X[:256])
  check = spot_check(honest, measure, X[256:])
  assert check.passed and max(check.scores.values()) < check.limit < 9
  np.testing.assert_allclose(list(check.ratios.values()), 1, rtol=0.3)
  boasting = jax.tree.map(lambda a: np.float32(3) * a, honest)
  boasting = dataclasses.replace(boasting, n=honest.n)
  assert not spot_check(boasting, measure, X[256:]).passed


def test_spot_checks_see_the_matrix_of_another_layer():
  x = RNG.standard_normal((4096, 6)).astype("f4")
  x[:, 1] += x[:, 0]
  honest = grams(x[:2048])
  assert spot_check(honest, grams, x[2048:]).passed
  turned = np.asarray(honest.values["w"])[:, ::-1, ::-1]  # the same size
  other = dataclasses.replace(honest, values={"w": turned})
  assert spot_check(other, grams, x[2048:]).wrong == ("w",)


def test_spot_checks_of_sampled_labels():
  # Inputs are all alike: what differs between groups are their labels.
  data = np.ones((256, 6), "f4")
  params = {"w": PARAMS["w"] / 8}

  def sampled(data, key):
    return fisher_diagonal(model, params, data, key=key)

  honest = sampled(data, jax.random.key(0))
  check = spot_check(honest, sampled, data, key=jax.random.key(1))
  assert check.passed
  with pytest.raises(ValueError, match="keys of their own"):
    spot_check(honest, lambda x: sampled(x, jax.random.key(1)), data)


def test_spot_checks_refuse():
  honest = grams(X[:64])
  with pytest.raises(StructureError, match="at least two"):
    spot_check(honest, grams, X[:15])
  other = dataclasses.replace(honest, values={"v": honest.values["w"]})
  with pytest.raises(StructureError, match="the claim has v"):
    spot_check(other, grams, X[:64])
  broken = jax.tree.map(lambda a: a * np.float32(np.nan), honest.values)
  broken = dataclasses.replace(honest, values=broken)
  assert spot_check(broken, grams, X[:64]).wrong == ("w",)


@pytest.mark.parametrize("measure", KINDS)
def test_files(measure, tmp_path):
  path = tmp_path / "it.safetensors"
  tuned = {"w": PARAMS["w"] + 1}
  patch = pj.diff(PARAMS, tuned)
  found = measure(X[:16])
  save(found, path, of=patch)
  again = load(path, of=patch)
  assert jax.tree.structure(again) == jax.tree.structure(found)
  jax.tree.map(np.testing.assert_array_equal, again, found)
  # A patch is the same, wherever it comes from.
  patch.save(tmp_path / "patch.safetensors", base=PARAMS)
  load(path, of=pj.Patch.load(tmp_path / "patch.safetensors"))
  with pytest.raises(BaseMismatchError, match="of another|take it again"):
    load(path, of=pj.diff(PARAMS, {"w": PARAMS["w"] + 2}))
  save(found, path, of=tuned)
  load(path, of=tuned)
  with pytest.raises(BaseMismatchError):
    load(path, of=PARAMS)


def test_files_that_were_changed(tmp_path):
  path = tmp_path / "it.safetensors"
  save(grams(X[:16]), path, of=PARAMS)
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)
  with pytest.raises(FormatError, match="its digest is"):
    load(path, of=PARAMS)
  path.write_bytes(data[:-5])
  with pytest.raises(FormatError, match="truncated"):
    load(path, of=PARAMS)
  pj.diff(PARAMS, PARAMS).save(path)
  with pytest.raises(FormatError, match="no statistic"):
    load(path, of=PARAMS)
  with pytest.raises(TypeError, match="got dict"):
    save({}, path, of=PARAMS)


def test_absolute_gradients():
  labels = np.arange(16, dtype=np.int32) % 3
  found = absolute_gradients(model, PARAMS, (X[:16], labels), chunk=5)
  logits = X[:16] @ PARAMS["w"]
  score = np.eye(3)[labels] - np.asarray(jax.nn.softmax(logits))
  wanted = np.abs(X[:16, :, None] * score[:, None, :]).mean(0)
  np.testing.assert_allclose(found["w"], wanted, rtol=1e-4, atol=1e-6)
