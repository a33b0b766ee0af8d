"""Which payloads and blobs a copy needs, and copies of parts of them.

A leaf is needed with the bases of its chain of differences. What the target
holds in any encoding is not copied, if its own chain is whole there.

Payloads are copied as they are. In a partial clone a payload that also holds
leaves nobody asked for is not: its wanted arrays go, as they are stored, into
a new payload. The first payload of a history holds every leaf, so copying it
whole would make a partial clone a full one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from patchjax.history.arrays import index as indices
from patchjax.history.arrays.index import INDEX, Location
from patchjax.trees.errors import ConflictError

if TYPE_CHECKING:
  from patchjax.history.remotes.reach import Reached
  from patchjax.history.repo import Repo

_GROUP = 256 << 20  # bytes of arrays in memory, and in one new payload
_TRIES = 3  # each lost to a `gc` that took what the plan relied on


@dataclasses.dataclass(frozen=True)
class Part:
  """What is copied of a payload or blob.

  Attributes:
    pack: `payloads/<uuid>` or `blobs/<digest>`.
    places: the leaves to take; None to copy the files as they are.
  """

  pack: str
  places: tuple[Location, ...] | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a copy needs.

  Attributes:
    parts: what to copy.
    files: ids of patch files that leaves are read from.
    missing: digests of leaves that neither side has.
  """

  parts: tuple[Part, ...]
  files: frozenset[str]
  missing: frozenset[str]


def plan(
  source: Repo, target: Repo, found: Reached, *, partial: bool = False
) -> Plan:
  """Decides what to copy for the leaves that a walk met.

  Args:
    source: where things are.
    target: where they shall be.
    found: the leaves.
    partial: whether to leave out what shares a payload with them.
  """
  source.index.refresh()
  for _ in range(_TRIES):
    target.index.refresh()
    planned = _Planning(source, target, partial)
    planned.close(found.leaves)
    if planned.freshen():
      return planned.plan()
    target.index.forget()
  raise ConflictError(
    f"a gc at work in {target.path} keeps taking what is needed: wait for its "
    "end, and try again"
  )


class _Planning:
  """The state of one plan."""

  def __init__(self, source: Repo, target: Repo, partial: bool):
    self.source = source
    self.target = target
    self.partial = partial
    self.chosen: dict[str, dict[str, Location]] = collections.defaultdict(dict)
    self.relied: set[str] = set()  # packs of the target
    self.missing: set[str] = set()

  def close(self, digests: Mapping[str, object]) -> None:
    """Chooses packs for leaves, and for the bases of what is chosen."""
    # With each leaf, how deep its chain may be: chains only go down, so that
    # those of two repositories never make a loop.
    level: dict[str, float] = dict.fromkeys(digests, math.inf)
    done: dict[str, float] = {}
    while level:
      done |= level
      here = self.target.index.find(level)
      there = self.source.index.find(
        [digest for digest in level if not _fit(here, digest, level[digest])]
      )
      after: dict[str, float] = {}
      for digest, limit in level.items():
        for place in self._take(digest, limit, here, there):
          below = min(place.depth - 1, after.get(place.base or "", math.inf))
          if place.base is not None and below < done.get(place.base, math.inf):
            after[place.base] = below
      level = after

  def _take(
    self,
    digest: str,
    limit: float,
    here: Mapping[str, list[Location]],
    there: Mapping[str, list[Location]],
  ) -> list[Location]:
    """Returns the places whose bases are needed now."""
    held = _fit(here, digest, limit)
    if held:
      self.relied.add(held[0].pack)
      return held[:1]
    places = _fit(there, digest, limit)
    if not places:
      self.missing.add(digest)
      return []
    # A pack that is copied anyway costs nothing more.
    place = next((p for p in places if p.pack in self.chosen), places[0])
    if self.partial and place.pack.startswith("payloads/"):
      self.chosen[place.pack][digest] = place
      return [place]
    if place.pack in self.chosen:
      return []
    inside = {each.digest: each for each in self._inside(place.pack)}
    self.chosen[place.pack] = inside
    return list(inside.values())

  @functools.cached_property
  def _inside(self) -> Callable[[str], list[Location]]:
    return functools.cache(functools.partial(indices.read, self.source.files))

  def freshen(self) -> bool:
    """Keeps what the target has from a `gc`; returns whether it is there."""
    files = self.target.files
    if not files.local:
      return True
    keys = [
      pack if pack.startswith("blobs/") else f"{pack}/{INDEX}"
      for pack in self.relied
    ]
    # What belongs to somebody else cannot be freshened; it is there, at least.
    return all(files.freshen(key) or files.exists(key) for key in keys)

  def plan(self) -> Plan:
    """Returns what was chosen."""
    from patchjax.history.arrays.encodings import object_of

    parts, files = [], set()
    for pack, places in self.chosen.items():
      whole = len(places) == len(self._inside(pack))
      parts.append(Part(pack, None if whole else tuple(places.values())))
      files |= {object_of(p.encoding, p.key) for p in places.values()}
    needed = frozenset(name for name in files if name is not None)
    return Plan(tuple(parts), needed, frozenset(self.missing))


def _fit(
  places: Mapping[str, list[Location]], digest: str, limit: float
) -> list[Location]:
  return [p for p in places.get(digest, ()) if p.depth <= limit]


def take(
  source: Repo,
  target: Repo,
  parts: Iterable[Part],
  copied: Callable[[int, int], None],
) -> None:
  """Copies parts of payloads into new payloads, arrays as they are stored.

  Args:
    source: where they are.
    target: where they shall be; local, or on `gs://`.
    parts: what to take.
    copied: called with 1 and the bytes of each payload written.
  """
  for part in parts:
    generation = indices.generation(source.files, part.pack)
    for places, arrays in _groups(source, part):
      _store(target, arrays, places, generation)
      copied(1, sum(array.nbytes for array in arrays.values()))


def _groups(
  source: Repo, part: Part
) -> Iterator[tuple[list[Location], dict[str, np.ndarray]]]:
  """Yields leaves and their stored arrays, as many as fit into memory."""
  from patchjax.history.arrays import payloads
  from patchjax.history.arrays.encodings import ENCODINGS, key_of

  payload = payloads.Payload(source.files, part.pack)
  stored = payload.keys()
  places: list[Location] = []
  arrays: dict[str, np.ndarray] = {}
  for place in part.places or ():
    keys = [key_of(place.key, name) for name in ENCODINGS[place.encoding].parts]
    keys = [key for key in keys if key in stored]
    payload.open(keys)
    places.append(place)
    arrays |= {key: payload.read(key) for key in keys}
    if sum(array.nbytes for array in arrays.values()) >= _GROUP:
      yield places, arrays
      places, arrays = [], {}
  if places:
    yield places, arrays


def _store(
  target: Repo,
  arrays: Mapping[str, np.ndarray],
  places: list[Location],
  generation: int,
) -> None:
  from patchjax.history.arrays import blobs, payloads

  spelled = indices.spell(places)
  blob = blobs.pack(arrays, spelled, generation=generation)
  if blob is not None:
    target.files.write(f"blobs/{blobs.name_of(blob)}", blob)
    return
  pack = f"payloads/{uuid.uuid4().hex}"
  metadata = {"format": "patchjax payload 1", "part": True}
  payloads.save(target.files.path(pack), arrays, metadata=metadata)
  indices.write(target.files, pack, spelled, generation=generation)
