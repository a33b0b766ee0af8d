"""Payloads: the arrays of a commit as a plain Orbax checkpoint.

The only module that calls Orbax, and knows how its files are laid out (zarr3
arrays in an OCDBT store; hence the pinned version). A payload is a flat dict
of arrays under `payloads/<uuid>/`, which `orbax.checkpoint.v1.load` opens
without patchjax, and an `index.json` beside Orbax's files that says which leaf
each array is. We read it through TensorStore, which costs less than Orbax's
own `load` and reads any region.
Paths are unique, since Orbax's temporary names derive from them; the index is
written last, so that a payload without one does not exist.

Orbax checks no data on reading and casts dtypes silently: whoever reads a
payload verifies digests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from patchjax.history.arrays import processes
from patchjax.history.arrays.encodings import aligned
from patchjax.history.storage.files import TEMPORARY, Files
from patchjax.trees.errors import IntegrityError, RepositoryError

_STATE = "state"  # Orbax's folder for a pytree
_NODES = 32 << 20  # bytes of OCDBT nodes kept in memory

_LOOK = 0.5  # seconds between looks at whether to stop waiting

_IN_FLIGHT = 64 << 20  # bytes on their way to the disk at a time
_FILE = 64 << 20  # bytes of a data file, at which it is written out

_CHUNK = 2 << 20  # bytes of a chunk at most: what a partial read has to decode

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

# Orbax counts the saves of a process: two at once take each other's steps, and
# fail or wait for minutes.
_one_at_a_time = threading.Lock()


def save(
  path: str,
  arrays: Mapping[str, Any],
  *,
  metadata: dict[str, Any] | None = None,
  compress: bool = True,
) -> None:
  """Writes arrays as an Orbax checkpoint: all of it or nothing.

  Args:
    path: folder to create.
    arrays: `{key: array}`, or nested dicts of them: numpy arrays, and
      `jax.Array`s over any devices and processes, of which every process
      writes its shards (then it is called by all of them).
    metadata: JSON-able remarks for those who open it with Orbax.
    compress: whether zstd is worth its price, which weights do not repay.

  Raises:
    RepositoryError: if it cannot be written; nothing stays behind.
  """
  begin(path, arrays, metadata=metadata, compress=compress)()


def begin(
  path: str,
  arrays: Mapping[str, Any],
  *,
  metadata: dict[str, Any] | None = None,
  compress: bool = True,
  stop: threading.Event | None = None,
) -> Callable[[], None]:
  """Begins to write an Orbax checkpoint; returns what waits for its end.

  That must be called once, by any thread; until then nobody else can save.
  Every process waits by itself, and they exchange nothing but what Orbax does
  in the background: a checkpoint gets its name when all have written their
  shards. If one cannot, the others would wait for minutes.

  Args:
    path: see `save`, as for all arguments that are not listed.
    arrays: see there. With `stop`, they may be written to, donated or deleted
      once this returns.
    metadata: see there.
    compress: see there.
    stop: ends the waiting, as it fails, once it is set.
  """
  from orbax.checkpoint import v1 as ocp

  _check_scheme(path)
  with _cleaned(path):
    if "://" not in path:
      processes.together(lambda: _probe(path))
    _one_at_a_time.acquire()
    try:
      with _options(ocp, arrays, compress, copy=stop is not None):
        response = ocp.save_async(path, arrays, custom_metadata=metadata)
    except BaseException:
      _one_at_a_time.release()
      raise

  def wait() -> None:
    try:
      with _cleaned(path):
        _wait(response, stop)
    finally:
      _one_at_a_time.release()

  return wait


def _wait(response: Any, stop: threading.Event | None) -> None:
  while True:
    try:
      return response.result(None if stop is None else _LOOK)
    except TimeoutError as error:
      if str(error):
        raise  # Orbax's own
      if stop is not None and stop.is_set():
        raise RuntimeError("another process could not write it") from error


@contextlib.contextmanager
def _cleaned(path: str) -> Iterator[None]:
  """Leaves nothing behind of a checkpoint that cannot be written."""
  try:
    with _quiet():
      yield
  except _STORAGE_ERRORS as error:
    folder, name = os.path.split(path)
    # Of several processes the first one: the others may be writing still.
    here = os.path.isdir(folder) and not processes.index()
    for leftover in os.listdir(folder) if here else ():
      if leftover.startswith(name):
        shutil.rmtree(os.path.join(folder, leftover), ignore_errors=True)
    raise RepositoryError(
      f"could not write the checkpoint {path}: {_brief(error)}\n"
      "free some space or make the path writable, and try again; nothing "
      "was left half-written"
    ) from error


def _check_scheme(path: str) -> None:
  """Refuses what Orbax would fail at, sooner or later."""
  if path.startswith("s3://"):
    raise RepositoryError(
      f"{path} was not written: Orbax cannot write S3 payloads today; commit "
      "to a local repository, and push it there"
    )
  if path.startswith("gs://") and not any(
    importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")
  ):
    raise RepositoryError(
      f"{path} was not written: for gs:// Orbax needs gcsfs; install it with "
      "`pip install 'patchjax[gcs]'`"
    )


def _options(
  ocp: Any, arrays: Mapping[str, Any], compress: bool, copy: bool
) -> Any:
  """Returns the Orbax context to save in."""
  import jax

  context = ocp.Context()
  saving = context.array.saving
  saving.use_compression = compress
  # A partial read decodes whole chunks.
  saving.storage_options.chunk_byte_size = _CHUNK
  # By default all that is compressed stays in memory until the end.
  saving.ocdbt_target_data_file_size = _FILE
  # Slicing what is replicated is a computation on the devices, compiled for
  # each shape; what is stored must be the bits, untouched by any.
  saving.use_replica_parallel = False
  context.memory.deepcopy_host_arrays = copy
  largest = max((x.nbytes for x in jax.tree.leaves(arrays)), default=0)
  # Orbax refuses an array that is larger than what it may hold at a time.
  room = max(_IN_FLIGHT, largest + 1)
  context.memory.write_concurrent_bytes = room
  # With a limit, what is above it is fetched from the devices afterwards.
  context.memory.transfer_concurrent_bytes = None if copy else room
  return context


def _probe(path: str) -> None:
  """Raises OSError if a folder cannot be created where `path` will be.

  Orbax creates its folder while other threads wait for it: when that fails,
  they wait for minutes and keep the process from ending.
  """
  folder, name = os.path.split(path)
  os.makedirs(folder, exist_ok=True)
  probe = os.path.join(folder, f"{TEMPORARY}{processes.index()}-{name}")
  os.mkdir(probe)
  os.rmdir(probe)


class Payload:
  """Reads the arrays of one payload, whole or in part, through TensorStore.

  What is read is not verified.
  """

  def __init__(self, files: Files, pack: str):
    """Names a payload; nothing is read yet.

    Args:
      files: files of the repository.
      pack: `payloads/<uuid>`.
    """
    self._spec = files.spec(f"{pack}/{_STATE}")
    self._files = files
    self._path = files.path(pack)
    self._opened: dict[str, Any] = {}

  @functools.cached_property
  def _context(self) -> Any:
    import tensorstore as ts

    # One for each payload object: what is remembered of the disk goes with
    # it, so that a check sees the disk.
    nodes = {"cache_pool#nodes": {"total_bytes_limit": _NODES}}
    return ts.Context(nodes, getattr(self._files, "context", ts.Context()))

  def keys(self) -> set[str]:
    """Returns the names of the arrays.

    Raises:
      IntegrityError: if they cannot be listed.
    """
    import tensorstore as ts

    spec = {"driver": "ocdbt", "base": self._spec}
    try:
      store = ts.KvStore.open(spec, context=self._context).result()
      found = [key.decode() for key in store.list().result()]
    except _STORAGE_ERRORS as error:
      raise IntegrityError(
        f"payload {self._path} cannot be read: {_brief(error)}"
      ) from error
    tail = "/zarr.json"
    return {key.removesuffix(tail) for key in found if key.endswith(tail)}

  def open(self, keys: Iterable[str]) -> None:
    """Opens arrays side by side, before they are read one by one.

    Args:
      keys: names of the arrays.
    """
    import tensorstore as ts

    for key in keys:
      if key not in self._opened:
        spec = {
          "driver": "zarr3",
          "kvstore": {
            "driver": "ocdbt",
            "base": self._spec,
            "path": f"{key}/",
            # Index nodes are shared by all arrays and regions.
            "cache_pool": "cache_pool#nodes",
          },
          # Payloads never change.
          "recheck_cached_data": False,
          "recheck_cached_metadata": False,
        }
        # The future is kept: nobody waits for an array that nobody reads.
        self._opened[key] = ts.open(
          spec, open=True, read=True, context=self._context
        )

  def read(
    self,
    key: str,
    region: tuple[slice, ...] | None = None,
    out: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns an array, or a region of it.

    Args:
      key: name of the array.
      region: which part of it; None for all.
      out: where to put it, of the shape and dtype of the result.

    Raises:
      IntegrityError: if it cannot be read, or has another shape or dtype.
    """
    import tensorstore as ts

    self.open([key])
    try:
      array = self._opened[key].result()
      if region is not None:
        _check_region(key, region, array.shape)
        array = array[region][ts.d[:].translate_to[0]]
      if out is None:
        out = aligned(array.shape, array.dtype.numpy_dtype)
      if (array.dtype.numpy_dtype, array.shape) != (out.dtype, out.shape):
        raise ValueError(
          f"expected {out.dtype.name} of shape {out.shape}, found "
          f"{array.dtype.name} of shape {array.shape}"
        )
      ts.array(out).write(array).result()
      return out
    except _STORAGE_ERRORS as error:
      raise IntegrityError(
        f"payload {self._path}, array {key!r} cannot be read: {_brief(error)}"
      ) from error


def _check_region(
  key: str, region: tuple[slice, ...], shape: tuple[int, ...]
) -> None:
  if len(region) != len(shape) or any(
    s.stop > n for s, n in zip(region, shape)
  ):
    raise ValueError(
      f"the array {key!r} has the shape {shape}: it does not hold the region "
      f"{[(s.start, s.stop) for s in region]}"
    )


def _brief(error: BaseException) -> str:
  """Returns the first line of a message; TensorStore adds whole specs."""
  text = str(error).partition("[")[0].strip() or str(error)
  return (text.splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax's tracebacks of background threads off the user's screen.

  The error itself is raised, and reported once, by the caller.
  """

  def silent(record: logging.LogRecord) -> bool:
    return False

  # One for each who waits: several may, and end in any order.
  logger = logging.getLogger("absl")
  logger.addFilter(silent)
  try:
    yield
  finally:
    logger.removeFilter(silent)
