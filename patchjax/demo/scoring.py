"""Scoring versions of the encoder on the tasks, without waste.

Contributors train the upper layers only. What the lower layers say about a
text is therefore the same for most versions: it is computed once, and a
version that shares those layers bit for bit is scored from there.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.demo import model
from patchjax.demo.tasks import Task, Texts

# What cosines are multiplied with to be logits, about what CLIP learned
# (Radford et al., 2021).
TEMPERATURE = np.float32(20.0)
_WIDTH = 8  # lengths are rounded up to this, so that few shapes are compiled


Question = tuple[jax.Array, jax.Array]
"""Vectors of the classes `[room, width]`, and which of them are meant."""


def logits(question: Question, vectors: jax.Array) -> jax.Array:
  """Logits of the classes; very low where there is no such class.

  Args:
    question: of a task, see `Scorer.question`.
    vectors: sentence vectors, shape `[..., width]`.

  Returns:
    Shape `[..., room]`.
  """
  head, meant = question
  cosines = jnp.matmul(vectors, head.T)
  meant = jnp.reshape(meant, (1,) * (cosines.ndim - 1) + (-1,))
  return jnp.where(meant, TEMPERATURE * cosines, np.float32(-1e9))


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Texts of about one length: rows of the split, tokens, token vectors."""

  rows: np.ndarray
  ids: jax.Array
  mask: jax.Array
  x: jax.Array


def _places(arrays: list[np.ndarray]) -> list[int]:
  return [array.ctypes.data for array in arrays]


class _Bottom:
  """The lower layers of one version, and what they say about texts."""

  def __init__(self, leaves: list[Any]):
    self.leaves = leaves
    # The last others that were compared and equal: a version is scored test
    # by test, and need not be compared anew each time.
    self._equal: list[np.ndarray] = []
    self.batches: dict[tuple[str, str], list[_Batch]] = {}

  def same(self, leaves: list[Any]) -> bool:
    """Whether the leaves hold the same numbers."""
    mine, theirs = (list(map(np.asarray, x)) for x in (self.leaves, leaves))
    if _places(theirs) in (_places(mine), _places(self._equal)):
      return True
    if not all(map(np.array_equal, mine, theirs)):
      return False
    self._equal = theirs
    return True


