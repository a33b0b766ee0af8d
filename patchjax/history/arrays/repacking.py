"""One run of `repack`: weigh every leaf, write what moves, verify it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from patchjax.history.arrays import chains, encodings, lineage, storing
from patchjax.history.arrays import index as indices
from patchjax.history.arrays.encodings import ENCODINGS, MAX_DEPTH
from patchjax.history.arrays.encodings.choosing import GAIN
from patchjax.history.arrays.index import Location
from patchjax.history.arrays.lineage import Member
from patchjax.history.arrays.places import Packs
from patchjax.history.upkeep.repack import RepackReport
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.upkeep.repack import Progress

_GROUP = 128 << 20  # bytes of leaves, or stored arrays, in memory at a time
_FEW = 8  # small packs from which on they are gathered


@dataclasses.dataclass(frozen=True)
class _Fate:
  """Where a leaf will be.

  Attributes:
    place: its place; of what moves, in a pack to be named.
    heavy: heavy differences in its chain.
    before: bytes it takes, as measured.
    after: bytes it will take.
    moves: whether it is written.
    recoded: whether it is encoded anew; what is not is copied as stored.
  """

  place: Location
  heavy: int
  before: float = 0
  after: float = 0
  moves: bool = False
  recoded: bool = False


class Repacking:
  """The state of one repack."""

  def __init__(self, repo: Repo, progress: Progress, dry_run: bool):
    self.repo = repo
    self.files = repo.files
    self.index = repo.index
    self.reader = repo.reader
    self.progress = progress
    self.dry_run = dry_run
    self.fates: dict[str, _Fate] = {}
    self.entries: dict[str, Entry] = {}
    self.packs = 0
    self._generations: dict[str, int] = {}

  def run(self) -> RepackReport:
    """Plans, writes and verifies."""
    self.index.refresh()
    members = lineage.members(self.repo)
    found = self.index.find([member.entry.digest for member in members])
    small = self._small(found)
    for done, member in enumerate(members):
      self.progress("leaves", done, len(members))
      places = found[member.entry.digest]
      if places:  # a partial clone lacks some
        self.entries[member.entry.digest] = member.entry
        self.fates[member.entry.digest] = self._weigh(member, places[0], small)
    moving = {d: fate for d, fate in self.fates.items() if fate.moves}
    if not self.dry_run:
      for done, group in self._groups(moving):
        self.progress("bytes", done, 0)
        self._write(group)
      self.index.refresh()
    recoded = sum(fate.recoded for fate in moving.values())
    return RepackReport(
      leaves=len(self.fates),
      recoded=recoded,
      gathered=len(moving) - recoded,
      packs=self.packs,
      before=round(sum(fate.before for fate in self.fates.values())),
      after=round(sum(fate.after for fate in self.fates.values())),
      dry_run=self.dry_run,
    )

  def _small(self, found: Mapping[str, list[Location]]) -> set[str]:
    """Returns the small packs that are to be gathered: none if they are few."""
    used = {places[0].pack for places in found.values() if places}
    small = {pack for pack in used if pack.startswith("blobs/")}
    return small if len(small) >= _FEW else set()

  def _weigh(self, member: Member, place: Location, small: set[str]) -> _Fate:
    """Decides on a leaf, once all that it may differ from is decided."""
    entry = member.entry
    stands = self._standing(place)
    fate = stands or _Fate(place, 0)
    if place.encoding == encodings.FACTORS.name and stands is not None:
      return self._kept(fate, small)  # the patch file is there in any case
    if entry.size * dtypes.itemsize(entry.dtype) < encodings.SMALLEST:
      if stands is not None:
        return self._kept(fate, small)
    sizes = self._sizes(member, place)
    plain = encodings.plain_encoding(entry.dtype)
    now = sizes.get((place.encoding, place.base), sizes[plain, None])
    (name, base), size = self._smallest(sizes, plain)
    if stands is not None and (
      size > GAIN * now or (name, base) == (place.encoding, place.base)
    ):
      fate = dataclasses.replace(fate, before=now, after=now)
      return self._kept(fate, small)
    below = self._fate(base) if base is not None else None
    return _Fate(
      dataclasses.replace(
        place,
        pack="",
        key=entry.digest,
        encoding=name,
        base=base,
        depth=0 if below is None else below.place.depth + 1,
      ),
      (0 if below is None else below.heavy) + ENCODINGS[name].heavy,
      before=now,
      after=size,
      moves=True,
      recoded=True,
    )

  def _standing(self, place: Location) -> _Fate | None:
    """Returns the fate of a leaf that stays as it is; None if it cannot.

    Where its base goes deeper, it does so too, and its index says it anew.
    """
    encoding = ENCODINGS.get(place.encoding)
    if encoding is None:
      return None
    if place.base is None:
      return _Fate(place, 0)
    below = self._fate(place.base)
    if below is None:
      return None
    heavy = below.heavy + encoding.heavy
    depth = below.place.depth + 1
    if heavy > chains.HEAVY or depth > MAX_DEPTH:
      return None
    if depth <= place.depth:
      return _Fate(place, heavy)
    return _Fate(dataclasses.replace(place, depth=depth), heavy, moves=True)

  def _fate(self, digest: str) -> _Fate | None:
    """Returns where a base will be; bases that no version names stay."""
    if digest not in self.fates:
      places = self.index.find([digest])[digest]
      if not places:
        return None
      place, heavy = places[0], 0
      encoding = ENCODINGS.get(place.encoding)
      if encoding is None:
        return None
      if place.base is not None:
        below = self._fate(place.base)
        if below is None:
          return None
        heavy = below.heavy + encoding.heavy
      self.fates[digest] = _Fate(place, heavy)
    return self.fates[digest]

  def _kept(self, fate: _Fate, small: set[str]) -> _Fate:
    if fate.place.pack in small:
      return dataclasses.replace(fate, moves=True)
    return fate

  def _sizes(
    self, member: Member, place: Location
  ) -> dict[tuple[str, str | None], float]:
    """Returns the bytes in each encoding, against each base, by one tile."""
    entry = member.entry
    grid = tiles.grid(entry.shape, dtypes.itemsize(entry.dtype))
    tile = grid[len(grid) // 2]
    scale = entry.size / tiles.size_of(tile)
    bases = list(dict.fromkeys(self._candidates(member, place)))
    wanted = [entry, *(dataclasses.replace(entry, digest=d) for d in bases)]
    new, *olds = self.reader.read_regions(
      [(member.name, leaf, tile) for leaf in wanted]
    )
    plain = encodings.plain_encoding(entry.dtype)
    sizes: dict[tuple[str, str | None], float] = {
      (plain, None): scale * encodings.measure(new, new, entry)[plain]
    }
    for digest, old in zip(bases, olds):
      for name, size in encodings.measure(new, old, entry).items():
        if ENCODINGS[name].delta:
          sizes[name, digest] = scale * size
    return sizes

  def _candidates(self, member: Member, place: Location) -> Iterator[str]:
    """Yields what a leaf may differ from: what is near, and below that."""
    if place.base is not None and self._fate(place.base) is not None:
      yield place.base
    for digest in member.near:
      fate = self.fates.get(digest)
      if fate is None:
        continue
      yield digest
      while fate is not None and fate.heavy and fate.place.base is not None:
        digest = fate.place.base
        fate = self._fate(digest)
      if fate is not None:
        yield digest

  def _smallest(
    self, sizes: Mapping[tuple[str, str | None], float], plain: str
  ) -> tuple[tuple[str, str | None], float]:
    """Returns the best of what can be read without much ado."""
    best, size = (plain, None), sizes[plain, None]
    limit = GAIN * size
    for (name, base), found in sizes.items():
      below = self._fate(base) if base is not None else None
      if below is None or below.place.depth >= MAX_DEPTH:
        continue
      if ENCODINGS[name].heavy and below.heavy:
        continue
      if found < min(limit, size):
        best, size = (name, base), found
    return best, size

  def _groups(
    self, moving: Mapping[str, _Fate]
  ) -> Iterator[tuple[int, dict[str, _Fate]]]:
    """Yields what is written together, with the bytes before it."""
    group: dict[str, _Fate] = {}
    size = done = 0
    for digest, fate in moving.items():
      entry = self.entries[digest]
      nbytes = entry.size * dtypes.itemsize(entry.dtype)
      if group and size + nbytes > _GROUP:
        yield done, group
        done, group, size = done + size, {}, 0
      group[digest] = fate
      size += nbytes
    if group:
      yield done, group

  def _write(self, group: Mapping[str, _Fate]) -> None:
    """Writes a group as one pack, which exists once it is verified."""
    old = {d: self.index.find([d])[d][0] for d in group}
    words = self._words(group)
    packs = Packs(self.files)
    places: list[Location] = []
    arrays: dict[str, np.ndarray] = {}
    for digest, fate in group.items():
      entry, place = self.entries[digest], fate.place
      encoding = ENCODINGS[place.encoding]
      base = words[place.base] if place.base is not None else None
      if fate.recoded:
        held = encoding.encode(words[digest], base, entry)
      else:
        fetch = packs.fetch(old[digest])
        held = {part: fetch(part) for part in encoding.parts}
        if held:
          place = dataclasses.replace(place, key=digest)
      storing.decode(entry, place, held, base, self.repo.objects.read)
      places.append(place)
      for part, array in held.items():
        arrays[encodings.key_of(place.key, part)] = array
    generation = 1 + max(self._generation(p.pack) for p in old.values())
    storing.store(
      self.files, places, arrays, generation=generation, remark="repacked"
    )
    self.packs += 1

  def _words(self, group: Mapping[str, _Fate]) -> dict[str, np.ndarray]:
    """Returns the words of leaves to encode, and of the bases of all."""
    wanted: dict[str, Entry] = {}
    for digest, fate in group.items():
      entry = self.entries[digest]
      if fate.recoded:
        wanted[digest] = entry
      if fate.place.base is not None:
        base = fate.place.base
        wanted[base] = dataclasses.replace(entry, digest=base)
    found = self.reader.read(wanted)
    for array in found.values():
      array.flags.writeable = False  # several leaves may need it
    return found

  def _generation(self, pack: str) -> int:
    if pack not in self._generations:
      self._generations[pack] = indices.generation(self.files, pack)
    return self._generations[pack]
