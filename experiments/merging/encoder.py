"""The upper layers of MiniLM on texts that the lower ones have read.

Specialists and merged models differ in the upper layers only: "parameters"
here are `{"layers": {"4": ..., "5": ...}}`, and a text is what the lower
layers of the base made of it, computed once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.demo import model
from patchjax.demo.scoring import TEMPERATURE
from patchjax.demo.tasks import Task
from patchjax.demo.tasks import Texts as Split

Params = dict[str, Any]
Texts = tuple[Any, Any, Any, Any]
"""Token vectors, masks, numbers of tasks, labels; one row a text."""
_ROUNDED = 4  # lengths are rounded up to this, so that few shapes compile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
  """The frozen vectors of the classes of all tasks, in one shape.

  Attributes:
    vectors: shape `[tasks, room, width]`, zero where there is no such class.
    meant: whether there is such a class, shape `[tasks, room]`.
  """

  vectors: jax.Array
  meant: jax.Array


@dataclasses.dataclass(frozen=True)
class Batch:
  """Texts of about one length.

  Attributes:
    rows: places in the pool of those that count; the others fill up.
    x: token vectors behind the lower layers, `[batch, length, width]`.
    mask: True at tokens, `[batch, length]`.
    task: number of each text's task, `[batch]`.
    labels: class of each text, `[batch]`.
  """

  rows: np.ndarray
  x: jax.Array
  mask: jax.Array
  task: jax.Array
  labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Pool:
  """Texts of all tasks together, task after task.

  Attributes:
    task: number of each text's task, `[n]`.
    batches: all texts, in batches of about one length.
  """

  task: np.ndarray
  batches: tuple[Batch, ...]

  def __len__(self) -> int:
    return len(self.task)

  def padded(self) -> Texts:
    """All texts in one shape: token vectors, masks, tasks, labels."""
    length = max(batch.x.shape[1] for batch in self.batches)
    width = self.batches[0].x.shape[2]
    x = np.zeros((len(self), length, width), np.float32)
    mask = np.zeros((len(self), length), bool)
    labels = np.zeros(len(self), np.int32)
    for batch in self.batches:
      n, size = len(batch.rows), batch.x.shape[1]
      x[batch.rows, :size] = np.asarray(batch.x)[:n]
      mask[batch.rows, :size] = np.asarray(batch.mask)[:n]
      labels[batch.rows] = np.asarray(batch.labels)[:n]
    return x, mask, self.task.astype(np.int32), labels

  def means(self, right: np.ndarray) -> np.ndarray:
    """The mean of each task, of one number for each text."""
    n = np.bincount(self.task)
    return np.bincount(self.task, weights=right) / n


class Encoder:
  """A base, cut in two, and the tasks' heads.

  Attributes:
    names: of the tasks, in the order of their numbers.
    tasks: the tasks by name.
    base: the upper layers of the base.
    heads: of all tasks.
  """

  def __init__(
    self,
    params: Params,
    tasks: Mapping[str, Task],
    *,
    depth: int,
    heads: int = model.MINILM.heads,
    batch: int = 64,
  ):
    self.names = tuple(tasks)
    self.tasks = dict(tasks)
    self._depth = depth
    self._batch = batch
    layers = params["layers"]
    self.base: Params = jax.tree.map(
      jnp.asarray, {"layers": {n: layers[n] for n in layers if int(n) >= depth}}
    )
    self._lower = jax.tree.map(
      jnp.asarray,
      {
        "embed": params["embed"],
        "layers": {n: layers[n] for n in layers if int(n) < depth},
      },
    )
    self._bottom = jax.jit(
      functools.partial(model.bottom, depth=depth, heads=heads)
    )
    self._heads = heads
    self._outcomes = jax.jit(self._right)
    self._vectors = jax.jit(self.top)
    self.heads = self._ask()

  def top(self, upper: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sentence vectors `[batch, width]`, from the outputs of lower layers.

    Args:
      upper: the upper layers.
      x: token vectors, `[batch, length, width]`.
      mask: True at tokens, `[batch, length]`.
    """
    below: dict[str, Any] = {str(layer): {} for layer in range(self._depth)}
    params = {"layers": below | upper["layers"]}
    return model.top(params, x, mask, depth=self._depth, heads=self._heads)

  def logits(
    self,
    upper: Params,
    x: jax.Array,
    mask: jax.Array,
    task: jax.Array,
    heads: Heads,
  ) -> jax.Array:
    """Logits `[batch, room]` of the classes of each text's own task."""
    vectors = self.top(upper, x, mask)
    cosines = jnp.einsum("bw,brw->br", vectors, heads.vectors[task])
    return jnp.where(heads.meant[task], TEMPERATURE * cosines, np.float32(-1e9))

  def answer(self, upper: Params, text: tuple[Any, ...]) -> jax.Array:
    """Logits `[room]` of one text: token vectors, mask, number of its task."""
    x, mask, task = (jnp.asarray(part)[None] for part in text)
    return self.logits(upper, x, mask, task, self.heads)[0]

  def _right(self, upper, x, mask, task, labels, heads):
    best = jnp.argmax(self.logits(upper, x, mask, task, heads), axis=-1)
    return best == labels

  def outcomes(
    self, upper: Params, pool: Pool, only: int | None = None
  ) -> np.ndarray:
    """Which texts of a pool the parameters get right, booleans `[n]`.

    Args:
      upper: the upper layers.
      pool: the texts.
      only: number of a task; texts of others may be left at False.
    """

    def answered(batch: Batch) -> np.ndarray:
      return np.asarray(
        self._outcomes(
          upper, batch.x, batch.mask, batch.task, batch.labels, self.heads
        )
      )

    batches = [
      batch
      for batch in pool.batches
      if only is None or only in pool.task[batch.rows]
    ]
    right = np.zeros(len(pool), bool)
    # A batch a core: one alone does not keep all of them busy.
    with futures.ThreadPoolExecutor(os.cpu_count()) as cores:
      for batch, found in zip(batches, cores.map(answered, batches)):
        right[batch.rows] = found[: len(batch.rows)]
    return right

  def scores(self, upper: Params, pool: Pool) -> np.ndarray:
    """The accuracy on each task."""
    return pool.means(self.outcomes(upper, pool))

  def pool(
    self, split: str, n: int | None = None, *, by_task: bool = False
  ) -> Pool:
    """The first `n` texts of a split of every task, behind the lower layers.

    Args:
      split: "train", "validation" or "test".
      n: at most, of each task; the order is that of a hash.
      by_task: whether batches are of one task where they can be, for models
        that are to answer one alone.
    """
    parts = [getattr(task, split).take(n) for task in self.tasks.values()]
    return self._pool(parts, by_task)

  def _pool(self, parts: Sequence[Split], by_task: bool = False) -> Pool:
    task = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    ids = np.concatenate([part.ids for part in parts])
    mask = np.concatenate([part.mask for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    lengths = mask.sum(axis=1)
    order = np.lexsort((lengths, task) if by_task else (lengths,))
    batches = []
    for start in range(0, len(order), self._batch):
      rows = order[start : start + self._batch]
      length = min(-(-lengths[rows].max() // _ROUNDED) * _ROUNDED, ids.shape[1])
      full = np.resize(rows, self._batch)
      seen = jnp.asarray(mask[full, :length])
      batches.append(
        Batch(
          rows,
          self._bottom(self._lower, jnp.asarray(ids[full, :length]), seen),
          seen,
          jnp.asarray(task[full].astype(np.int32)),
          jnp.asarray(labels[full]),
        )
      )
    return Pool(task, tuple(batches))

  def _ask(self) -> Heads:
    """The base's own vectors of the sentences that describe the classes."""
    prompts = [task.prompts for task in self.tasks.values()]
    pool = self._pool(prompts)
    room = max(len(texts) for texts in prompts)
    width = pool.batches[0].x.shape[-1]
    flat = np.zeros((len(pool), width), np.float32)
    for batch in pool.batches:
      found = self._vectors(self.base, batch.x, batch.mask)
      flat[batch.rows] = np.asarray(found)[: len(batch.rows)]
    vectors = np.zeros((len(prompts), room, width), np.float32)
    meant = np.zeros((len(prompts), room), bool)
    for number in range(len(prompts)):
      own = flat[pool.task == number]
      vectors[number, : len(own)] = own
      meant[number, : len(own)] = True
    return Heads(jnp.asarray(vectors), jnp.asarray(meant))
