"""Payloads: the arrays of a commit as a plain Orbax checkpoint.

The only module that calls Orbax. A payload is a flat dict of host arrays under
`payloads/<uuid>/`, which `orbax.checkpoint.v1.load` opens without patchjax,
and an `index.json` beside Orbax's files that says which leaf each array is.
Paths are unique, since Orbax's temporary names derive from them; the index is
written last, so that a payload without one does not exist.

Orbax checks no data on reading and casts dtypes silently: whoever reads a
payload verifies digests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from patchjax.history.files import TEMPORARY
from patchjax.trees.errors import FormatError, IntegrityError, RepositoryError

# What Orbax and TensorStore raise when a disk is full, a path is gone, a chunk
# does not decode, or Orbax's own metadata were changed (it trusts their types).
_STORAGE_ERRORS = (
  AssertionError,
  AttributeError,
  LookupError,
  OSError,
  RuntimeError,
  TypeError,
  ValueError,
)


def save(
  path: str,
  arrays: Mapping[str, Any],
  *,
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes arrays as an Orbax checkpoint: all of it or nothing.

  Args:
    path: folder to create.
    arrays: `{key: host array}`, or nested dicts of them.
    metadata: JSON-able remarks for those who open it with Orbax.

  Raises:
    RepositoryError: if it cannot be written; nothing stays behind.
  """
  from orbax.checkpoint import v1 as ocp

  try:
    _probe(path)
    with _quiet():
      ocp.save(path, arrays, custom_metadata=metadata)
  except _STORAGE_ERRORS as error:
    folder, name = os.path.split(path)
    for leftover in os.listdir(folder) if os.path.isdir(folder) else ():
      if leftover.startswith(name):
        shutil.rmtree(os.path.join(folder, leftover), ignore_errors=True)
    raise RepositoryError(
      f"could not write the checkpoint {path}: {_brief(error)}\n"
      "free some space or make the path writable, and try again; nothing "
      "was left half-written"
    ) from error


def _probe(path: str) -> None:
  """Raises OSError if a folder cannot be created where `path` will be.

  Orbax creates its folder while other threads wait for it: when that fails,
  they wait for minutes and keep the process from ending.
  """
  folder, name = os.path.split(path)
  os.makedirs(folder, exist_ok=True)
  probe = os.path.join(folder, f"{TEMPORARY}{name}")
  os.mkdir(probe)
  os.rmdir(probe)


def load(path: str, keys: Iterable[str]) -> dict[str, np.ndarray]:
  """Reads some arrays of a payload; the caller verifies them.

  Args:
    path: folder of the checkpoint.
    keys: names of the arrays.

  Raises:
    IntegrityError: if it cannot be read.
  """
  from orbax.checkpoint import v1 as ocp

  keys = list(keys)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context, _quiet():
      # Asked for by type alone: Orbax would truncate or cast to a shape and a
      # dtype that differ from what is stored.
      found = ocp.load(path, dict.fromkeys(keys, np.ndarray))
  except _STORAGE_ERRORS as error:
    raise IntegrityError(
      f"payload {path} cannot be read: {_brief(error)}"
    ) from error
  # A key that is not stored comes back as what was asked for, not as data.
  return {k: found[k] for k in keys if isinstance(found.get(k), np.ndarray)}


def load_tree(path: str) -> Any:
  """Reads the whole pytree of any Orbax checkpoint, with arrays on the host.

  Args:
    path: folder of the checkpoint, of whatever origin.

  Returns:
    The pytree as Orbax rebuilds it (dicts and lists); arrays are numpy's, so
    that 64 bits stay 64 bits; Python numbers and strings as they are.

  Raises:
    FormatError: if it is no Orbax checkpoint, or cannot be read.
  """
  import jax
  from orbax.checkpoint import v1 as ocp

  try:
    with _quiet():
      kinds = jax.tree.map(
        lambda x: np.ndarray if hasattr(x, "shape") else type(x),
        ocp.metadata(path).metadata,
      )
      return ocp.load(path, kinds)
  except _STORAGE_ERRORS as error:
    raise FormatError(
      f"{path} is not a readable Orbax checkpoint: {_brief(error)}"
    ) from error


def _brief(error: BaseException) -> str:
  """Returns the first line of a message; TensorStore adds whole specs."""
  text = str(error).partition("[")[0].strip() or str(error)
  return (text.splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax's tracebacks of background threads off the user's screen.

  The error itself is raised, and reported once, by the caller.
  """
  import logging

  logger = logging.getLogger("absl")
  disabled, logger.disabled = logger.disabled, True
  try:
    yield
  finally:
    logger.disabled = disabled
