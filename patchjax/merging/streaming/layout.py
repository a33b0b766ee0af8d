"""What will be written where: shards, their headers, and portions of them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.merging.streaming.models import nbytes
from patchjax.patches import storage
from patchjax.trees.dtypes import dtype_name
from patchjax.trees.errors import DtypeError
from patchjax.trees.suggest import list_names

SHARD = 5 << 30  # bytes; what Hugging Face's libraries write
PORTION = 1 << 30
"""Bytes after which what is written is made to stay."""

_CODES = {name: code for code, name in storage.CODES.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of the result.

  Attributes:
    path: where it will be.
    header: its first bytes.
    names: the leaves in it, in order.
    ends: bytes of the file up to the end of each.
  """

  path: pathlib.Path
  header: bytes
  names: tuple[str, ...]
  ends: tuple[int, ...]

  def portions(self) -> list[tuple[tuple[str, ...], int]]:
    """Returns the leaves in groups, with the bytes up to each group's end."""
    groups: list[tuple[tuple[str, ...], int]] = []
    names: list[str] = []
    start = len(self.header)
    for name, end in zip(self.names, self.ends, strict=True):
      names.append(name)
      if end - start >= PORTION or name is self.names[-1]:
        groups.append((tuple(names), end))
        names, start = [], end
    return groups


@dataclasses.dataclass(frozen=True)
class Layout:
  """The files of the result.

  Attributes:
    shards: the files that hold the leaves.
    index: where the index is written; None for a model in one file.
    places: file name of each key.
    total: bytes of the arrays.
    target: what was asked for: a file, or a folder.
    work: the folder in which the files grow.
    older: an index that may be there already, of what is replaced.
  """

  shards: tuple[Shard, ...]
  index: pathlib.Path | None
  places: Mapping[str, str]
  total: int
  target: pathlib.Path
  work: pathlib.Path
  older: pathlib.Path

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(shard.ends[-1] for shard in self.shards)

  def index_bytes(self) -> bytes:
    """Returns the text of the index."""
    text = {
      "metadata": {"total_size": self.total},
      "weight_map": dict(self.places),
    }
    return json.dumps(text, indent=2, ensure_ascii=False).encode()


def layout_of(
  out: pathlib.Path,
  leaves: Mapping[str, Any],
  keys: Mapping[str, str],
  metadata: Mapping[str, str],
  shard_bytes: int | None,
) -> Layout:
  """Returns where the leaves of the result go.

  Args:
    out: a name ending in `.safetensors`, or a folder, which gets
      `model.safetensors` or shards of it.
    leaves: shapes and dtypes by text name, in order.
    keys: what the files call them.
    metadata: texts for every file.
    shard_bytes: bytes of a shard at most, unless a leaf is larger; None for
      5 GiB in a folder, and for one file if a file is asked for.

  Raises:
    DtypeError: lists every leaf of a dtype that the format does not have.
  """
  check_dtypes(out, leaves)
  single = out.suffix == ".safetensors" and not out.is_dir()
  if shard_bytes is None and not single:
    shard_bytes = SHARD
  whole = out if single else out / "model.safetensors"
  work = whole.with_name(f".{whole.name.removesuffix('.safetensors')}.merging")
  groups = _cut(leaves, shard_bytes)
  stem = whole.name.removesuffix(".safetensors")
  shards = []
  places: dict[str, str] = {}
  for i, names in enumerate(groups, 1):
    name = f"{stem}-{i:05}-of-{len(groups):05}.safetensors"
    path = whole if len(groups) == 1 else whole.with_name(name)
    shards.append(_shard(path, names, leaves, keys, metadata))
    places |= {keys[name]: path.name for name in names}
  older = whole.with_name(stem + storage.INDEX)
  return Layout(
    shards=tuple(shards),
    index=None if len(groups) == 1 else older,
    places=places,
    total=sum(map(nbytes, leaves.values())),
    target=out,
    work=work,
    older=older,
  )


def check_dtypes(out: Any, leaves: Mapping[str, Any]) -> None:
  """Refuses what safetensors cannot hold.

  Args:
    out: the file to write, for messages.
    leaves: shapes and dtypes by name.

  Raises:
    DtypeError: lists every leaf of such a dtype.
  """
  odd = {n: dtype_name(x) for n, x in leaves.items()}
  odd = {n: dtype for n, dtype in odd.items() if dtype not in _CODES}
  if odd:
    raise DtypeError(
      f"{out}: safetensors has no {', '.join(sorted(set(odd.values())))} "
      f"(leaves {list_names(odd)}); merge parameters without these leaves"
    )


def _cut(leaves: Mapping[str, Any], limit: int | None) -> list[list[str]]:
  groups: list[list[str]] = [[]]
  size = 0
  for name, like in leaves.items():
    more = nbytes(like)
    if limit is not None and groups[-1] and size + more > limit:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += more
  return groups


def _shard(
  path: pathlib.Path,
  names: Sequence[str],
  leaves: Mapping[str, Any],
  keys: Mapping[str, str],
  metadata: Mapping[str, str],
) -> Shard:
  header: dict[str, Any] = {}
  if metadata:
    header["__metadata__"] = dict(metadata)
  ends = []
  end = 0
  for name in names:
    begin, end = end, end + nbytes(leaves[name])
    header[keys[name]] = {
      "dtype": _CODES[dtype_name(leaves[name])],
      "shape": list(leaves[name].shape),
      "data_offsets": [begin, end],
    }
    ends.append(end)
  head = storage.header_bytes(header)
  ends = tuple(len(head) + end for end in ends)
  return Shard(path, head, tuple(names), ends)


def parse_size(text: str | int) -> int:
  """Returns the bytes that a text such as `5GB` or `512MiB` means.

  Args:
    text: a number, with a unit or without.

  Raises:
    ValueError: if it is none.

  Example:
    >>> parse_size("5GB"), parse_size("512MiB"), parse_size(1000)
    (5000000000, 536870912, 1000)
  """
  if isinstance(text, int):
    return text
  plain = text.strip().upper().removesuffix("B")
  steps = 1000
  if plain.endswith("I"):
    plain, steps = plain[:-1], 1024
  power = "KMGT".find(plain[-1:]) + 1 if plain[-1:].isalpha() else 0
  number = plain[:-1] if power else plain
  try:
    size = int(float(number) * steps**power)
  except ValueError:
    size = 0
  if size < 1:
    raise ValueError(f"expected a size such as 5GB or 512MiB, found {text!r}")
  return size


def dtype_named(name: Any) -> np.dtype | None:
  """Returns the dtype of an option: floating point, known to safetensors.

  Args:
    name: a name, a dtype, or None.

  Raises:
    ValueError: if it is not one.
  """
  if name is None:
    return None
  from patchjax.trees.dtypes import KINDS

  text = name if isinstance(name, str) else np.dtype(name).name
  kind = KINDS.get(text)
  if kind is None or not kind.floating or kind.words != 1 or text not in _CODES:
    known = [n for n in _CODES if KINDS[n].floating and KINDS[n].words == 1]
    raise ValueError(f"expected one of {', '.join(known)}; found {text!r}")
  return kind.dtype
