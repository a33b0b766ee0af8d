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
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from patchjax.history.arrays import chains
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
    self.here: set[str] = set()  # packs of the target
    self.relied: set[str] = set()  # those of them that are needed
    self.places: dict[str, list[Location]] = {}  # on either side
    self.missing: set[str] = set()

  def close(self, digests: Iterable[str]) -> None:
    """Chooses packs for leaves, and for the bases of what is chosen."""
    # With each leaf, the one that is going to be read from it: the chains of
    # two repositories must not make a loop, which neither has by itself.
    wanted: dict[tuple[str, str | None], None]
    wanted = dict.fromkeys((digest, None) for digest in digests)
    done: set[tuple[str, str | None]] = set()
    while wanted:
      done |= wanted.keys()
      self.places |= chains.gather(
        self._find, [digest for digest, _ in wanted], self.places
      )
      after: dict[tuple[str, str | None], None] = {}
      for digest, above in wanted:
        avoiding = () if above is None else (above,)
        chain = chains.chain(digest, self.places, avoiding)
        if chain is None:
          self.missing.add(digest)
        for place in chain or ():
          for other in self._take(place):
            if other.base is not None:
              after[other.base, other.digest] = None
      wanted = {pair: None for pair in after if pair not in done}

  def _find(self, digests: Iterable[str]) -> dict[str, list[Location]]:
    """Returns where leaves are on either side, what costs least first."""
    digests = list(digests)
    here = self.target.index.find(digests)
    there = self.source.index.find(digests)
    self.here |= {place.pack for found in here.values() for place in found}
    return {
      digest: sorted(
        {p.pack: p for p in (*there[digest], *here[digest])}.values(),
        key=self._cost,
      )
      for digest in digests
    }

  def _cost(self, place: Location) -> tuple[bool, bool, int, str]:
    # A pack that is copied anyway costs nothing more.
    unchosen = place.pack not in self.chosen
    return place.pack not in self.here, unchosen, place.depth, place.pack

  def _take(self, place: Location) -> list[Location]:
    """Takes a place of a chain; returns what comes along in its pack."""
    pack = place.pack
    if pack in self.here:
      self.relied.add(pack)
    elif self.partial and pack.startswith("payloads/"):
      self.chosen[pack][place.digest] = place
    elif pack not in self.chosen:
      inside = {each.digest: each for each in self._inside(pack)}
      self.chosen[pack] = inside
      for digest in inside.keys() & self.places.keys():
        self.places[digest].sort(key=self._cost)
      return list(inside.values())
    return []

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
