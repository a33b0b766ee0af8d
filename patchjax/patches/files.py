"""The patch file: one safetensors file, read without computing on a device.

Each array is stored as its unsigned bit pattern, its JAX dtype beside it in
the header, at a multiple of 64 bytes (filled up by `__pad_n` tensors, since
the format allows no holes), so that the arrays of a loaded patch are views of
the mapped file, which `jax.device_put` takes over on CPU without a copy.
Quantized words are packed to their bits. The header also holds the structure
of the base, the digest of its value, and digests of every array and of the
header itself: a file that was cut short or edited is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from patchjax.patches import storage
from patchjax.patches.checks import check_deltas, misfit
from patchjax.patches.codes import CODES, Quantized, Sparse
from patchjax.patches.deltas import AnyDelta, Delete, Delta, Insert, Rename
from patchjax.patches.laws import LAWS
from patchjax.patches.patch import Patch, Structure
from patchjax.trees import dtypes
from patchjax.trees.digest import Entry, canonical_json, tree_id, words_digest
from patchjax.trees.errors import FormatError, MismatchError, PatchjaxError
from patchjax.trees.names import split

FORMAT = "patchjax.patch"
VERSION = 1
_ALIGN = 64
_WORDS = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64"}


def save(
  patch: Patch, path: str | os.PathLike[str], *, base: Any = None
) -> None:
  """Writes a patch as one safetensors file.

  Args:
    patch: the patch, with concrete arrays.
    path: the file; replaced as a whole, or not at all.
    base: the value the patch was made for; its digest goes into the file, so
      that `check_base` can tell a wrong base. By default `patch.base`.

  Raises:
    MismatchError: if `base` has not the structure of the patch's base, or
      deltas do not fit it.
    OSError: if the file cannot be written; an older one is then still there.

  Example:
    >>> import tempfile, patchjax as pj
    >>> a, b = {"w": np.float32([1, 2])}, {"w": np.float32([1, 4])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pj.diff(a, b).save(f"{folder}/fix.safetensors", base=a)
    ...   patch = pj.Patch.load(f"{folder}/fix.safetensors")
    ...   pj.check_base(a, patch)
    >>> pj.apply(a, patch)["w"].tolist()
    [1.0, 4.0]
  """
  path = pathlib.Path(path)
  data = dumps(patch, base=base)
  with storage.replacing(path) as file:
    for part in data:
      file.write(part)


def dumps(patch: Patch, *, base: Any = None) -> list[bytes | memoryview]:
  """Returns the bytes of the patch file, in pieces to be written in turn.

  Args:
    patch: the patch, with concrete arrays.
    base: see `save`.
  """
  digest = patch.base
  if base is not None:
    from patchjax.patches.apply import check_base

    digest = tree_id(base)
    check_base(base, patch.replace(base=digest))
  _check_sound(patch)
  arrays: dict[str, np.ndarray] = {}
  deltas = {
    name: _spell(name, delta, arrays)
    for name, delta in sorted(patch.deltas.items())
  }
  spelled = canonical_json(
    {
      "base": digest,
      "deltas": deltas,
      "structure": None
      if patch.structure is None
      else {
        name: [entry.dtype, list(entry.shape)]
        for name, entry in patch.structure.leaves.items()
      },
    }
  )
  header: dict[str, Any] = {
    "__metadata__": {
      "format": FORMAT,
      "version": str(VERSION),
      "patch": spelled.decode(),
      "sha256": hashlib.sha256(spelled).hexdigest(),
    }
  }
  body: list[bytes | memoryview] = []
  offset = 0
  for name, words in arrays.items():
    gap = -offset % _ALIGN
    if gap:
      header[f"__pad_{len(body)}"] = _tensor("U8", (gap,), offset, gap)
      body.append(bytes(gap))
      offset += gap
    header[name] = _tensor(
      _WORDS[words.dtype.name], words.shape, offset, words.nbytes
    )
    if words.nbytes:
      body.append(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data)
    offset += words.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % _ALIGN)
  return [len(text).to_bytes(8, "little"), text, *body]


def _check_sound(patch: Patch) -> None:
  """Refuses what `load` would refuse: better now than by who gets the file."""
  bad = [
    f"  {name}: {why}"
    for name, delta in patch.deltas.items()
    if (why := misfit(delta, None) or _disorder(delta))
  ]
  if bad:
    raise MismatchError(
      f"{len(bad)} deltas cannot be saved (patches that were stacked for vmap "
      "are saved one by one):\n" + "\n".join(bad)
    )
  if patch.structure is not None:
    check_deltas(patch.structure.leaves, patch.deltas)


def _disorder(delta: AnyDelta) -> str | None:
  """Why the positions of sparse entries are none."""
  if not (isinstance(delta, Delta) and isinstance(delta.code, Sparse)):
    return None
  indices = np.asarray(delta.code.indices)
  if indices.ndim == 2:
    indices = indices[:, 0].astype(np.int64) << 32 | indices[:, 1]
  if len(indices) and (indices[0] < 0 or (np.diff(indices) <= 0).any()):
    return "indices must be sorted, different and not negative"
  return None


def _tensor(dtype: str, shape: Any, start: int, size: int) -> dict[str, Any]:
  return {
    "dtype": dtype,
    "shape": list(shape),
    "data_offsets": [start, start + size],
  }


def _spell(
  name: str, delta: AnyDelta, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
  """A delta in JSON; its arrays go into `arrays`."""
  # Doubled, so that no leaf's name looks like a field of another leaf.
  where = name.replace("#", "##")
  match delta:
    case Delta(law=law, code=code):
      return {"law": law, "code": _spell_code(where, code, arrays)}
    case Insert(value=value, axis=axis):
      array = _put(f"{where}#value", value, arrays)
      return {"delta": "insert", "value": array, "axis": axis}
    case Rename(to=to):
      return {"delta": "rename", "to": to}
  return {"delta": "delete"}


def _spell_code(
  where: str, code: Any, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
  spelled: dict[str, Any] = {"kind": type(code).__name__}
  for field in dataclasses.fields(code):
    value = getattr(code, field.name)
    if field.metadata.get("static"):
      spelled[field.name] = list(value) if isinstance(value, tuple) else value
    elif type(value).__name__ in CODES:
      spelled[field.name] = _spell_code(f"{where}#{field.name}", value, arrays)
    else:
      bits = code.bits if _packs(code, field.name) else None
      spelled[field.name] = _put(f"{where}#{field.name}", value, arrays, bits)
  return spelled


def _packs(code: Any, field: str) -> bool:
  return isinstance(code, Quantized) and field == "words"


def _put(
  where: str, value: Any, arrays: dict[str, np.ndarray], bits: Any = None
) -> dict[str, Any]:
  words, dtype = dtypes.host(value)
  shape = [int(size) for size in np.shape(value)]
  if bits is not None:
    words = pack(np.asarray(value), bits)
  arrays[where] = words
  spelled: dict[str, Any] = {"array": where, "dtype": dtype, "shape": shape}
  if bits is not None:
    spelled["bits"] = bits
  spelled["sha256"] = words_digest(words, dtype, tuple(shape))
  return spelled


def pack(words: np.ndarray, bits: int) -> np.ndarray:
  """Returns small signed integers packed to `bits` bits each, as uint8.

  Args:
    words: int8, as in `Quantized`.
    bits: 1 to 8.

  Example:
    >>> pack(np.int8([-1, 1, 1, 1]), 1).tolist()
    [14]
  """
  flat = words.reshape(-1).astype(np.int16)
  unsigned = (flat + 1 >> 1 if bits == 1 else flat + (1 << bits - 1)).astype(
    np.uint8
  )
  chunks = [
    np.packbits(
      np.unpackbits(chunk[:, None], axis=1, count=bits, bitorder="little"),
      bitorder="little",
    )
    # Eight times as many bits as words are unpacked: keep that small.
    for chunk in _chunks(unsigned, 1 << 20)
  ]
  return np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the integers that `pack` packed.

  Args:
    packed: uint8.
    bits: 1 to 8.
    shape: shape of the words.

  Example:
    >>> unpack(np.uint8([14]), 1, (4,)).tolist()
    [-1, 1, 1, 1]
  """
  size = math.prod(shape)
  words = np.empty(size, np.int8)
  step = 1 << 20
  for start in range(0, size, step):
    count = min(step, size - start)
    piece = packed[start * bits // 8 :][: -(-count * bits // 8)]
    flat = np.unpackbits(piece, count=count * bits, bitorder="little")
    unsigned = np.packbits(flat.reshape(count, bits), axis=1, bitorder="little")
    signed = unsigned[:, 0].astype(np.int16)
    signed = 2 * signed - 1 if bits == 1 else signed - (1 << bits - 1)
    words[start : start + count] = signed
  return words.reshape(shape)


def _chunks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
  for start in range(0, len(x), size):
    yield x[start : start + size]


def load(path: str | os.PathLike[str]) -> Patch:
  """Reads a patch file.

  Args:
    path: the file.

  Returns:
    The patch; its arrays are read-only views of the mapped file.

  Raises:
    FormatError: if the file is no patch file, of an unknown version,
      truncated, edited, or says things that do not fit together.
    OSError: if it cannot be read.
  """
  path = pathlib.Path(path)
  return _read(path, *storage.open_safetensors(path))


def loads(data: bytes, what: str = "patch file") -> Patch:
  """Reads the bytes of a patch file.

  Args:
    data: the bytes.
    what: what they are called, for messages.

  Returns:
    The patch; its arrays are read-only views of the bytes.

  Raises:
    FormatError: see `load`.
  """
  try:
    safetensors.deserialize(data)
  except safetensors.SafetensorError as error:
    raise FormatError(
      f"{what}: truncated, or not a safetensors file ({error})"
    ) from error
  size = 8 + int.from_bytes(data[:8], "little")
  body = np.frombuffer(data, np.uint8)[size:]
  return _read(what, json.loads(data[8:size]), body)


def _read(
  path: str | pathlib.Path, header: Mapping[str, Any], body: np.ndarray
) -> Patch:
  metadata = header.get("__metadata__", {})
  if metadata.get("format") != FORMAT:
    raise FormatError(
      f"{path}: a safetensors file, but not a patch; expected format "
      f"{FORMAT!r}, found {metadata.get('format')!r}"
    )
  if metadata.get("version") != str(VERSION):
    raise FormatError(
      f"{path}: patch file of version {metadata.get('version')}, expected "
      f"{VERSION}; read it with a newer patchjax"
    )
  spelled = metadata.get("patch", "").encode()
  if hashlib.sha256(spelled).hexdigest() != metadata.get("sha256"):
    raise FormatError(f"{path}: the header was edited: its digest is wrong")
  try:
    return _Reader(path, header, body).patch(json.loads(spelled))
  except FormatError:
    raise
  except PatchjaxError as error:
    raise FormatError(f"{path}: {error}") from error
  except (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
  ) as e:
    raise FormatError(
      f"{path}: the header does not describe a patch: {e!r:.200}"
    ) from e


def is_patch_file(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file calls itself a patch file; it may yet be broken.

  Args:
    path: a readable file.
  """
  try:
    with storage.safe_open(path) as file:
      return (file.metadata() or {}).get("format") == FORMAT
  except safetensors.SafetensorError:
    return False


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Makes deltas of what the header of one file says."""

  path: str | pathlib.Path
  header: Mapping[str, Any]
  body: np.ndarray

  def patch(self, spelled: Mapping[str, Any]) -> Patch:
    structure = spelled["structure"] and Structure(
      {
        name: Entry("", dtype, tuple(shape))
        for name, (dtype, shape) in spelled["structure"].items()
      }
    )
    deltas = {}
    for name, item in spelled["deltas"].items():
      split(name)
      name.encode()  # half a surrogate pair is no text
      deltas[name] = self._delta(name, item)
    base = spelled["base"]
    if not (base is None or isinstance(base, str)):
      raise FormatError(f"{self.path}: expected a digest, found base {base!r}")
    if structure is not None:
      check_deltas(structure.leaves, deltas)
    return Patch(deltas, structure, base=base)

  def _delta(self, name: str, item: Mapping[str, Any]) -> AnyDelta:
    match item:
      case {"delta": "insert", "value": value, "axis": int() | None as axis}:
        return Insert(self._array(value), axis)
      case {"delta": "rename", "to": str(to)}:
        split(to)
        return Rename(to)
      case {"delta": "delete"}:
        return Delete()
      case {"law": law, "code": code} if law in LAWS:
        delta = Delta(self._code(code), law)
        if why := misfit(delta, None) or _disorder(delta):
          raise FormatError(f"{self.path}: {name}: {why}")
        return delta
    raise FormatError(f"{self.path}: {name}: unknown delta {item}")

  def _code(self, item: Mapping[str, Any]) -> Any:
    kind = CODES.get(item["kind"])
    if kind is None:
      raise FormatError(
        f"{self.path}: unknown code {item['kind']!r}, expected one of "
        f"{', '.join(CODES)}; read the file with a newer patchjax"
      )
    fields = {}
    for field in dataclasses.fields(kind):
      value = item[field.name]
      if field.metadata.get("static"):
        fields[field.name] = tuple(value) if isinstance(value, list) else value
      elif "kind" in value:
        fields[field.name] = self._code(value)
      else:
        fields[field.name] = self._array(value)
    return kind(**fields)

  def _array(self, item: Mapping[str, Any]) -> Any:
    where, dtype, shape = item["array"], item["dtype"], tuple(item["shape"])
    tensor = self.header[where]
    start, end = tensor["data_offsets"]
    word = {v: k for k, v in _WORDS.items()}[tensor["dtype"]]
    words = self.body[start:end].view(word).reshape(tensor["shape"])
    # What follows only reads: plain arrays, not memory maps with their file.
    words = np.asarray(words)
    if words_digest(words, dtype, shape) != item["sha256"]:
      raise FormatError(
        f"{self.path}: the array {where!r} is not what was saved (its "
        "digest is wrong); get the file again"
      )
    if (bits := item.get("bits")) is not None:
      if bits not in range(1, 9) or words.size != -(
        -math.prod(shape) * bits // 8
      ):
        raise FormatError(
          f"{self.path}: {where}: {words.size} bytes for {shape} words of "
          f"{bits} bits"
        )
      return unpack(words, bits, shape)
    value = dtypes.device(words, dtype)
    if np.shape(value) != shape:
      raise FormatError(
        f"{self.path}: {where}: shape {np.shape(value)}, expected {shape}"
      )
    return value
