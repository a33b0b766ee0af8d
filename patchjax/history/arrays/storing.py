"""Packs written from arrays in memory: they exist once they are verified.

An index makes a pack exist, and with it every leaf that it lists: from then
on nobody writes or copies those leaves again. So it comes last, when each leaf
was decoded from what is to be stored, and what was stored was read back.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from patchjax.history.arrays import blobs, encodings, payloads
from patchjax.history.arrays import index as indices
from patchjax.history.arrays.index import Location
from patchjax.history.storage.files import Files
from patchjax.trees.digest import Entry, words_digest
from patchjax.trees.errors import IntegrityError, PatchjaxError


def decode(
  entry: Entry,
  place: Location,
  held: Mapping[str, np.ndarray],
  base: np.ndarray | None,
  read: Callable[[str], bytes],
) -> np.ndarray:
  """Returns the words of a leaf, from what is about to be stored of it.

  Args:
    entry: the leaf.
    place: how it is to be stored.
    held: `{part: array}`.
    base: words of what it is a difference to.
    read: reads an object by id, for leaves that are factors of a patch.

  Raises:
    IntegrityError: if that is not the leaf.
  """
  if encodings.object_of(place.encoding, place.key) is not None:
    fetch = encodings.fetch_patch(place.key, read)
  else:
    fetch = encodings.fetch_from(held)
  what = f"leaf {entry.digest[:16]} does not come back from {place.encoding}"
  try:
    decoded = encodings.ENCODINGS[place.encoding].decode
    words = decoded(entry, None, fetch, base)
  except (PatchjaxError, ValueError, LookupError) as error:
    raise IntegrityError(f"{what}: {error}; run fsck") from error
  if words_digest(words, entry.dtype, entry.shape) != entry.digest:
    raise IntegrityError(f"{what}: the bits have another digest; run fsck")
  return words


def store(
  files: Files,
  places: Sequence[Location],
  arrays: Mapping[str, np.ndarray],
  *,
  generation: int,
  remark: str,
) -> None:
  """Writes arrays as a blob or a payload, compares them, and writes the index.

  Args:
    files: files of the repository.
    places: the leaves that the arrays are.
    arrays: `{key: array}`.
    generation: see `index.write`.
    remark: what the payload tells those who open it with Orbax.

  Raises:
    IntegrityError: if what was stored is not what was to be.
    RepositoryError: if the disk is full or cannot be written.
  """
  spelled = indices.spell(places)
  blob = blobs.pack(arrays, spelled, generation=generation)
  if blob is not None:
    files.write(f"blobs/{blobs.name_of(blob)}", blob)
    return
  pack = f"payloads/{uuid.uuid4().hex}"
  metadata = {"format": "patchjax payload 1", remark: True}
  payloads.save(files.path(pack), arrays, metadata=metadata)
  payload = payloads.Payload(files, pack)
  payload.open(arrays)
  for key, array in arrays.items():
    # Compared as bytes: a NaN is no reason for alarm.
    if payload.read(key).tobytes() != array.tobytes():
      raise IntegrityError(
        f"{files.path(pack)}, array {key!r} was not stored as it was "
        "written; the payload does not count: check the disk"
      )
  indices.write(files, pack, spelled, generation=generation)
