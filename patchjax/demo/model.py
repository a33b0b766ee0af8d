"""all-MiniLM-L6-v2 in plain JAX: a sentence encoder of 22.7 M parameters.

The architecture is BERT with the layer norm behind the residual (Devlin et
al., 2018), six layers of width 384 (Wang et al., "MiniLM", 2020), mean
pooling over the tokens and an L2 norm (Reimers & Gurevych, 2019).

`bottom` and `top` cut the encoder in two, so that what the frozen lower
layers say about a text is computed once for all models that share them.
"""

import dataclasses
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from patchjax.trees import errors

Params = dict[str, Any]
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of an encoder; the defaults are all-MiniLM-L6-v2's."""

  vocabulary: int = 30522
  positions: int = 512
  width: int = 384
  hidden: int = 1536
  layers: int = 6
  heads: int = 12


MINILM = Shape()


def _norm(params: Params, x: jax.Array) -> jax.Array:
  mean = jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.var(x, axis=-1, keepdims=True)
  x = (x - mean) * jax.lax.rsqrt(variance + _EPSILON)
  return x * _last(params["scale"], x) + _last(params["bias"], x)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
  """`vector` shaped to broadcast over the last axis of `like`."""
  return jnp.reshape(vector, (1,) * (like.ndim - 1) + (-1,))


def _dense(params: Params, x: jax.Array) -> jax.Array:
  x = jnp.dot(x, params["kernel"])
  return x + _last(params["bias"], x)


