"""Parameters in files that others write, and files that others read.

`read` looks at what is in a file, not at its name; `write` goes by the name.
Nothing is ever unpickled. In the flat formats a key is a text name
(`dense/kernel` is the leaf `kernel` in `dense`), so what `write` writes comes
back as the same nested dict.
"""

from __future__ import annotations

import collections
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from patchjax.history import Record
from patchjax.history.arrays import state
from patchjax.interop import msgpack, npz, orbax, source, tensors
from patchjax.patches.files import is_patch_file
from patchjax.trees.dtypes import KINDS, host, is_array, is_number
from patchjax.trees.errors import DtypeError, FormatError, StructureError
from patchjax.trees.names import flatten, join, nested, split
from patchjax.trees.suggest import list_names

Format = Literal["safetensors", "npz", "orbax"]

SUFFIXES: dict[str, Format] = {
  ".safetensors": "safetensors",
  ".npz": "npz",
  "": "orbax",
}

_EXPECTED = (
  "expected safetensors (one file, or the index of shards), npz, flax's "
  "msgpack, or the directory of an Orbax checkpoint"
)
# Formats that are known, and not read.
_STRANGERS = {
  b"\x93NUMPY": "a single numpy array; save named arrays with numpy.savez",
  b"\x89HDF": "HDF5; load it with its own library and save safetensors",
  b"GGUF": "GGUF; convert it to safetensors with its own tools",
  **{
    bytes([0x80, protocol]): "a pickle, which can run any program when it is "
    "loaded; where you trust it, load it and save safetensors"
    for protocol in range(2, 6)
  },
}
_HEAD = 16  # bytes that tell a format


def read(path: str | os.PathLike[str]) -> Any:
  """Reads parameters, or a train state, from files of other libraries.

  Args:
    path: safetensors (one file; an index of shards, or the folder with one),
      `.npz`, flax's msgpack, or the directory of an Orbax checkpoint (v0 and
      v1, any, not only patchjax's). The content decides, not the name.

  Returns:
    Nested dicts of host arrays; for Orbax what Orbax rebuilds. Arrays of a
    safetensors file are views of a read-only memory map. Python numbers stay
    such, texts and bytes become `Record`s: `Repo.commit` takes them all. Keys
    are read as text names; if one of them is none (haiku writes
    `mlp/~/linear`), all are cut at their slashes.

  Raises:
    FormatError: if it is malformed, truncated, of another format, or holds
      what is no data.
    StructureError: if it is empty or its keys collide.
    OSError: if it cannot be opened.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f"{folder}/params.npz"
    ...   write(path, {"dense": {"bias": np.ones(2, np.float32)}})
    ...   read(path)
    {'dense': {'bias': array([1., 1.], dtype=float32)}}
  """
  path = pathlib.Path(path)
  if not path.exists():
    shards = tensors.index_of(path)
    if path.suffix != ".safetensors" or not shards.exists():
      raise FileNotFoundError(f"{path}: no such file or directory")
    path = shards
  found = _read_folder(path) if path.is_dir() else _read_file(path)
  named, treedef = flatten(found)
  for name, leaf in named.items():
    if isinstance(leaf, str | bytes):
      named[name] = Record(leaf)
  wrong = [
    name
    for name, leaf in named.items()
    if not (is_array(leaf) or is_number(leaf) or isinstance(leaf, Record))
  ]
  if wrong:
    raise FormatError(
      f"{path}: {len(wrong)} leaves are no arrays: {list_names(wrong)}; "
      "save the parameters alone"
    )
  if not named:
    raise StructureError(f"{path} holds no arrays")
  import jax

  return jax.tree.unflatten(treedef, named.values())


def _read_file(path: pathlib.Path) -> Any:
  if is_patch_file(path):
    raise FormatError(
      f"{path} is a patch, expected parameters; apply it to its base, or "
      "commit it"
    )
  with open(path, "rb") as file:
    head = file.read(_HEAD)
  kind = _kind(head, path)
  match kind:
    case "safetensors":
      return _nest(tensors.read_safetensors(path)[0])
    case "index":
      return _nest(tensors.read_sharded(path))
    case "npz":
      return _nest(npz.read(path))
    case "msgpack":
      return msgpack.read(path)
  raise FormatError(f"{path}: {_EXPECTED}; found {kind}")


def _kind(head: bytes, path: pathlib.Path) -> str:
  """Returns the format that a file begins like, or what it is instead."""
  for start, what in _STRANGERS.items():
    if head.startswith(start):
      return what
  if head[:2] == b"PK":
    return _kind_of_zip(path)
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
    return "safetensors"
  if head[:1] == b"{":
    return "index"
  # A map of msgpack; a pickle starts so too, and was told apart above.
  if head[:1] and (head[0] in (0xDE, 0xDF) or 0x80 <= head[0] <= 0x8F):
    return "msgpack"
  # Damaged from the first byte on: the name is all there is to go by, and the
  # reader says what is wrong.
  by_name = {".safetensors": "safetensors", ".npz": "npz"}
  by_name |= {".msgpack": "msgpack"}
  return by_name.get(path.suffix, f"the bytes {head[:8]!r}")


