"""Training a patch on one task, and nothing but the patch.

The lower layers are frozen, so what they say about the training texts is
computed once; a step runs the upper layers only. What is differentiated are
the patch's own numbers (`pj.trainable`): neither gradients nor optimizer
states of the whole model exist.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import patchjax as pj
from patchjax.demo import model
from patchjax.demo.config import Config
from patchjax.demo.scoring import Scorer, logits
from patchjax.patches import Delta, Sparse


def upper_layers(scorer: Scorer) -> str:
  """Selects every parameter of the layers above the cached ones."""
  numbers = sorted(scorer.base["layers"], key=int)[scorer.depth :]
  return f"layers/({'|'.join(numbers)})/.*"


def density(scorer: Scorer, share: float) -> float:
  """`share` of the numbers of all layers, as a share of the upper layers'.

  Args:
    scorer: knows the model and its cut.
    share: entries of a patch, relative to the entries of all layers.

  Returns:
    The `density` of `pj.tuning.fish` and `pj.tuning.random_mask`.
  """
  leaves = pj.trees.named_leaves(scorer.base)

  def count(only: str) -> int:
    return sum(leaves[name].size for name in pj.select(scorer.base, only))

  return share * count("layers/.*") / count(upper_layers(scorer))


def fish_patch(scorer: Scorer, task: str, config: Config) -> pj.Patch:
  """A zero patch on the entries that matter most to a task's predictions.

  Args:
    scorer: knows the released model and the texts.
    task: whose training texts are looked at; their labels are not.
    config: sizes and the seed.

  Returns:
    The patch to train.
  """
  x, mask, _ = scorer.training(task)
  n = min(config.fisher_examples, len(x))
  question = jax.tree.map(
    lambda array: jnp.broadcast_to(array, (n, *array.shape)),
    scorer.question(task),
  )
  return pj.tuning.fish(
    scorer.log_prob,
    scorer.base,
    (jnp.asarray(x[:n]), jnp.asarray(mask[:n]), question),
    density=density(scorer, config.share),
    key=_key(config, task),
    only=upper_layers(scorer),
  )


def random_patch(scorer: Scorer, task: str, config: Config) -> pj.Patch:
  """A zero patch of the same size on entries drawn at random: the control."""
  return pj.tuning.random_mask(
    scorer.base,
    density=density(scorer, config.share),
    key=_key(config, task),
    only=upper_layers(scorer),
  )


def dense_patch(scorer: Scorer) -> pj.Patch:
  """A zero patch on every entry of the upper layers."""
  return pj.diff(scorer.base, scorer.base, only=upper_layers(scorer))


def _key(config: Config, task: str) -> jax.Array:
  return jax.random.fold_in(
    jax.random.key(config.seed), zlib.crc32(task.encode())
  )


def train(
  patch: pj.Patch,
  scorer: Scorer,
  task: str,
  config: Config,
  *,
  rate: float,
  base: model.Params | None = None,
  keep: str | None = None,
) -> pj.Patch:
  """Trains the numbers of a patch on a task with Adam.

  Args:
    patch: where to start, as a rule with zeros.
    scorer: gives heads and texts.
    task: the task to learn.
    config: steps, batch, seed, weight of `keep`.
    rate: learning rate.
    base: what the patch is applied to; must share the scorer's lower layers.
      Default the scorer's base.
    keep: another task, whose question is asked about the same texts: the
      answers of the base are to stay ("learning without forgetting", Li &
      Hoiem, 2016). None: nobody minds.

  Returns:
    The patch with trained numbers.
  """
  base = scorer.base if base is None else base
  x, mask, labels = scorer.training(task)
  random = np.random.default_rng([config.seed, zlib.crc32(task.encode())])
  needed = config.steps * config.batch
  rounds = -(-needed // len(labels))
  order = np.concatenate(
    [random.permutation(len(labels)) for _ in range(rounds)]
  )
  batches = order[:needed].reshape(config.steps, config.batch)
  questions = scorer.question(task), keep and scorer.question(keep)
  numbers = np.float32(rate), np.float32(config.keep)
  # All masks in one shape: the step is compiled once for all of them.
  room = _padded(patch, scorer)
  values, _ = pj.trainable(room)
  # Steps overwrite their numbers in place; the patch given stays whole.
  values = jax.tree.map(jnp.array, values)
  state = _ADAM.init(values)
  for rows in tqdm(batches, desc=f"training on {task}", leave=False):
    batch = x[rows], mask[rows], labels[rows]
    values, state = _step(
      scorer.top, base, room, values, state, batch, questions, numbers
    )
  held, rebuild = pj.trainable(patch)
  return rebuild(
    {
      name: {
        field: values[name][field][: len(array)]
        for field, array in fields.items()
      }
      for name, fields in held.items()
    }
  )


def _padded(patch: pj.Patch, scorer: Scorer) -> pj.Patch:
  """A sparse patch with room for any mask of about its size.

  Every leaf of the upper layers gets its entry, and in each the positions are
  filled up with ones past the end, which `Sparse` defines as padding. Other
  patches are returned as they are.
  """
  codes: dict[str, Sparse] = {}
  for name, delta in patch.deltas.items():
    code = delta.code if isinstance(delta, Delta) else None
    if not isinstance(code, Sparse):
      return patch
    codes[name] = code
  leaves = pj.trees.named_leaves(scorer.base)
  # A leaf is filled up to a power of two that a mask hardly ever exceeds.
  most = max(code.indices.size for code in codes.values())
  deltas = {}
  for name in pj.select(scorer.base, upper_layers(scorer)):
    shape, size = leaves[name].shape, leaves[name].size
    room = min(size, max(2**15, 1 << (most - 1).bit_length()))
    indices = np.arange(size, size + room, dtype=np.int32)
    values = np.zeros(room, np.float32)
    if name in codes:
      held = codes[name].indices.size
      indices[:held] = codes[name].indices
      values[:held] = codes[name].entries()
    deltas[name] = Delta(
      Sparse(jnp.asarray(values), jnp.asarray(indices), shape), "add"
    )
  return patch.replace(deltas)


_ADAM = optax.scale_by_adam()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _step(top, base, patch, values, state, batch, questions, numbers):
  """One step of Adam on the numbers of the patch."""
  x, mask, labels = batch
  own, other = questions
  rate, weight = numbers
  _, rebuild = pj.trainable(patch)

  def loss_of(values: Any) -> jax.Array:
    vectors = top(pj.apply(base, rebuild(values)), x, mask)
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        logits(own, vectors), labels
      )
    )
    if other is None:
      return loss
    before = jax.nn.log_softmax(logits(other, top(base, x, mask)))
    after = jax.nn.log_softmax(logits(other, vectors))
    kept = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
    return loss + weight * jnp.mean(kept)

  gradients = jax.grad(loss_of)(values)
  # Adam raises a float to an integer power, which strict promotion refuses.
  with jax.numpy_dtype_promotion("standard"):
    updates, state = _ADAM.update(gradients, state)
  values = jax.tree.map(lambda v, u: v - rate * u, values, updates)
  return values, state
