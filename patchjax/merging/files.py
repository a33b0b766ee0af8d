"""merge_files: merges of models that do not fit in memory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.merging import inputs
from patchjax.merging.running import check_reducing
from patchjax.patches import engine, files, leafwise, storage
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import host
from patchjax.trees.errors import BaseMismatchError, StructureError
from patchjax.trees.names import join, nested, split


@dataclasses.dataclass(frozen=True)
class _File:
  """A safetensors file: views of its arrays by text name, in file order."""

  header: dict[str, Any]
  arrays: dict[str, np.ndarray]


def merge_files(
  base: str | os.PathLike[str],
  contributors: Sequence[str | os.PathLike[str]],
  method: Transform,
  out: str | os.PathLike[str],
  *,
  state: Any = None,
  only: Any = None,
) -> None:
  """Merges safetensors files into a safetensors file, leaf by leaf.

  The files are mapped, not read: a pass goes over the leaves once, and only
  the arrays of the leaf at hand are in memory. The numbers are those that
  `merge` gives for the loaded parameters, bit for bit.

  Args:
    base: file of the base's parameters.
    contributors: files of parameters, or patch files on the base.
    method: a transform with a reducing step.
    out: the file to write; replaced as a whole, or not at all. It gets the
      base's keys, metadata and order.
    state: see `merge`.
    only: selector of the leaves to merge, on text names; the others stay the
      base's.

  Raises:
    BaseMismatchError: if a patch file was made for another base.
    FormatError: if a file is malformed or truncated.
    MismatchError: if a file does not fit the base; lists every leaf.
    NonFiniteError: if NaN or Inf is found; `out` is not written then.
    OSError: if a file cannot be read or written.

  Example:
    >>> import tempfile, numpy as np, patchjax as pj
    >>> from patchjax.interop.files import read, write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   paths = [f"{folder}/{i}.safetensors" for i in range(4)]
    ...   for path, x in zip(paths, (0, 1, 3)):
    ...     write(path, {"w": np.float32([x])})
    ...   merge_files(paths[0], paths[1:3], pj.merging.linear(), paths[3])
    ...   read(paths[3])["w"].tolist()
    [2.0]
  """
  check_reducing(method, len(contributors))
  old = _open(base)
  if not old.arrays:
    raise StructureError(f"{base}: the file holds no arrays")
  given = [_contributor(path, base, old) for path in contributors]
  sources = inputs.sources_of(
    old.arrays, [g if isinstance(g, Patch) else nested(g.arrays) for g in given]
  )
  floats = inputs.floats_of(old.arrays, only)
  inputs.check_narrow(floats)
  rest = [name for name in old.arrays if name not in floats]
  agreed = inputs.agreed(old.arrays, sources, rest) if only is None else {}
  results = engine.run(
    method,
    state,
    _leaves(floats, sources, engine.in_params(method, True)),
    {name: tuple(x.shape) for name, x in floats.items()},
    contributors=len(sources),
    as_params=True,
    streamed=True,
  )
  merged = {n for n in floats if any(n in source for source in sources)}
  with storage.replacing(out) as file:
    header = json.dumps(
      old.header, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for name, array in old.arrays.items():
      if name in merged:
        _, result = next(results)
      else:
        result = agreed.get(name, array)
      file.write(np.ascontiguousarray(host(result)[0]).data)
    # The last check is after the last leaf: before the file takes its place.
    for _ in results:
      raise AssertionError("more results than leaves")


def _leaves(
  floats: Mapping[str, np.ndarray],
  sources: Sequence[Mapping[str, Any]],
  params: bool,
) -> dict[str, Any]:
  def fetch(name: str) -> leafwise.Work:
    base = floats[name]
    given = (source.get(name) for source in sources)
    return leafwise.Work(
      base,
      tuple(
        leafwise.held_dense(base, one, params=params)
        if isinstance(one, Delta)
        else one
        for one in given
      ),
    )

  return {
    name: lambda name=name: fetch(name)
    for name in floats
    if any(name in source for source in sources)
  }


def _open(path: str | os.PathLike[str]) -> _File:
  header, data = storage.open_safetensors(path)
  tensors = sorted(
    (item for item in header.items() if item[0] != "__metadata__"),
    key=lambda item: item[1]["data_offsets"],
  )
  keys = _names([key for key, _ in tensors])
  arrays = {
    keys[key]: storage.view(path, key, tensor, data) for key, tensor in tensors
  }
  return _File(header, arrays)


def _names(keys: Sequence[str]) -> dict[str, str]:
  """Text names of keys; cut at slashes where they are none (haiku)."""
  try:
    for key in keys:
      split(key)
  except StructureError:
    return {key: join(key.split("/")) for key in keys}
  return {key: key for key in keys}


def _contributor(
  path: str | os.PathLike[str], base: str | os.PathLike[str], old: _File
) -> Any:
  if not files.is_patch_file(path):
    found = _open(path)
    check_named(old.arrays, found.arrays, what=f"{path}")
    return found
  patch = Patch.load(path)
  if patch.base is not None:
    from patchjax.trees.digest import tree_id

    digest = tree_id(nested(old.arrays))
    if digest != patch.base:
      raise BaseMismatchError(
        f"{path} was made for {patch.base[:12]}, and {base} is "
        f"{digest[:12]}; merge it with its own base"
      )
  return patch
