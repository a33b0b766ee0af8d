"""Export: a version for those who use other libraries."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from patchjax.interop import files, source, tensors

if TYPE_CHECKING:
  from patchjax.history import Repo


def export(
  repo: Repo,
  ref: str,
  path: str | os.PathLike[str],
  *,
  format: files.Format | None = None,
  only: Any = None,
  overwrite: bool = False,
  shard_bytes: int = tensors.SHARD,
) -> list[pathlib.Path]:
  """Writes a version as safetensors, npz, or a plain Orbax checkpoint.

  Leaf by leaf, each verified by its digest: a model larger than the memory
  can be exported to safetensors and npz.

  Args:
    repo: the repository.
    ref: the version.
    path: ends in `.safetensors` or `.npz`; without a suffix, the directory
      of a plain Orbax checkpoint to create.
    format: the format, where the suffix does not say it.
    only: which leaves to write (see `patchjax.select`).
    overwrite: whether an existing file may be replaced.
    shard_bytes: safetensors larger than this are split into shards, with an
      index as Hugging Face's libraries read it.

  Returns:
    The files or the directory that were written.

  Raises:
    FormatError: if the suffix names no format.
    FileExistsError: if `path` exists and may not be replaced.
    DtypeError: lists every leaf of a dtype that the format does not have.
    IntegrityError: if stored bits are missing or damaged.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> from patchjax.interop import read
    >>> with Repo.temporary() as repo, tempfile.TemporaryDirectory() as folder:
    ...   commit = repo.commit({"w": np.float32([1, 2])}, message="start")
    ...   (path,) = export(repo, "main", f"{folder}/model.safetensors")
    ...   read(path)
    {'w': array([1., 2.], dtype=float32)}
  """
  path, format = files.check_path(path, overwrite=overwrite, format=format)
  if format != "orbax":
    leaves = source.of_version(repo, ref, only)
    return files.write_source(path, format, leaves, shard_bytes=shard_bytes)
  if only is None:
    repo.export(ref, path)
  else:
    files.write(path, repo.checkout(ref, only=only), format=format)
  return [path]
