"""Packs that are open for reading: payloads by region, blobs as a whole."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from patchjax.history.arrays import blobs, encodings
from patchjax.history.arrays.encodings import Fetch
from patchjax.history.arrays.index import Location
from patchjax.history.arrays.payloads import Payload
from patchjax.history.storage.files import Files
from patchjax.history.storage.objects import Objects
from patchjax.trees.errors import IntegrityError


class Packs:
  """The packs that one reading needs, each opened once.

  Attributes:
    files: files of the repository.
  """

  def __init__(self, files: Files):
    self.files = files
    self._payloads: dict[str, Payload] = {}
    self._blobs: dict[str, tuple[bytes, tuple[dict[str, Any], int]]] = {}
    self._read: dict[str, bytes] = {}  # of blobs, ahead of `_blobs`
    self._lock = threading.Lock()

  def open(self, places: Iterable[Location]) -> None:
    """Opens the arrays of leaves side by side; errors come when they are read.

    Args:
      places: where the leaves are.
    """
    keys = collections.defaultdict(list)
    absent = set()
    for place in places:
      if not place.pack.startswith("blobs/"):
        keys[place.pack] += keys_of(place)
      elif place.pack not in self._blobs:
        absent.add(place.pack)
    for pack, wanted in keys.items():
      self._payload(pack).open(wanted)
    if not self.files.local:
      # A store answers many requests in the time of one.
      self._read |= self.files.read_all(sorted(absent))

  def fetch(self, place: Location) -> Fetch:
    """Returns what reads the stored arrays of a leaf.

    Args:
      place: where it is.

    Raises:
      IntegrityError: if it is in a blob that cannot be read.
    """
    if encodings.object_of(place.encoding, place.key) is not None:
      return encodings.fetch_patch(place.key, Objects(self.files).read)
    if place.pack.startswith("blobs/"):
      return encodings.fetch_from(self._unpack(place))
    payload = self._payload(place.pack)

    def fetch(
      part: str,
      region: tuple[slice, ...] | None = None,
      out: np.ndarray | None = None,
    ) -> np.ndarray:
      return payload.read(encodings.key_of(place.key, part), region, out)

    return fetch

  def _payload(self, pack: str) -> Payload:
    with self._lock:
      if pack not in self._payloads:
        self._payloads[pack] = Payload(self.files, pack)
      return self._payloads[pack]

  def _unpack(self, place: Location) -> dict[str, np.ndarray]:
    pack = place.pack
    with self._lock:
      if pack not in self._blobs:
        try:
          data = self._read.pop(pack, None) or self.files.read(pack)
        except OSError as error:
          raise IntegrityError(
            f"{self.files.path(pack)} cannot be read: {error}"
          ) from error
        header = blobs.read_header(data, pack.removeprefix("blobs/"))
        self._blobs[pack] = data, header
      data, header = self._blobs[pack]
    found = blobs.unpack(data, header, keys_of(place))
    if not found:
      raise IntegrityError(
        f"{self.files.path(pack)} lacks the array {place.key!r}"
      )
    return encodings.parts_of(
      found, place.key, encodings.ENCODINGS[place.encoding]
    )


def keys_of(place: Location) -> list[str]:
  """Returns the keys under which the arrays of a leaf may lie.

  Args:
    place: where it is.
  """
  encoding = encodings.ENCODINGS.get(place.encoding)
  parts = ("",) if encoding is None else encoding.parts
  return [encodings.key_of(place.key, part) for part in parts]
