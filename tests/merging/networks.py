"""Small networks with hidden units, for the tests of alignment."""

import jax
import jax.numpy as jnp
import numpy as np

HEADS, SIZE = 3, 4


def drawn(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {n: np.float32(rng.standard_normal(s)) for n, s in shapes.items()}


def plus(x, bias):
  return x + jnp.broadcast_to(bias, x.shape)


def normed(x, scale, bias):
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  y = (x - mean) * jax.lax.rsqrt(var + 1e-6)
  return plus(y * jnp.broadcast_to(scale, y.shape), bias)


def mlp(p, x):
  x = jax.nn.relu(plus(x @ p["w0"], p["b0"]))
  x = jax.nn.gelu(plus(x @ p["w1"], p["b1"]))
  return plus(x @ p["w2"], p["b2"])


def residual(p, x):
  x = x @ p["in"]
  x = x + jnp.tanh(plus(x @ p["up"], p["up_bias"])) @ p["down"]
  return x @ p["out"]


def norm_mlp(p, x):
  x = x @ p["in"]
  y = normed(x, p["scale"], p["bias"])
  x = x + jax.nn.silu(y @ p["up"]) @ p["down"]
  return x @ p["out"]


def attention(p, x):
  def heads(kernel, bias):
    y = plus(x @ p[kernel], p[bias])
    return y.reshape(*y.shape[:-1], HEADS, SIZE)

  x = x @ p["in"]
  q, k, v = heads("q", "qb"), heads("k", "kb"), heads("v", "vb")
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(2)
  steps = x.shape[1]
  mask = jnp.tril(jnp.ones((steps, steps), bool))
  scores = jnp.where(
    jnp.broadcast_to(mask, scores.shape), scores, jnp.float32(-1e9)
  )
  y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
  return (x + y.reshape(*x.shape[:-1], -1) @ p["o"]) @ p["out"]


def stacked(p, x):
  def layer(x, own):
    return x + jax.nn.relu(x @ own["up"]) @ own["down"], None

  x, _ = jax.lax.scan(layer, x @ p["in"], {k: p[k] for k in ("up", "down")})
  return x @ p["out"]


def conv(p, x):
  def convolved(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  x = jax.nn.relu(plus(convolved(x, p["c0"]), p["b0"]))
  x = convolved(x, p["each"], x.shape[-1])
  x = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  )
  x = jax.nn.relu(convolved(x, p["c1"])).mean((1, 2))
  return x @ p["out"]


def tagged(p, ids):
  x = jnp.take(p["embed"], ids, axis=0)
  return jax.nn.relu(x @ p["w"]).mean(1) @ p["out"]


WIDE = HEADS * SIZE
SHAPES = {
  mlp: {
    "w0": (10, 24),
    "b0": (24,),
    "w1": (24, 20),
    "b1": (20,),
    "w2": (20, 5),
    "b2": (5,),
  },
  residual: {
    "in": (12, 16),
    "up": (16, 24),
    "up_bias": (24,),
    "down": (24, 16),
    "out": (16, 6),
  },
  norm_mlp: {
    "in": (16, 12),
    "scale": (12,),
    "bias": (12,),
    "up": (12, 20),
    "down": (20, 12),
    "out": (12, 8),
  },
  attention: {
    "in": (16, 12),
    "q": (12, WIDE),
    "qb": (WIDE,),
    "k": (12, WIDE),
    "kb": (WIDE,),
    "v": (12, WIDE),
    "vb": (WIDE,),
    "o": (WIDE, 12),
    "out": (12, 8),
  },
  stacked: {
    "in": (16, 8),
    "up": (3, 8, 12),
    "down": (3, 12, 8),
    "out": (8, 8),
  },
  conv: {
    "c0": (3, 3, 2, 8),
    "b0": (8,),
    "each": (3, 3, 1, 8),
    "c1": (3, 3, 8, 6),
    "out": (6, 4),
  },
  tagged: {"embed": (20, 8), "w": (8, 10), "out": (10, 3)},
}
INPUTS = {
  mlp: (7, 10),
  residual: (7, 12),
  norm_mlp: (7, 16),
  attention: (2, 5, 16),
  stacked: (7, 16),
  conv: (2, 6, 6, 2),
}


def inputs(network, seed=9):
  if network is tagged:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 20, (3, 5)).astype(np.int32)
  return drawn({"x": INPUTS[network]}, seed)["x"]
