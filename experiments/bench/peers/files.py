"""A safetensors file a version."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import flax, numpy

from experiments.bench import timing, workload
from experiments.bench.peers.base import folder_bytes


class Safetensors:
  """A folder of files; nothing is compressed, synced or verified.

  Attributes:
    name: `safetensors`.
  """

  name = "safetensors"

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    folder.mkdir(parents=True)
    self._count = 0

  def commit(self, version: workload.Version) -> timing.Cost:
    """Writes arrays that are on the device."""
    value = jax.tree.map(jnp.array, version.value)
    named: dict[str, Any] = {**workload.flat(value)}
    jax.block_until_ready(named)
    path = self._path(self._count)
    self._count += 1
    return timing.cost(lambda: flax.save_file(named, path))

  def checkout(self, number: int) -> timing.Cost:
    """Reads a file onto the device."""
    return timing.cost(lambda: flax.load_file(self._path(number)))

  def value(self, number: int) -> dict[str, Any]:
    """Returns the leaves by name."""
    return numpy.load_file(self._path(number))

  def size(self) -> int:
    """Bytes of all files."""
    return folder_bytes(self._folder)

  def close(self) -> None:
    """There is nothing to end."""

  def _path(self, number: int) -> pathlib.Path:
    return self._folder / f"{number:03}.safetensors"


def write(path: pathlib.Path, named: Mapping[str, np.ndarray]) -> None:
  """Writes a value for peers that track files.

  Args:
    path: the file.
    named: its leaves by text name.
  """
  numpy.save_file(dict(named), path)