def _layer(params: Params, x: jax.Array, mask: jax.Array, heads: int):
  *batch, length, width = x.shape
  split = (*batch, length, heads, width // heads)
  attention = params["attention"]
  query, key, value = (
    _dense(attention[name], x).reshape(split)
    for name in ("query", "key", "value")
  )
  scores = jnp.einsum("...qhd,...khd->...hqk", query, key)
  scores = scores / np.float32(np.sqrt(width // heads))
  scores = jnp.where(mask[..., None, None, :], scores, np.float32(-1e30))
  weights = jax.nn.softmax(scores, axis=-1)
  mixed = jnp.einsum("...hqk,...khd->...qhd", weights, value)
  mixed = _dense(attention["out"], mixed.reshape(x.shape))
  x = _norm(attention["norm"], x + mixed)
  mlp = params["mlp"]
  hidden = jax.nn.gelu(_dense(mlp["in"], x), approximate=False)
  return _norm(mlp["norm"], x + _dense(mlp["out"], hidden))


def bottom(
  params: Params, ids: jax.Array, mask: jax.Array, *, depth: int, heads: int
) -> jax.Array:
  """The token vectors after the embeddings and the first `depth` layers.

  Args:
    params: parameters as `load` gives them.
    ids: token ids, shape `[batch, length]`, int32.
    mask: True at tokens, False at padding; same shape.
    depth: how many layers to run.
    heads: attention heads of a layer.

  Returns:
    Token vectors, shape `[batch, length, width]`.
  """
  embed = params["embed"]
  x = embed["word"][ids] + embed["position"][None, : ids.shape[1]]
  x = _norm(embed["norm"], x + embed["type"][None, :1])
  for layer in range(depth):
    x = _layer(params["layers"][str(layer)], x, mask, heads)
  return x


def top(
  params: Params, x: jax.Array, mask: jax.Array, *, depth: int, heads: int
) -> jax.Array:
  """From the token vectors after `depth` layers to the sentence vectors.

  Args:
    params: parameters; only layers from `depth` on are looked at.
    x: token vectors, shape `[batch, length, width]`.
    mask: True at tokens, shape `[batch, length]`.
    depth: how many layers `x` has been through.
    heads: attention heads of a layer.

  Returns:
    Unit vectors, shape `[batch, width]`.
  """
  for layer in range(depth, len(params["layers"])):
    x = _layer(params["layers"][str(layer)], x, mask, heads)
  tokens = mask[..., None].astype(x.dtype)
  mean = jnp.sum(x * tokens, axis=1) / jnp.sum(tokens, axis=1)
  return mean / jnp.sqrt(jnp.sum(mean * mean, axis=-1, keepdims=True))


def encode(
  params: Params, ids: jax.Array, mask: jax.Array, *, heads: int = 12
) -> jax.Array:
  """Sentence vectors of tokenized texts.

  Args:
    params: parameters as `load` gives them.
    ids: token ids, shape `[batch, length]`, int32.
    mask: True at tokens, False at padding; same shape.
    heads: attention heads of a layer.

  Returns:
    Unit vectors, shape `[batch, width]`.

  Example:
    >>> params = initial(jax.random.key(0), Shape(8, 4, 6, 12, 1, 2))
    >>> ids = jnp.array([[1, 2, 3]])
    >>> encode(params, ids, ids > 0, heads=2).shape
    (1, 6)
  """
  x = bottom(params, ids, mask, depth=0, heads=heads)
  return top(params, x, mask, depth=0, heads=heads)


def initial(key: jax.Array, shape: Shape) -> Params:
  """Random parameters of any size, for tests of the code around the model."""

  def normal(name: str, *sizes: int) -> jax.Array:
    named = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return 0.02 * jax.random.normal(named, sizes, jnp.float32)

  def dense(name: str, inputs: int, outputs: int) -> Params:
    bias = jnp.zeros((outputs,), jnp.float32)
    return {"kernel": normal(name, inputs, outputs), "bias": bias}

  def norm() -> Params:
    ones = jnp.ones((shape.width,), jnp.float32)
    return {"scale": ones, "bias": jnp.zeros_like(ones)}

  width, hidden = shape.width, shape.hidden
  layers = {}
  for layer in map(str, range(shape.layers)):
    attention: Params = {
      name: dense(f"{layer}/{name}", width, width)
      for name in ("query", "key", "value", "out")
    }
    mlp: Params = {
      "in": dense(f"{layer}/in", width, hidden),
      "out": dense(f"{layer}/out", hidden, width),
    }
    attention["norm"], mlp["norm"] = norm(), norm()
    layers[layer] = {"attention": attention, "mlp": mlp}
  return {
    "embed": {
      "word": normal("word", shape.vocabulary, width),
      "position": normal("position", shape.positions, width),
      "type": normal("type", 2, width),
      "norm": norm(),
    },
    "layers": layers,
    "pooler": dense("pooler", width, width),
  }


def load(path: pathlib.Path) -> Params:
  """Reads a checkpoint in the layout of Hugging Face's `BertModel`.

  Every floating point tensor of the file is kept (the pooler too, though
  sentence vectors do not use it); the int64 buffer of positions is not a
  parameter. Kernels are transposed to `[in, out]`.

  Args:
    path: a safetensors file.

  Returns:
    Parameters as a nested dict with readable names.

  Raises:
    FormatError: the file holds other tensors than an encoder's.
  """
  params: Params = {}
  unknown = []
  with safetensors.safe_open(path, framework="numpy") as file:
    for theirs in sorted(file.keys()):
      if theirs == "embeddings.position_ids":
        continue
      ours = _name(theirs)
      if ours is None:
        unknown.append(theirs)
        continue
      array = file.get_tensor(theirs)
      if ours[-1] == "kernel":
        array = np.ascontiguousarray(array.T)
      node = params
      for part in ours[:-1]:
        node = node.setdefault(part, {})
      node[ours[-1]] = array
  if unknown or not {"embed", "layers"} <= params.keys():
    raise errors.FormatError(
      f"{path} is not a checkpoint of a BERT encoder: unexpected tensors"
      f" {unknown[:5]}, found parts {sorted(params)}"
    )
  return params


_EMBED = {
  "word_embeddings.weight": ("word",),
  "position_embeddings.weight": ("position",),
  "token_type_embeddings.weight": ("type",),
  "LayerNorm.weight": ("norm", "scale"),
  "LayerNorm.bias": ("norm", "bias"),
}
_LAYER = {
  "attention.self.query": ("attention", "query"),
  "attention.self.key": ("attention", "key"),
  "attention.self.value": ("attention", "value"),
  "attention.output.dense": ("attention", "out"),
  "attention.output.LayerNorm": ("attention", "norm"),
  "intermediate.dense": ("mlp", "in"),
  "output.dense": ("mlp", "out"),
  "output.LayerNorm": ("mlp", "norm"),
}


def _name(theirs: str) -> tuple[str, ...] | None:
  """Our name of a tensor, or None where it has none."""
  if theirs.startswith("embeddings."):
    ours = _EMBED.get(theirs.removeprefix("embeddings."))
    return ours and ("embed", *ours)
  module, _, kind = theirs.rpartition(".")
  weight = "scale" if module.endswith("LayerNorm") else "kernel"
  leaf = {"weight": weight, "bias": "bias"}.get(kind)
  if leaf is None:
    return None
  if module == "pooler.dense":
    return ("pooler", leaf)
  prefix, _, rest = module.partition("encoder.layer.")
  number, _, part = rest.partition(".")
  if prefix or not number.isdigit() or part not in _LAYER:
    return None
  return ("layers", number, *_LAYER[part], leaf)
