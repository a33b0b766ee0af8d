"""Which payloads and blobs a copy needs, and copies of parts of them.

A leaf is needed with the bases of its chain of differences. What the target
holds in any encoding is not copied, if its own chain is whole there.

Payloads and blobs are copied as they are. In a partial clone one that also
holds leaves nobody asked for is not: its wanted arrays go, as they are stored,
into a new one. The first payload of a history holds every leaf, so copying it
whole would make a partial clone a full one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchjax.history.arrays import chains
from patchjax.history.arrays import index as indices
from patchjax.history.arrays.index import INDEX, Location
from patchjax.trees import dtypes
from patchjax.trees.errors import ConflictError, IntegrityError

if TYPE_CHECKING:
  from patchjax.history.remotes.reach import Reached
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

_GROUP = 128 << 20  # bytes of leaves in memory, and in one new payload
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
    entries: `{digest: entry}` of the leaves asked for, and of their bases.
  """

  parts: tuple[Part, ...]
  files: frozenset[str]
  missing: frozenset[str]
  entries: Mapping[str, Entry]


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
    self.routes: dict[str, Location] = {}  # of what was asked for
    self.entries: dict[str, Entry] = {}  # of the same
    self.missing: set[str] = set()

  def close(self, leaves: Mapping[str, Entry]) -> None:
    """Chooses packs for leaves, and for the bases of what is chosen."""
    # With each leaf, the one that is going to be read from it: the chains of
    # two repositories must not make a loop, which neither has by itself.
    wanted: dict[tuple[str, str | None], None]
    wanted = dict.fromkeys((digest, None) for digest in leaves)
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
          if above is None:
            if place.digest in self.routes:
              break  # taken, with all below it
            self.routes[place.digest] = place
            entry = dataclasses.replace(leaves[digest], digest=place.digest)
            self.entries[place.digest] = entry
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
    elif self.partial:
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
    return Plan(tuple(parts), needed, frozenset(self.missing), self.entries)


def take(
  source: Repo,
  target: Repo,
  plan: Plan,
  copied: Callable[[int, int], None],
) -> None:
  """Copies the leaves that a plan takes out of payloads into new payloads.

  Their arrays are copied as they are stored, and each leaf is decoded from
  them before an index says that it is here.

  Args:
    source: where they are.
    target: where they shall be; local, or on `gs://`. It has what else the
      plan says.
    plan: says what to take.
    copied: called with 1 and the bytes of each payload written.

  Raises:
    IntegrityError: if arrays are missing or damaged; of leaves in the same
      new payload none is here then.
  """
  from patchjax.history.arrays import storing

  for group in _groups(plan):
    arrays, places = _read(source, target, plan, group)
    generation = max(
      indices.generation(source.files, pack)
      for pack in {place.pack for place in group}
    )
    storing.store(
      target.files, places, arrays, generation=generation, remark="part"
    )
    copied(1, sum(array.nbytes for array in arrays.values()))


def _groups(plan: Plan) -> Iterator[list[Location]]:
  """Yields leaves by the group, bases before what differs from them."""
  routes = {p.digest: p for part in plan.parts for p in part.places or ()}
  group: list[Location] = []
  size = 0
  ordered: dict[str, Location] = {}
  for digest in routes:
    for place in reversed(list(chains.along(digest, routes))):
      ordered.setdefault(place.digest, place)
  for place in ordered.values():
    entry = plan.entries[place.digest]
    size += entry.size * dtypes.itemsize(entry.dtype)
    group.append(place)
    if size >= _GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group


def _read(
  source: Repo, target: Repo, plan: Plan, group: Sequence[Location]
) -> tuple[dict[str, np.ndarray], list[Location]]:
  """Returns the stored arrays of leaves, and how these lie among them."""
  from patchjax.history.arrays import storing
  from patchjax.history.arrays.encodings import ENCODINGS, key_of, object_of
  from patchjax.history.arrays.places import Packs

  packs = Packs(source.files)
  packs.open(group)
  words = _bases(target, plan, group)
  arrays: dict[str, np.ndarray] = {}
  places = []
  for place in group:
    fetch = packs.fetch(place)
    held = {part: fetch(part) for part in ENCODINGS[place.encoding].parts}
    entry = plan.entries[place.digest]
    base = None if place.base is None else words[place.base]
    try:
      found = storing.decode(entry, place, held, base, target.objects.read)
    except IntegrityError as error:
      where = f"{source.files.path(place.pack)}, array {place.key!r}"
      raise IntegrityError(f"{where}: {error} there") from error
    found.flags.writeable = False  # several leaves may need it
    words[place.digest] = found
    if object_of(place.encoding, place.key) is None:
      # Names repeat from payload to payload.
      place = dataclasses.replace(place, key=place.digest)
    places.append(place)
    arrays |= {key_of(place.key, part): array for part, array in held.items()}
  return arrays, places


def _bases(
  target: Repo, plan: Plan, group: Sequence[Location]
) -> dict[str, np.ndarray]:
  """Returns the words of those bases of leaves that the target has."""
  inside = {place.digest for place in group}
  wanted = {
    place.base: dataclasses.replace(
      plan.entries[place.digest], digest=place.base
    )
    for place in group
    if place.base is not None and place.base not in inside
  }
  found = target.reader.read(wanted) if wanted else {}
  for array in found.values():
    array.flags.writeable = False
  return found