class Scorer:
  """Scores parameters on tasks.

  What the lower layers of the base say is kept; so is what those of the last
  version with other ones said, for a version has several tests.

  Attributes:
    base: the released parameters, which the heads come from.
    tasks: the tasks by name.
    depth: how many lower layers count as such.
    top: `model.top` of this depth.
  """

  def __init__(
    self,
    base: model.Params,
    tasks: Mapping[str, Task],
    *,
    depth: int,
    heads: int = model.MINILM.heads,
    batch: int = 64,
  ):
    self.base = jax.tree.map(jnp.asarray, base)
    self.tasks = dict(tasks)
    self.depth = depth
    self._batch = batch
    self._known = _Bottom(self._below(self.base))
    self._other: _Bottom | None = None
    self._training: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    self.top = functools.partial(model.top, depth=depth, heads=heads)
    self._run_bottom = jax.jit(
      functools.partial(model.bottom, depth=depth, heads=heads)
    )
    self._run_top = jax.jit(self.top)
    self._questions = self._ask()

  def _ask(self) -> dict[str, Question]:
    """All heads in one shape, so that what uses them is compiled once."""
    room = max(len(task.classes) for task in self.tasks.values())
    width = self.base["embed"]["word"].shape[1]
    questions = {}
    for name, task in self.tasks.items():
      head = np.zeros((room, width), np.float32)
      for batch in self._cut(self.base, task.prompts):
        found = self._run_top(self._above(self.base), batch.x, batch.mask)
        head[batch.rows] = np.asarray(found)[: len(batch.rows)]
      meant = np.arange(room) < len(task.classes)
      questions[name] = jnp.asarray(head), jnp.asarray(meant)
    return questions

  def question(self, task: str) -> Question:
    """The frozen vectors of a task's classes, filled up with zeros."""
    return self._questions[task]

  def log_prob(
    self, params: model.Params, example: tuple[jax.Array, jax.Array, Question]
  ) -> jax.Array:
    """Log-probabilities of the classes of one text behind the lower layers.

    Args:
      params: parameters of the encoder.
      example: token vectors `[length, width]`, mask `[length]`, question.

    Returns:
      Shape `[room]`.
    """
    x, mask, question = example
    vector = self.top(params, x[None], mask[None])[0]
    return jax.nn.log_softmax(logits(question, vector))

  def limit(self, task: str, n: int) -> None:
    """Keeps only the first `n` test texts of a task."""
    self.tasks[task] = dataclasses.replace(
      self.tasks[task], test=self.tasks[task].test.take(n)
    )
    self._known.batches.pop((task, "test"), None)
    self._other = None

  def warm(self, task: str, split: str) -> None:
    """Runs the base's lower layers over a split, if not done yet."""
    self._batches(self._known, self.base, task, split)

  def training(self, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The training texts of a task, behind the base's lower layers.

    Args:
      task: name of the task.

    Returns:
      Token vectors `[n, length, width]`, mask `[n, length]`, labels `[n]`.
    """
    if task not in self._training:
      texts = self.tasks[task].train
      width = self.base["embed"]["word"].shape[1]
      x = np.zeros((*texts.ids.shape, width), np.float32)
      for batch in self._batches(self._known, self.base, task, "train"):
        x[batch.rows, : batch.ids.shape[1]] = batch.x[: len(batch.rows)]
      del self._known.batches[task, "train"]
      self._training[task] = x, texts.mask, texts.labels
    return self._training[task]

  def outcomes(
    self, params: model.Params, task: str, split: str = "test"
  ) -> np.ndarray:
    """Which texts of a split the parameters get right.

    Args:
      params: parameters of the encoder.
      task: name of the task.
      split: "train", "validation" or "test".

    Returns:
      Booleans, shape `[n]`.
    """
    texts: Texts = getattr(self.tasks[task], split)
    upper = self._above(params)
    # Sent off first, waited for afterwards.
    later = [
      (batch.rows, self._run_top(upper, batch.x, batch.mask))
      for batch in self._batches(self._bottom(params), params, task, split)
    ]
    head = np.asarray(self.question(task)[0])[: len(self.tasks[task].classes)]
    right = np.zeros(len(texts), bool)
    for rows, vectors in later:
      cosines = np.asarray(vectors)[: len(rows)] @ head.T
      right[rows] = cosines.argmax(axis=1) == texts.labels[rows]
    return right

  def _below(self, params: model.Params) -> list[Any]:
    layers = [params["layers"][str(layer)] for layer in range(self.depth)]
    return jax.tree.leaves((params["embed"], layers))

  def _above(self, params: model.Params) -> model.Params:
    """Only what `top` looks at, on the device, once for all batches."""
    layers = {
      number: jax.tree.map(jnp.asarray, layer)
      if int(number) >= self.depth
      else {}
      for number, layer in params["layers"].items()
    }
    return {"layers": layers}

  def _bottom(self, params: model.Params) -> _Bottom:
    leaves = self._below(params)
    if self._known.same(leaves):
      return self._known
    if self._other is None or not self._other.same(leaves):
      self._other = _Bottom(leaves)
    return self._other

  def _batches(
    self, bottom: _Bottom, params: model.Params, task: str, split: str
  ) -> list[_Batch]:
    """A split in batches of texts of about one length, run up to the cut."""
    if (task, split) not in bottom.batches:
      texts = getattr(self.tasks[task], split)
      bottom.batches[task, split] = self._cut(params, texts)
    return bottom.batches[task, split]

  def _cut(self, params: model.Params, texts: Texts) -> list[_Batch]:
    lower = {"embed": params["embed"], "layers": params["layers"]}
    lower = jax.tree.map(jnp.asarray, lower)
    lengths = -(-texts.mask.sum(axis=1) // _WIDTH) * _WIDTH
    batches = []
    for length in np.unique(lengths):
      members = np.flatnonzero(lengths == length)
      width = min(int(length), texts.ids.shape[1])
      for start in range(0, len(members), self._batch):
        rows = members[start : start + self._batch]
        # Filled up with its first text, so that one shape a length compiles.
        full = np.concatenate([rows, np.repeat(rows[:1], self._batch)])
        full = full[: self._batch]
        ids = jnp.asarray(texts.ids[full, :width])
        mask = jnp.asarray(texts.mask[full, :width])
        x = self._run_bottom(lower, ids, mask)
        batches.append(_Batch(rows, ids, mask, x))
    return batches
