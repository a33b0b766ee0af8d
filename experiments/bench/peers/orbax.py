"""Plain Orbax: a checkpoint a version."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.bench import timing, workload
from experiments.bench.peers.base import folder_bytes


class Orbax:
  """A folder of checkpoints.

  Attributes:
    name: `Orbax`.
  """

  name = "Orbax"

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._like: Any = None
    self._count = 0

  def commit(self, version: workload.Version) -> timing.Cost:
    """Saves arrays that are on the device."""
    value = jax.tree.map(jnp.array, version.value)
    self._like = workload.abstract(version.value)
    jax.block_until_ready(value)
    path = self._path(self._count)
    self._count += 1
    return timing.cost(lambda: ocp.save(path, value))

  def checkout(self, number: int) -> timing.Cost:
    """Loads a checkpoint onto the device; Orbax verifies nothing."""
    return timing.cost(lambda: ocp.load(self._path(number), self._like))

  def partial(self, number: int, prefix: str) -> timing.Cost:
    """Loads some leaves.

    Args:
      number: which version, -1 for the last.
      prefix: start of their text names.
    """
    wanted = {
      name: leaf
      for name, leaf in workload.flat(self._like).items()
      if name.startswith(prefix)
    }
    path = self._path(number % self._count)
    context = ocp.Context()
    context.pytree.loading.partial_load = True

    def load() -> Any:
      with context:
        return ocp.load(path, workload.unflat(wanted))

    return timing.cost(load)

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name."""
    kinds = jax.tree.map(lambda x: np.ndarray, self._like)
    return workload.flat(ocp.load(self._path(number), kinds))

  def size(self) -> int:
    """Bytes of all checkpoints."""
    return folder_bytes(self._folder)

  def close(self) -> None:
    """There is nothing to end."""

  def _path(self, number: int) -> str:
    return str(self._folder / f"{number:03}")
