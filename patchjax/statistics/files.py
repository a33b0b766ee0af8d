"""Statistics on disk: one safetensors file beside a patch, bound to it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from patchjax.patches import files as patch_files
from patchjax.patches import storage
from patchjax.patches.patch import Patch
from patchjax.statistics.kinds import ARRAYS, arrays_of
from patchjax.statistics.layers import LinearLayer
from patchjax.trees.digest import canonical_json, tree_id, words_digest
from patchjax.trees.errors import BaseMismatchError, FormatError

FORMAT = "patchjax.statistics"
VERSION = 1
_KINDS = {kind.__name__: kind for kind in ARRAYS}


def save(statistic: Any, path: str | os.PathLike[str], *, of: Any) -> None:
  """Writes a statistic as one safetensors file.

  Args:
    statistic: a `Fisher`, `Gram` or `KFac`, with concrete arrays.
    path: the file; replaced as a whole, or not at all.
    of: what it is a statistic of: the patch that leads to the model, or the
      model, a pytree of arrays. Its digest goes into the file.

  Raises:
    OSError: if the file cannot be written.
    TypeError: if it is no statistic.

  Example:
    >>> import tempfile, patchjax as pj
    >>> from patchjax.statistics import Fisher
    >>> patch = pj.diff({"w": np.float32([0])}, {"w": np.float32([2])})
    >>> fisher = Fisher({"w": np.float32([3])}, 10, "exact")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(fisher, f"{folder}/fisher.safetensors", of=patch)
    ...   again = load(f"{folder}/fisher.safetensors", of=patch)
    >>> again.n, again.values["w"].tolist()
    (10, [3.0])
  """
  import safetensors.numpy

  fields = arrays_of(statistic)
  tensors, digests = {}, {}
  for field in fields:
    for name, x in getattr(statistic, field).items():
      words = np.ascontiguousarray(np.asarray(jax.device_get(x), np.float32))
      key = f"{field}#{name}"
      tensors[key] = words
      digests[key] = _digest(words)
  kind = type(statistic).__name__
  spelled: dict[str, Any] = {"kind": kind, "of": digest(of), "sha256": digests}
  for field in dataclasses.fields(statistic):
    value = getattr(statistic, field.name)
    if field.name == "layers":
      spelled["layers"] = [
        [name, list(x.in_axes), list(x.out_axes), list(x.batch_axes)]
        for name, x in value
      ]
    elif field.name == "rows":
      spelled["rows"] = {name: _number(n) for name, n in value.items()}
    elif field.name not in fields:
      spelled[field.name] = value if isinstance(value, str) else _number(value)
  text = canonical_json(spelled).decode()
  data = safetensors.numpy.save(
    tensors,
    {"format": FORMAT, "version": str(VERSION), "statistics": text},
  )
  with storage.replacing(path) as file:
    file.write(data)


def load(path: str | os.PathLike[str], *, of: Any) -> Any:
  """Reads a statistic.

  Args:
    path: the file.
    of: the patch or the model that it must be a statistic of.

  Returns:
    the `Fisher`, `Gram` or `KFac`; its arrays are views of the mapped file.

  Raises:
    BaseMismatchError: if it is one of another patch or model.
    FormatError: if the file is no statistic, of an unknown version, truncated
      or edited.
    OSError: if it cannot be read.
  """
  path = pathlib.Path(path)
  header, body = storage.open_safetensors(path)
  metadata = header.get("__metadata__", {})
  if metadata.get("format") != FORMAT:
    raise FormatError(
      f"{path}: a safetensors file, but no statistic; expected format "
      f"{FORMAT!r}, found {metadata.get('format')!r}"
    )
  if metadata.get("version") != str(VERSION):
    raise FormatError(
      f"{path}: a statistic of version {metadata.get('version')}, expected "
      f"{VERSION}; read it with a newer patchjax"
    )
  try:
    spelled = json.loads(metadata["statistics"])
    found = _read(path, spelled, header, body)
  except FormatError:
    raise
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise FormatError(
      f"{path}: the header does not describe a statistic: {error!r:.200}"
    ) from error
  if spelled["of"] != digest(of):
    raise BaseMismatchError(
      f"{path}: a statistic of {spelled['of'][:12]}, and what was given is "
      f"{digest(of)[:12]}; take it again for this patch or model"
    )
  return found


def _read(path, spelled, header, body) -> Any:
  kind = _KINDS[spelled["kind"]]
  fields: dict[str, Any] = {name: {} for name in ARRAYS[kind]}
  for key, expected in spelled["sha256"].items():
    field, _, name = key.partition("#")
    start, end = header[key]["data_offsets"]
    words = np.asarray(body[start:end].view(np.float32))
    words = words.reshape(header[key]["shape"])
    if header[key]["dtype"] != "F32" or _digest(words) != expected:
      raise FormatError(
        f"{path}: the array {key!r} is not what was saved (its digest is "
        "wrong); get the file again"
      )
    fields[field][name] = words
  for field in dataclasses.fields(kind):
    if field.name == "layers":
      fields["layers"] = tuple(
        (name, LinearLayer(*(tuple(axes) for axes in kinds)))
        for name, *kinds in spelled["layers"]
      )
    elif field.name not in fields:
      fields[field.name] = spelled[field.name]
  return kind(**fields)


def digest(of: Any) -> str:
  """Returns the digest that a statistic of a patch or a model is bound to.

  Args:
    of: a `Patch`: the digest of what its file would say, its arrays among it,
      but not of its base; or a pytree of arrays.
  """
  if not isinstance(of, Patch):
    return tree_id(of)
  data = patch_files.dumps(of.replace(base=None))
  header = json.loads(bytes(data[1]))
  return header["__metadata__"]["sha256"]


def _digest(words: np.ndarray) -> str:
  return words_digest(words.view(np.uint32), "float32", words.shape)


def _number(value: Any) -> int | float:
  value = float(value)
  return int(value) if value == int(value) else value
