"""Blobs: small payloads in one immutable value.

A checkpoint folder costs some twenty files and fifty milliseconds; a commit
that changes a bias should not. A blob is a line of magic, the length of a JSON
header, the header and the bytes of its arrays, under the SHA-256 of it all:

    patchjax blob 1\\n | length: 8 bytes, little-endian | header | arrays

The header has the index of the blob's leaves and, per array, dtype, shape,
codec (`raw` or `zlib`) and the extent of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from patchjax.trees.digest import canonical_json
from patchjax.trees.errors import IntegrityError

MAGIC = b"patchjax blob 1\n"

LARGEST = 64 * 1024
"""Bytes up to which arrays go into a blob."""

TRY = 32 * LARGEST
"""Raw bytes beyond which compression is not even tried."""


def pack(
  arrays: Mapping[str, np.ndarray],
  index: dict[str, Any],
  *,
  generation: int = 0,
) -> bytes | None:
  """Returns the blob of some arrays, or None if they are too large for one.

  Args:
    arrays: `{key: array}`, of dtypes that `encodings` stores.
    index: the index of the leaves, as `index.py` writes it.
    generation: see `index.write`.
  """
  if sum(array.nbytes for array in arrays.values()) > TRY:
    return None
  extents: dict[str, Any] = {}
  parts: list[bytes] = []
  size = 0
  for key, array in arrays.items():
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()
    # zlib, not zstd: in Python's own library, and fast enough at this size.
    small = zlib.compress(raw, 1)
    codec, data = ("zlib", small) if len(small) < len(raw) else ("raw", raw)
    extents[key] = {
      "codec": codec,
      "dtype": array.dtype.name,
      "shape": list(array.shape),
      "start": size,
      "stop": size + len(data),
    }
    size += len(data)
    if size > LARGEST:
      return None
    parts.append(data)
  facts: dict[str, Any] = {"arrays": extents, "index": index}
  if generation:
    facts["generation"] = generation
  header = canonical_json(facts)
  return b"".join([MAGIC, len(header).to_bytes(8, "little"), header, *parts])


def name_of(data: bytes) -> str:
  """Returns the name of a blob: the digest of its bytes.

  Args:
    data: the blob.
  """
  return hashlib.sha256(data).hexdigest()


def read_header(data: bytes, name: str) -> tuple[dict[str, Any], int]:
  """Returns the header of a blob and where its arrays start.

  Args:
    data: the blob.
    name: its digest.

  Raises:
    IntegrityError: if the bytes are not what the digest says.
  """
  found = name_of(data)
  if found != name or not data.startswith(MAGIC):
    raise IntegrityError(f"blob {name} is damaged: found the digest {found}")
  start = len(MAGIC) + 8
  length = int.from_bytes(data[len(MAGIC) : start], "little")
  return json.loads(data[start : start + length]), start + length


def unpack(
  data: bytes, header: tuple[dict[str, Any], int], keys: Iterable[str]
) -> dict[str, np.ndarray]:
  """Returns those of some arrays that a blob has.

  Args:
    data: the blob.
    header: what `read_header` says of it.
    keys: which arrays.
  """
  from patchjax.trees.dtypes import KINDS

  facts, start = header
  arrays = {}
  for key in keys:
    item = facts["arrays"].get(key)
    if item is None:
      continue
    raw = data[start + item["start"] : start + item["stop"]]
    if item["codec"] == "zlib":
      raw = zlib.decompress(raw)
    # A bytearray: what users get must be writable, as from a checkpoint.
    flat = np.frombuffer(bytearray(raw), KINDS[item["dtype"]].dtype)
    arrays[key] = flat.reshape(item["shape"])
  return arrays
