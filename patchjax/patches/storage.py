"""Files on disk: replaced whole or not at all; safetensors mapped unread."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import safetensors

from patchjax.trees.errors import FormatError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """Yields a file that takes the place of `path` if nothing goes wrong.

  Args:
    path: the file to write; whatever happens, it is the old one or the new.

  Example:
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   with replacing(f"{folder}/a") as file:
    ...     _ = file.write(b"whole")
    ...   os.listdir(folder)
    ['a']
  """
  path = pathlib.Path(path)
  file = tempfile.NamedTemporaryFile(
    dir=path.parent, prefix=f".{path.name}.", delete=False
  )
  try:
    with file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    # The temporary file is its owner's alone; the new one is as public as any
    # other that the user makes.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(file.name, 0o666 & ~umask)
    os.replace(file.name, path)
  finally:
    pathlib.Path(file.name).unlink(missing_ok=True)


def open_safetensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the header of a safetensors file, and its data as mapped bytes.

  Args:
    path: the file.

  Raises:
    FormatError: if it is not well formed, or truncated.
    OSError: if it cannot be read.
  """
  try:
    # The reference reader refuses overlaps, holes and wrong sizes.
    with safetensors.safe_open(path, framework="numpy"):
      pass
  except safetensors.SafetensorError as error:
    raise FormatError(
      f"{path}: truncated, or not a safetensors file ({error}); get the "
      "file again"
    ) from error
  whole = np.memmap(path, np.uint8, mode="r")
  size = int.from_bytes(whole[:8].tobytes(), "little")
  return json.loads(whole[8 : 8 + size].tobytes()), whole[8 + size :]