def _kind_of_zip(path: pathlib.Path) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.namelist()
  except (zipfile.BadZipFile, OSError, ValueError):
    return "npz"  # whose reader says what is wrong
  if any(name.endswith("data.pkl") for name in members):
    return (
      "a checkpoint of PyTorch, which is a pickle; where you trust it, load "
      "it and save safetensors"
    )
  return "npz"


def _read_folder(path: pathlib.Path) -> Any:
  if orbax.is_checkpoint(path):
    return orbax.read(path)
  indices = sorted(path.glob(f"*{tensors.INDEX}"))
  files = sorted(path.glob("*.safetensors"))
  if len(indices) == 1:
    return _nest(tensors.read_sharded(indices[0]))
  if not indices and len(files) == 1:
    return _read_file(files[0])
  if indices or files:
    found = list_names(p.name for p in indices or files)
    raise FormatError(f"{path} holds several models: {found}; name one of them")
  if numbers := [str(step.number) for step in orbax.steps(path)]:
    raise FormatError(
      f"{path} holds the {len(numbers)} steps {list_names(numbers)} of a "
      "training run; import all of them (`patchjax import`, "
      "patchjax.interop.import_), or name the folder of one"
    )
  if (path / "patchjax.json").exists():
    raise FormatError(
      f"{path} is a repository; name a version in it: Repo(path).checkout(ref)"
    )
  raise FormatError(
    f"{path} is not a readable Orbax checkpoint: {_EXPECTED}; found a folder "
    "with " + list_names(sorted(child.name for child in path.iterdir()))
  )


def write(
  path: str | os.PathLike[str],
  params: Any,
  *,
  format: Format | None = None,
  overwrite: bool = False,
) -> None:
  """Writes parameters to a file, or as an Orbax checkpoint directory.

  The path is written in one step at the end: it never holds half a file.

  Args:
    path: ends in `.safetensors` or `.npz`; without a suffix, the directory
      of a plain Orbax checkpoint to create.
    params: any pytree of arrays. Container types are not stored: it comes
      back as nested dicts, Python numbers as arrays without axes.
    format: the format, where the suffix does not say it.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if `path` exists and may not be replaced.
    DtypeError: if the format has no code for the dtype of a leaf.
    StructureError: if the tree is empty or ambiguous.

  Example:
    >>> write("params.txt", {"w": np.ones(2)})
    Traceback (most recent call last):
    ...
    patchjax.trees.errors.FormatError: params.txt: expected a name ending ...
  """
  leaves = source.of_tree(params)
  if not leaves.entries:
    raise StructureError(f"nothing to write to {path}: the tree has no arrays")
  path, format = check_path(path, overwrite=overwrite, format=format)
  if format != "orbax":
    write_source(path, format, leaves)
    return
  from patchjax.history.arrays import payloads

  held = state.arrays(flatten(params)[0])
  arrays = {k: _plain(k, leaf) for k, leaf in held.items() if is_array(leaf)}
  _check_orbax(path, arrays)
  payloads.save(str(path.resolve()), nested(arrays))


def check_path(
  path: str | os.PathLike[str],
  *,
  overwrite: bool,
  format: Format | None = None,
) -> tuple[pathlib.Path, Format]:
  """Returns a path that can be written, and the format to write.

  Args:
    path: see `write`.
    overwrite: see `write`.
    format: the format, whatever the suffix.

  Raises:
    FormatError: if the suffix names no format.
    FileExistsError: if it exists and may not be replaced.
  """
  path = pathlib.Path(path)
  if format is None and path.suffix not in SUFFIXES:
    known = " or ".join(suffix for suffix in SUFFIXES if suffix)
    raise FormatError(
      f"{path}: expected a name ending in {known}, or without a suffix for an "
      "Orbax checkpoint"
    )
  format = format or SUFFIXES[path.suffix]
  replaceable = overwrite and path.is_file() and format != "orbax"
  if path.exists() and not replaceable:
    raise FileExistsError(
      f"{path} exists; choose another name"
      + (" or overwrite it" if path.is_file() else "")
    )
  return path, format


def write_source(
  path: pathlib.Path,
  format: Format,
  leaves: source.Source,
  *,
  shard_bytes: int = tensors.SHARD,
) -> list[pathlib.Path]:
  """Writes leaves to a flat file, or several; returns what was written.

  Args:
    path: what `check_path` returned.
    format: "safetensors" or "npz".
    leaves: the leaves.
    shard_bytes: see `tensors.write`.

  Raises:
    DtypeError: lists every leaf of a dtype that the format does not have.
  """
  if format == "npz":
    npz.check(path, leaves)
    npz.write(path, leaves)
    return [path]
  tensors.check(path, leaves)
  return tensors.write(path, leaves, shard_bytes=shard_bytes)


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
