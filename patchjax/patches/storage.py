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

from patchjax.trees.dtypes import KINDS
from patchjax.trees.errors import FormatError
from patchjax.trees.suggest import list_names

INDEX = ".safetensors.index.json"
"""How the name of the index of a model in shards ends."""

# safetensors' codes; the format has none for other fp8 variants and 4-bit
# integers.
CODES: dict[str, str] = {
  "BOOL": "bool",
  "U8": "uint8",
  "I8": "int8",
  "U16": "uint16",
  "I16": "int16",
  "U32": "uint32",
  "I32": "int32",
  "U64": "uint64",
  "I64": "int64",
  "F16": "float16",
  "BF16": "bfloat16",
  "F32": "float32",
  "F64": "float64",
  "C64": "complex64",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E8M0": "float8_e8m0fnu",
  "F8_E4M3FNUZ": "float8_e4m3fnuz",
  "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


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
  try:
    file = tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f".{path.name[:99]}.", delete=False
    )
  except OSError as error:
    # Name the file that was asked for, not one that nobody knows.
    raise type(error)(error.errno, error.strerror, str(path)) from error
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


def safe_open(path: str | os.PathLike[str]) -> Any:
  """Returns the reference reader of a safetensors file, opened.

  Args:
    path: the file.

  Raises:
    SafetensorError: if it is not well formed.
    OSError: if it cannot be read.
  """
  with open(path, "rb"):
    pass  # the reader says "no such file" whatever is wrong
  return safetensors.safe_open(path, framework="numpy")


def header_of(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
  """Returns the header of a safetensors file, and where its data begin.

  Args:
    path: the file.

  Raises:
    FormatError: if it is not well formed, or truncated.
    OSError: if it cannot be read.
  """
  try:
    # The reference reader refuses overlaps, holes and wrong sizes.
    with safe_open(path):
      pass
  except safetensors.SafetensorError as error:
    raise FormatError(
      f"{path}: truncated, or not a safetensors file ({error}); get the "
      "file again"
    ) from error
  with open(path, "rb") as file:
    size = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(size)), 8 + size


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
  header, start = header_of(path)
  return header, np.memmap(path, np.uint8, mode="r")[start:]


def header_bytes(header: dict[str, Any]) -> bytes:
  """Returns a header as it stands at the beginning of a file.

  Args:
    header: its entries.
  """
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def places_of(index: pathlib.Path) -> dict[str, str]:
  """Returns what the index of a model in shards says: its keys' file names.

  Args:
    index: the file `*.safetensors.index.json`.

  Raises:
    FormatError: if it is malformed, or a shard is missing.
    OSError: if it cannot be read.
  """
  try:
    places = json.loads(index.read_bytes())["weight_map"]
    shards = sorted(set(places.values()))
    sound = all(name == os.path.basename(name) != "" for name in shards)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise FormatError(
      f"{index}: expected the index of a sharded safetensors model, JSON with "
      f"a weight_map of keys to file names ({error})"
    ) from error
  if not sound:
    raise FormatError(f"{index}: names files outside of its folder")
  if absent := [n for n in shards if not (index.parent / n).is_file()]:
    raise FormatError(
      f"{index}: {len(absent)} of {len(shards)} shards are missing: "
      f"{list_names(absent)}; get them, into the same folder"
    )
  return places


def check_places(index: pathlib.Path, places: Any, found: Any) -> None:
  """Refuses shards that do not hold what their index says.

  Args:
    index: the file, for messages.
    places: from `places_of`.
    found: the keys that each shard holds, by file name.

  Raises:
    FormatError: lists the keys.
  """
  bad: set[str] = set()
  for name, keys in found.items():
    bad |= {key for key, place in places.items() if place == name} ^ set(keys)
  if bad:
    raise FormatError(
      f"{index}: {len(bad)} keys are not where it says: "
      f"{list_names(sorted(bad))}; get index and shards of one model again"
    )


def dtype_of(
  path: str | os.PathLike[str], key: str, tensor: dict[str, Any]
) -> np.dtype:
  """Returns the dtype of one array of a safetensors file.

  Args:
    path: the file, for messages.
    key: the array's key.
    tensor: its entry in the header.

  Raises:
    FormatError: if JAX does not have it.
  """
  if tensor["dtype"] not in CODES:
    raise FormatError(
      f"{path}: {key!r} is of dtype {tensor['dtype']}, which JAX does not "
      f"have; known are {', '.join(CODES)}"
    )
  return KINDS[CODES[tensor["dtype"]]].dtype


def view(
  path: str | os.PathLike[str], key: str, tensor: dict[str, Any], data: Any
) -> np.ndarray:
  """Returns one array of a safetensors file, as a view of the mapped bytes.

  Args:
    path: the file, for messages.
    key: the array's key.
    tensor: its entry in the header.
    data: the bytes after the header.

  Raises:
    FormatError: if it is of a dtype that JAX does not have.
  """
  dtype = dtype_of(path, key, tensor)
  begin, end = tensor["data_offsets"]
  return np.asarray(data[begin:end]).view(dtype).reshape(tensor["shape"])
