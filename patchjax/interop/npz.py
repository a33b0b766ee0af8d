"""npz: numpy's zip of arrays, without the pickles that numpy would allow."""

from __future__ import annotations

import pathlib
import tokenize
import zipfile
import zlib

import numpy as np

from patchjax.interop.source import Source
from patchjax.patches import storage
from patchjax.trees.dtypes import KINDS, from_words
from patchjax.trees.errors import DtypeError, FormatError
from patchjax.trees.suggest import list_names

# Bad zips, members that are encrypted or do not inflate, headers that do not
# parse or claim more than there is.
_ERRORS = (
  ArithmeticError,
  EOFError,
  MemoryError,
  RuntimeError,
  SyntaxError,
  ValueError,
  tokenize.TokenError,
  zipfile.BadZipFile,
  zlib.error,
)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of an npz by key.

  Args:
    path: the file.

  Raises:
    FormatError: if it is malformed, or holds Python objects or dtypes that
      npz does not keep.
  """
  arrays = {}
  try:
    with zipfile.ZipFile(path) as archive:
      # np.load would take a key "x.npy" for the file of "x".
      for member in archive.namelist():
        with archive.open(member) as file:
          arrays[member.removesuffix(".npy")] = np.lib.format.read_array(
            file, allow_pickle=False
          )
  except _ERRORS as error:
    raise FormatError(
      f"{path} is not a readable npz of plain arrays ({error})"
    ) from error
  for key, array in arrays.items():
    if array.dtype.kind == "V":
      raise FormatError(
        f"{path}: {key!r} is of the unknown dtype {array.dtype}; npz does "
        "not keep bfloat16 and its like: save it as safetensors"
      )
  return arrays


def check(path: pathlib.Path, source: Source) -> None:
  """Refuses what the format cannot hold.

  Args:
    path: the file to write, for messages.
    source: the leaves.

  Raises:
    DtypeError: lists every leaf of a dtype that numpy itself does not have.
  """
  odd = {
    name: entry.dtype
    for name, entry in source.entries.items()
    if entry.dtype not in KINDS or KINDS[entry.dtype].dtype.isbuiltin != 1
  }
  if odd:
    raise DtypeError(
      f"{path}: npz has no {', '.join(sorted(set(odd.values())))} (leaves "
      f"{list_names(odd)}); write .safetensors or an Orbax directory (a path "
      "without a suffix), commit the tree to a repository, which holds it, "
      "or leave these leaves out"
    )


def write(path: pathlib.Path, source: Source) -> None:
  """Writes leaves one by one.

  Args:
    path: the file.
    source: the leaves.
  """
  with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
    # np.savez would take a leaf called "file" for its own argument.
    for name, words in source.stream(list(source.entries)):
      array = from_words(words, source.entries[name].dtype)
      with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
