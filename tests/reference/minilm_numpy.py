"""BERT's forward pass in float64, text by text, straight from the papers.

Written from Vaswani et al. 2017 and Devlin et al. 2018, on the checkpoint's
own tensor names and layout, without a look at `patchjax.demo.model`: no
batches, no padding, no transposed kernels.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def layer_norm(x, weight, bias, epsilon=1e-12):
  out = np.empty_like(x)
  for i, row in enumerate(x):
    centred = row - row.mean()
    out[i] = centred / math.sqrt((centred**2).mean() + epsilon)
  return out * weight + bias


def encode(tensors, ids, *, layers, heads):
  """Unit sentence vector of one text.

  Args:
    tensors: `{name in the checkpoint: array}`.
    ids: token ids of one text, without padding.
    layers: number of layers.
    heads: attention heads.
  """
  t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}

  def linear(x, name):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

  def norm(x, name):
    return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"])

  x = np.stack(
    [
      t["embeddings.word_embeddings.weight"][token]
      + t["embeddings.position_embeddings.weight"][position]
      + t["embeddings.token_type_embeddings.weight"][0]
      for position, token in enumerate(ids)
    ]
  )
  x = norm(x, "embeddings.LayerNorm")
  for number in range(layers):
    name = f"encoder.layer.{number}"
    q, k, v = (
      linear(x, f"{name}.attention.self.{part}")
      for part in ("query", "key", "value")
    )
    size = x.shape[1] // heads
    context = np.empty_like(x)
    for head in range(heads):
      columns = slice(head * size, (head + 1) * size)
      scores = q[:, columns] @ k[:, columns].T / math.sqrt(size)
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      weights /= weights.sum(axis=1, keepdims=True)
      context[:, columns] = weights @ v[:, columns]
    attended = linear(context, f"{name}.attention.output.dense")
    x = norm(x + attended, f"{name}.attention.output.LayerNorm")
    hidden = linear(x, f"{name}.intermediate.dense")
    hidden = hidden * 0.5 * (1.0 + _erf(hidden / math.sqrt(2.0)))
    x = norm(
      x + linear(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm"
    )
  mean = x.mean(axis=0)
  return mean / np.linalg.norm(mean)


def random_tensors(random, *, vocabulary, positions, width, hidden, layers):
  """A checkpoint of random numbers, under the names of the real one."""
  shapes = {
    "embeddings.word_embeddings.weight": (vocabulary, width),
    "embeddings.position_embeddings.weight": (positions, width),
    "embeddings.token_type_embeddings.weight": (2, width),
    "embeddings.LayerNorm.weight": (width,),
    "embeddings.LayerNorm.bias": (width,),
    "pooler.dense.weight": (width, width),
    "pooler.dense.bias": (width,),
  }
  for number in range(layers):
    name = f"encoder.layer.{number}"
    for part in ("query", "key", "value"):
      shapes[f"{name}.attention.self.{part}.weight"] = (width, width)
      shapes[f"{name}.attention.self.{part}.bias"] = (width,)
    shapes[f"{name}.attention.output.dense.weight"] = (width, width)
    shapes[f"{name}.attention.output.dense.bias"] = (width,)
    shapes[f"{name}.intermediate.dense.weight"] = (hidden, width)
    shapes[f"{name}.intermediate.dense.bias"] = (hidden,)
    shapes[f"{name}.output.dense.weight"] = (width, hidden)
    shapes[f"{name}.output.dense.bias"] = (width,)
    for part in ("attention.output", "output"):
      shapes[f"{name}.{part}.LayerNorm.weight"] = (width,)
      shapes[f"{name}.{part}.LayerNorm.bias"] = (width,)
  return {
    name: random.normal(0.0, 0.3, shape).astype(np.float32)
    for name, shape in shapes.items()
  }
