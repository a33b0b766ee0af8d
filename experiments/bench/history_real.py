"""Real deltas: all-MiniLM-L6-v2 is fine-tuned, and every checkpoint is stored.

Adam on all parameters of the demo's encoder, on the demo's tweets. The
checkpoints are stored in float32 and, rounded, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from experiments.bench import history_limits, workload
from experiments.bench.history_tables import (
  Section,
  Table,
  Target,
  megabytes,
)
from experiments.bench.history_versions import Settings
from experiments.bench.peers.orbax import Orbax
from experiments.bench.peers.ours import Patchjax
from patchjax.demo import data, model, tasks

_EVERY, _COUNT, _BATCH, _RATE = 8, 4, 16, 2e-5
_TASK = "tweets"


def run(settings: Settings) -> Section:
  """Returns the bytes of real checkpoints.

  Args:
    settings: a model of fewer than a million parameters stops after a step.
  """
  if not settings.install and not _cached():
    return Section(remarks=["real: the demo's files are not here (--install)"])
  try:
    files = data.fetch()
  except ConnectionError as error:
    return Section(remarks=[f"real: {error}"])
  every = _EVERY if settings.params >= 1e6 else 1
  found = _trained(
    model.load(files["model.safetensors"]),
    tasks.load(files, tokens=24)[_TASK],
    every,
  )
  rows, targets = [], []
  for dtype in (np.float32, ml_dtypes.bfloat16):
    kind = np.dtype(dtype).name
    versions = [
      workload.Version(f"{every * i} steps", workload.cast(value, dtype))
      for i, value in enumerate(found)
    ]
    rows += _stored(settings, versions, kind, targets)
  columns = (
    "version", "dtype", "dense MB", "Orbax MB", "patchjax MB", "of dense",
    "limit MB", "of the limit",
  )  # fmt: skip
  title = f"all-MiniLM-L6-v2, every {every} steps of Adam on all parameters"
  return Section([Table(title, columns, rows)], targets)


def _cached() -> bool:
  return all(
    (data.cache_dir() / f"{package.name}-{package.version}" / name).is_file()
    for package in data.PACKAGES
    for name in package.files
  )


def _stored(
  settings: Settings,
  versions: Sequence[workload.Version],
  kind: str,
  targets: list[Target],
) -> list[tuple[str, ...]]:
  """Stores versions; returns their rows, and adds to the targets."""
  ours = Patchjax(settings.folder / f"ours-{kind}")
  plain = Orbax(settings.folder / f"plain-{kind}")
  rows = []
  before, old = (ours.size(), plain.size()), None
  for version in versions:
    ours.commit(version)
    plain.commit(version)
    after = ours.size(), plain.size()
    size, theirs = (b - a for a, b in zip(before, after, strict=True))
    limit = history_limits.version_limit(version, old)
    dense = workload.nbytes(version.value)
    rows.append(
      (
        version.name,
        kind,
        *map(megabytes, (dense, theirs, size)),
        f"{size / dense:.3f}",
        megabytes(limit),
        f"{size / limit:.2f}x",
      )
    )
    if old is not None:
      what = f"MiniLM, {kind}, {version.name}, bytes, of the entropy"
      targets.append(Target.at_most(what, size / limit, 1.1, "x"))
    before, old = after, version
  return rows


def _trained(params: Any, task: tasks.Task, every: int) -> list[Any]:
  """Returns the checkpoints of a fine-tune, the first before it."""
  params = jax.tree.map(jnp.asarray, params)
  prompts = jnp.asarray(task.prompts.ids), jnp.asarray(task.prompts.mask)
  heads = model.encode(params, *prompts)
  adam = optax.adam(_RATE)
  state = adam.init(params)

  @jax.jit
  def step(params, state, ids, mask, labels):
    def loss(params):
      logits = 20.0 * jnp.matmul(model.encode(params, ids, mask), heads.T)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses)

    updates, state = adam.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  texts = task.train
  order = np.random.default_rng(0).permutation(len(texts))
  found = [jax.tree.map(np.asarray, params)]
  for i in range(every * _COUNT):
    rows = np.take(order, range(i * _BATCH, (i + 1) * _BATCH), mode="wrap")
    batch = texts.ids[rows], texts.mask[rows], texts.labels[rows]
    params, state = step(params, state, *batch)
    if (i + 1) % every == 0:
      found.append(jax.tree.map(np.asarray, params))
  return found
