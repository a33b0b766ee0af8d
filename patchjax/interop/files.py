"""Parameters in files that others write: safetensors, npz, plain Orbax.

Nothing is unpickled: an npz with Python objects inside is refused. In the
flat formats a key is a text name (`dense/kernel` is the leaf `kernel` in
`dense`), so what `save_params` writes comes back as the same nested dict.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from patchjax.patches import storage
from patchjax.patches.files import is_patch_file
from patchjax.trees.dtypes import KINDS, host, is_array
from patchjax.trees.errors import DtypeError, FormatError, StructureError
from patchjax.trees.names import join, named_leaves, nested, split
from patchjax.trees.suggest import list_names

SUFFIXES = (".safetensors", ".npz")

# Bad zips, members that are encrypted or do not inflate, headers that do not
# parse or claim more than there is.
_NPZ_ERRORS = (
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


def load_params(path: str | os.PathLike[str]) -> Any:
  """Reads parameters from a file, or from an Orbax checkpoint directory.

  Args:
    path: a `.safetensors` or `.npz` file, or the directory of an Orbax
      checkpoint (any, not only patchjax's).

  Returns:
    Nested dicts of host arrays; for Orbax what Orbax rebuilds. Arrays of a
    safetensors file are views of a read-only memory map. Keys are read as
    text names; if one of them is none (haiku writes `mlp/~/linear`), all are
    cut at their slashes.

  Raises:
    FormatError: if the file is malformed, truncated, of another format, or
      holds what is no array.
    StructureError: if it is empty or its keys collide.
    OSError: if it cannot be opened.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f"{folder}/params.npz"
    ...   save_params(path, {"dense": {"bias": np.ones(2, np.float32)}})
    ...   load_params(path)
    {'dense': {'bias': array([1., 1.], dtype=float32)}}
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or directory")
  if path.is_dir():
    from patchjax.history import payloads

    params = payloads.load_tree(str(path.resolve()))
  elif is_patch_file(path):
    raise FormatError(
      f"{path} is a patch, expected parameters; apply it to its base, or "
      "commit it"
    )
  elif path.suffix == ".npz":
    params = _nest(_read_npz(path))
  elif path.suffix == ".safetensors":
    params = _nest(read_safetensors(path)[0])
  else:
    raise FormatError(
      f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, or the "
      "directory of an Orbax checkpoint; save the parameters as one of these"
    )
  named = named_leaves(params)
  wrong = [name for name, leaf in named.items() if not is_array(leaf)]
  if wrong:
    raise FormatError(
      f"{path}: {len(wrong)} leaves are no arrays: {', '.join(wrong[:6])}; "
      "save the parameters alone"
    )
  if not named:
    raise StructureError(f"{path} holds no arrays")
  return params


def save_params(
  path: str | os.PathLike[str], params: Any, *, overwrite: bool = False
) -> None:
  """Writes parameters to a file, or as an Orbax checkpoint directory.

  The path is written in one step at the end: it never holds half a file.

  Args:
    path: ends in `.safetensors` or `.npz`; without a suffix, the directory
      of a plain Orbax checkpoint to create.
    params: any pytree of arrays. Container types are not stored: it comes
      back as nested dicts.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if `path` exists and may not be replaced.
    DtypeError: if the format has no code for the dtype of a leaf.
    StructureError: if the tree is empty or ambiguous.

  Example:
    >>> save_params("params.txt", {"w": np.ones(2)})
    Traceback (most recent call last):
    ...
    patchjax.trees.errors.FormatError: params.txt: expected a name ending ...
  """
  path = pathlib.Path(path)
  named = {k: v for k, v in named_leaves(params).items() if is_array(v)}
  if not named:
    raise StructureError(f"nothing to write to {path}: the tree has no arrays")
  if path.suffix not in ("", *SUFFIXES):
    raise FormatError(
      f"{path}: expected a name ending in {' or '.join(SUFFIXES)}, or "
      "without a suffix for an Orbax checkpoint"
    )
  if path.exists() and not (overwrite and path.is_file()):
    raise FileExistsError(
      f"{path} exists; choose another name"
      + (" or overwrite it" if path.is_file() else "")
    )
  if not path.suffix:
    from patchjax.history import payloads

    arrays = {name: _plain(name, leaf) for name, leaf in named.items()}
    _check_orbax(path, arrays)
    payloads.save(str(path.resolve()), nested(arrays))
  elif path.suffix == ".npz":
    arrays = {name: _plain(name, leaf) for name, leaf in named.items()}
    odd = [k for k, x in arrays.items() if x.dtype.isbuiltin != 1]
    if odd:
      raise DtypeError(
        f"{path}: npz has no {arrays[odd[0]].dtype} (leaf {odd[0]!r}); "
        "write .safetensors or an Orbax directory"
      )
    with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
      # np.savez would take a leaf called "file" for its own argument.
      for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
          np.lib.format.write_array(member, array, allow_pickle=False)
  else:
    with storage.replacing(path) as file:
      _write_safetensors(file, named)


def read_safetensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays of a safetensors file by key, and its metadata.

  Args:
    path: the file.

  Returns:
    `({key: array}, metadata)`; arrays are views of a read-only memory map.

  Raises:
    FormatError: if the file is malformed or truncated, or has a dtype that
      JAX does not.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f"{folder}/a.safetensors"
    ...   save_params(path, {"w": np.int8([1, 2])})
    ...   read_safetensors(path)[0]["w"].tolist()
    [1, 2]
  """
  header, data = storage.open_safetensors(path)
  metadata = header.pop("__metadata__", {})
  arrays = {
    key: storage.view(path, key, tensor, data) for key, tensor in header.items()
  }
  return arrays, metadata


def _write_safetensors(file: IO[bytes], named: Mapping[str, Any]) -> None:
  if "__metadata__" in named:
    raise StructureError(
      "'__metadata__' is no name for a leaf in safetensors; rename it"
    )
  codes = {dtype: code for code, dtype in storage.CODES.items()}
  found = {name: host(leaf) for name, leaf in named.items()}
  header, end = {}, 0
  # Wide words first, so that every array is aligned in a memory map.
  order = sorted(found, key=lambda name: -found[name][0].dtype.itemsize)
  for name in order:
    words, dtype = found[name]
    if dtype not in codes:
      raise DtypeError(
        f"leaf {name!r}: safetensors has no {dtype}; write an Orbax "
        "directory, or commit the tree to a repository, which holds it"
      )
    begin, end = end, end + words.nbytes
    header[name] = {
      "dtype": codes[dtype],
      "shape": list(np.shape(named[name])),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  file.write(len(text).to_bytes(8, "little") + text)
  for name in order:
    file.write(np.ascontiguousarray(found[name][0]).data)


def _check_orbax(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Refuses what Orbax would lose in silence, or choke on."""
  # It joins the keys of a path by dots.
  dotted: dict[str, list[str]] = collections.defaultdict(list)
  for name in arrays:
    dotted[".".join(split(name))].append(name)
  bad = [name for names in dotted.values() if len(names) > 1 for name in names]
  why = "are one name to Orbax"
  if not bad:
    bad = [name for name, array in arrays.items() if not array.size]
    why = "have no entries, which Orbax cannot hold"
  if bad:
    raise StructureError(
      f"{path}: the leaves {list_names(bad)} {why}; write .safetensors"
    )


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  arrays = {}
  try:
    with zipfile.ZipFile(path) as archive:
      # np.load would take a key "x.npy" for the file of "x".
      for member in archive.namelist():
        with archive.open(member) as file:
          arrays[member.removesuffix(".npy")] = np.lib.format.read_array(
            file, allow_pickle=False
          )
  except _NPZ_ERRORS as error:
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


def _nest(arrays: Mapping[str, np.ndarray]) -> Any:
  try:
    for key in arrays:
      split(key)
    named = dict(arrays)
  except StructureError:
    named = {join(key.split("/")): array for key, array in arrays.items()}
  return nested(named)


def _plain(name: str, leaf: Any) -> np.ndarray:
  _, dtype = host(leaf)
  if dtype not in KINDS:
    raise DtypeError(
      f"leaf {name!r} holds PRNG keys ({dtype}), which only a repository "
      "keeps; leave it out, or save jax.random.key_data of it"
    )
  return np.asarray(leaf)
