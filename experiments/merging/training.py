"""Specialists, and the models that saw the data of all tasks at once.

A specialist is a dense patch of the upper layers, trained on its task alone.
Against merges stand three patches trained on the union of the same texts with
as many steps as all specialists together: dense, LoRA, and on a random mask.
What is trained is kept as patch files, one folder a seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import patchjax as pj
from experiments.merging.encoder import Encoder, Heads, Texts
from experiments.merging.problem import timed
from experiments.merging.settings import Settings

UNIONS = ("multitask", "lora", "random")
# What a trained patch depends on, beside the code.
_FIELDS = (
  "tasks tokens depth train_texts steps batch rate union_rate lora_rate"
  " random_rate rank share"
).split()
_ADAM = optax.scale_by_adam()


def folder(root: pathlib.Path, settings: Settings, seed: int) -> pathlib.Path:
  """Where the patches of a seed are kept: another place for other settings.

  Args:
    root: the cache folder.
    settings: of the experiment.
    seed: which seed.
  """
  fields = {name: getattr(settings, name) for name in _FIELDS}
  digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
  return root / f"merging-{digest[:12]}" / f"seed{seed}"


def patches(
  encoder: Encoder,
  settings: Settings,
  seed: int,
  root: pathlib.Path,
  *,
  echo: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, pj.Patch], dict[str, float]]:
  """The patches of a seed, from the cache or trained now.

  Args:
    encoder: base and texts.
    settings: of the experiment.
    seed: which seed.
    root: the cache folder.
    echo: receives one line for every patch that is trained.

  Returns:
    Patch by name, the tasks, then `UNIONS`; and the CPU-seconds that each
    took to train.
  """
  where = folder(root, settings, seed)
  where.mkdir(parents=True, exist_ok=True)
  log = where / "cpu_seconds.json"
  costs = json.loads(log.read_text()) if log.exists() else {}
  found, trainer = {}, None
  for name in (*encoder.names, *UNIONS):
    path = where / f"{name}.safetensors"
    if not path.exists() or name not in costs:
      echo(f"seed {seed}: training {name}")
      trainer = trainer or _Trainer(encoder, settings, seed)
      part = path.with_suffix(".part")
      patch, costs[name] = timed(trainer.train, name)
      patch.save(part)
      os.replace(part, path)
      log.write_text(json.dumps(costs))
    found[name] = pj.Patch.load(path)
  return found, costs


class _Trainer:
  """Trains the patches of one seed."""

  def __init__(self, encoder: Encoder, settings: Settings, seed: int):
    self._encoder = encoder
    self._settings = settings
    self._seed = seed
    self._texts = encoder.pool("train", settings.train_texts).padded()

  def train(self, name: str) -> pj.Patch:
    """Returns the trained patch of a task, or one of `UNIONS`."""
    encoder, settings = self._encoder, self._settings
    numbers = range(len(encoder.names))
    if name not in UNIONS:
      own = encoder.names.index(name)
      batches = self._batches(own)
      return self._run(_dense(encoder.base), batches, settings.rate)
    # Step i of every specialist, before step i + 1 of any.
    batches = (
      batch
      for group in zip(*(self._batches(number) for number in numbers))
      for batch in _mixed(group)
    )
    key = jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(b"union"))
    if name == "multitask":
      return self._run(_dense(encoder.base), batches, settings.union_rate)
    if name == "lora":
      start = pj.tuning.lora(
        key, encoder.base, rank=settings.rank, only=".*/kernel"
      )
      return self._run(start, batches, settings.lora_rate)
    start = pj.tuning.random_mask(encoder.base, density=settings.share, key=key)
    return self._run(start, batches, settings.random_rate)

  def _batches(self, number: int) -> Iterator[Texts]:
    """The batches that the specialist of a task is trained on."""
    x, mask, task, labels = self._texts
    own = np.flatnonzero(task == number)
    name = self._encoder.names[number]
    random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
    needed = self._settings.steps * self._settings.batch
    rounds = -(-needed // len(own))
    order = np.concatenate([random.permutation(own) for _ in range(rounds)])
    for rows in np.split(order[:needed], self._settings.steps):
      yield x[rows], mask[rows], task[rows], labels[rows]

  def _run(
    self, patch: pj.Patch, batches: Iterator[Texts], rate: float
  ) -> pj.Patch:
    values, rebuild = pj.trainable(patch)
    # Steps overwrite their numbers in place; the patch given stays whole.
    values = jax.tree.map(jnp.array, values)
    state = _ADAM.init(values)
    for batch in batches:
      values, state = _step(
        self._encoder,
        patch,
        self._encoder.base,
        self._encoder.heads,
        values,
        state,
        batch,
        np.float32(rate),
      )
    return rebuild(values)


def _dense(base: Any) -> pj.Patch:
  return pj.diff(base, base)


def _mixed(group: tuple[Texts, ...]) -> Iterator[Texts]:
  """As many batches as there are, each with texts of every task."""
  x, mask, task, labels = (np.concatenate(arrays) for arrays in zip(*group))
  for start in range(len(group)):
    own = slice(start, None, len(group))
    yield x[own], mask[own], task[own], labels[own]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _step(
  encoder: Encoder,
  patch: pj.Patch,
  base: Any,
  heads: Heads,
  values: Any,
  state: Any,
  batch: Texts,
  rate: Any,
):
  """One step of Adam on the numbers of the patch."""
  x, mask, task, labels = batch
  _, rebuild = pj.trainable(patch)

  def loss_of(values: Any) -> jax.Array:
    upper = pj.apply(base, rebuild(values))
    found = encoder.logits(upper, x, mask, task, heads)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(found, labels)
    )

  gradients = jax.grad(loss_of)(values)
  # Adam raises a float to an integer power, which strict promotion refuses.
  with jax.numpy_dtype_promotion("standard"):
    updates, state = _ADAM.update(gradients, state)
  values = jax.tree.map(lambda v, u: v - rate * u, values, updates)
  return values, state
