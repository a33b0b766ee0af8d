"""Networks drawn at random: what is inferred holds, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchjax.merging import alignment
from patchjax.trees.errors import StructureError
from tests.merging.networks import drawn, normed, plus

# Entry i of the result is not entry i's: numbers of different heads meet.
HEADS_MEET = {
  "cumsum": lambda y: jnp.cumsum(y, -2),
  "flip": lambda y: y + jnp.flip(y, -2),
  "rolled": lambda y: y * jnp.roll(y, 1, -2),
  "sort": lambda y: jnp.sort(y, -2),
  "taken": lambda y: y + jnp.take(y, np.arange(y.shape[-2])[::-1], -2),
}


class Drawn:
  """A network as a list of layers; parameters are made as it is built."""

  def __init__(self, seed, length):
    self.rng = np.random.default_rng(seed)
    self.params = {}
    self.layers = []
    self.width = 8
    self.dense(int(self.rng.choice([12, 24])))
    for _ in range(length):
      kind = self.rng.choice(KINDS)
      getattr(self, kind)()
    self.dense(3)

  def leaf(self, *shape):
    name = f"p{len(self.params)}"
    self.params[name] = np.float32(self.rng.standard_normal(shape))
    return name

  def dense(self, out=None):
    out = out or int(self.rng.choice([12, 24, 36]))
    w, b = self.leaf(self.width, out), self.leaf(out)
    self.layers.append(lambda p, x: plus(x @ p[w], p[b]))
    self.width = out

  def shared(self):
    """The same matrix twice: an axis meets itself."""
    w = self.leaf(self.width, self.width)
    self.layers.append(lambda p, x: jnp.tanh(jnp.tanh(x @ p[w]) @ p[w]))

  def elementwise(self):
    f = [jax.nn.relu, jax.nn.gelu, jnp.tanh, jnp.square][self.rng.integers(4)]
    self.layers.append(lambda p, x: f(x * np.float32(0.3)))

  def norm(self):
    scale, bias = self.leaf(self.width), self.leaf(self.width)
    self.layers.append(lambda p, x: normed(x, p[scale], p[bias]))

  def residual(self):
    up, down = self.leaf(self.width, 10), self.leaf(10, self.width)
    self.layers.append(lambda p, x: x + jax.nn.silu(x @ p[up]) @ p[down])

  def gated(self):
    one, two = (self.leaf(self.width, self.width) for _ in range(2))
    self.layers.append(
      lambda p, x: jax.nn.softmax(x @ p[one], axis=-1) * (x @ p[two])
    )

  def heads(self):
    """An operation within heads, or between them, or on one of them."""
    n = int(self.rng.choice([2, 3, 4]))
    kind = self.rng.choice(
      ["norm", "mix", "each", "swap", "first", "roll", *HEADS_MEET]
    )
    size = self.width // n
    mixer = self.leaf(n, n) if kind == "mix" else self.leaf(n, size, size)

    def run(p, x):
      y = x.reshape(*x.shape[:-1], n, size)
      if kind == "norm":
        y = y / (1 + jnp.square(y).sum(-1, keepdims=True))
      elif kind == "mix":
        y = jnp.einsum("bnd,nm->bmd", y, p[mixer])
      elif kind == "each":
        y = jnp.einsum("bnd,nde->bne", y, p[mixer])
      elif kind == "swap":
        y = jnp.swapaxes(y, -1, -2)
      elif kind == "first":
        y = y.at[:, 0].mul(np.float32(0.5))
      elif kind == "roll":
        y = jnp.roll(y, 1, axis=-1)
      else:
        y = HEADS_MEET[kind](y)
      return y.reshape(x.shape)

    self.layers.append(run)

  def scan(self):
    w = self.leaf(3, self.width, self.width)

    def run(p, x):
      def step(x, own):
        return jnp.tanh(x @ own), jnp.square(x).sum()

      x, sizes = jax.lax.scan(step, x, p[w])
      return x * (1 + 1 / (1 + sizes.sum()))

    self.layers.append(run)

  def joined(self):
    w = self.leaf(self.width, 4)
    self.layers.append(lambda p, x: jnp.concatenate([x, x @ p[w]], axis=-1))
    self.width += 4
    self.dense(12)

  def chunks(self):
    """Chunks of one array, by split or by slices, joined again or gating."""
    kind = self.rng.integers(3)
    w = self.leaf(self.width, 2 * self.width)

    def run(p, x):
      y, size = x @ p[w], x.shape[-1]
      if kind == 0:
        a, b = jnp.split(y, 2, axis=-1)
        return jnp.tanh(a) * jax.nn.sigmoid(b)
      if kind == 1:
        return y[..., :size] * jax.nn.sigmoid(y[..., size:])
      a, b = jnp.split(x, 2, axis=-1)
      return jnp.concatenate([jnp.tanh(b), a], axis=-1)

    self.layers.append(run)

  def pooled(self):
    w = self.leaf(self.width)
    self.layers.append(
      lambda p, x: (
        x
        * jax.nn.sigmoid(
          (x * jnp.broadcast_to(p[w], x.shape)).max(-1, keepdims=True)
        )
      )
    )

  def __call__(self, params, x):
    for layer in self.layers:
      x = layer(params, x)
    return x


KINDS = (
  "dense elementwise norm residual gated heads heads heads scan joined pooled"
  " shared chunks chunks"
).split()


@pytest.mark.parametrize("seed", range(8))
def test_what_is_inferred_is_so(seed):
  network = Drawn(seed, 5)
  x = np.float32(np.random.default_rng(seed).standard_normal((3, 8)))
  try:
    # The function is compared: a wrong rule raises MismatchError here.
    spec = alignment.infer_permutations(network, network.params, x)
  except StructureError as error:
    assert "scatter" in str(error) or "no hidden" in str(error)
    spec = alignment.infer_permutations(
      network, network.params, x, on_doubt="fix"
    )
  assert spec.error < 1e-3
  other = alignment.permute(
    spec, alignment.random_permutations(spec, seed), network.params
  )
  y, z = (jax.jit(network)(p, x) for p in (network.params, other))
  scale = float(np.abs(y).max())
  np.testing.assert_allclose(y / scale, z / scale, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS_MEET)
def test_numbers_of_heads_that_meet_move_alike(kind):
  def network(p, x):
    y = HEADS_MEET[kind]((x @ p["w"]).reshape(3, 3, 4))
    return jnp.tanh(y).reshape(3, 12) @ p["o"]

  params = drawn({"w": (8, 12), "o": (12, 5)})
  x = drawn({"x": (3, 8)}, 1)["x"]
  spec = alignment.infer_permutations(network, params, x)
  assert [spec.table(name) for name in spec.moving] == [(4,)]


def added_up():
  return jnp.cumsum(jnp.ones(8, np.float32))


def written_into():
  return jax.lax.dynamic_update_slice(
    jnp.ones(8, np.float32), jnp.zeros(2, np.float32), (2,)
  )


@pytest.mark.parametrize("unequal", [added_up, written_into])
def test_what_is_made_equal_may_not_stay_so(unequal):
  def network(p, x):
    return jnp.tanh((x @ p["w1"]) * unequal()) @ p["w2"]

  params = {"w1": np.ones((4, 8), "f"), "w2": np.ones((8, 2), "f")}
  with pytest.raises(StructureError, match="w1:1: .* reads its entries"):
    alignment.infer_permutations(network, params, np.ones(4, np.float32))
