"""Decoding leaves: along a chain of differences, until the digest agrees.

A leaf that is held as a difference is decoded from the same region of its
base, down to one that is whole; nothing else is read. What is decoded is
verified before anybody sees it: a whole leaf by its digest, a region tile by
tile, by the digests of tiles that hash to the leaf's.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from patchjax.history.arrays import chains, encodings
from patchjax.history.arrays.index import Index, Location
from patchjax.history.arrays.places import Packs
from patchjax.history.storage.files import Files
from patchjax.history.storage.threads import each
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry, root, tile_digests, words_digest
from patchjax.trees.errors import IntegrityError, PatchjaxError


class Decoding:
  """One call of a reader: what is open, and what went wrong.

  Attributes:
    files: files of the repository.
    index: its combined index.
    why: why a leaf (by digest) cannot be read.
    places: where each leaf, and each base, is read first.
  """

  def __init__(self, files: Files, index: Index):
    self.files = files
    self.index = index
    self.why: dict[str, str] = {}
    self.places: dict[str, Location] = {}
    self._packs = Packs(files)

  def plan(self, digests: Collection[str]) -> None:
    """Finds leaves and all their bases, and opens what holds them.

    Args:
      digests: digests of the leaves.
    """
    places = chains.gather(self.index.find, digests)
    self.places = chains.routes(digests, places)
    self._packs.open(self.places.values())

  def decode(
    self, wanted: Mapping[str, Entry], *, recover: bool = True
  ) -> dict[str, np.ndarray]:
    """Returns the verified words of the whole leaves that can be read.

    Args:
      wanted: `{digest: entry}`.
      recover: whether to try every place of a leaf, not only the best.
    """
    self.plan(wanted.keys())
    words: dict[str, np.ndarray] = {}
    for part in each(
      lambda family: self._decode_family(family, wanted), self._families(wanted)
    ):
      words |= part
    if recover:
      for digest in [d for d in wanted if d not in words]:
        found = self._recover(wanted[digest], None)
        if found is not None:
          words[digest] = found
    return words

  def _families(self, wanted: Iterable[str]) -> list[list[str]]:
    """Groups leaves that share bases: each base is decoded once."""
    ends: dict[str, list[str]] = collections.defaultdict(list)
    for digest in wanted:
      end = collections.deque(chains.along(digest, self.places), maxlen=1)
      for place in end:
        ends[place.digest].append(digest)
    return list(ends.values())

  def _decode_family(
    self, family: Sequence[str], wanted: Mapping[str, Entry]
  ) -> dict[str, np.ndarray]:
    chain: dict[str, Entry] = {}  # every leaf to decode
    uses: collections.Counter[str] = collections.Counter()
    for digest in family:
      entry = wanted[digest]
      for place in chains.along(digest, self.places):
        if place.digest in chain:
          break
        # A base has the dtype and shape of what is a difference to it.
        chain[place.digest] = Entry(place.digest, entry.dtype, entry.shape)
        if place.base is not None:
          uses[place.base] += 1
    done: dict[str, np.ndarray] = {}
    words: dict[str, np.ndarray] = {}
    for digest in sorted(chain, key=self._links):
      place = self.places[digest]
      base = done.get(place.base) if place.base is not None else None
      if place.base is not None:
        uses[place.base] -= 1
        if not uses[place.base]:
          done.pop(place.base, None)
        if base is not None and (uses[place.base] or place.base in wanted):
          # Decoding takes over what it may write to.
          base = base.view()
          base.flags.writeable = False
      found = self._decode_one(place, chain[digest], None, base)
      if found is None:
        continue
      if uses[digest]:
        done[digest] = found
      if digest in wanted and self._verified(found, wanted[digest], place):
        words[digest] = found
    return words

  def _links(self, digest: str) -> int:
    """Returns how many places a leaf is read from."""
    return sum(1 for _ in chains.along(digest, self.places))

  def region(self, entry: Entry, region: tiles.Region) -> np.ndarray | None:
    """Returns the verified words of a region; None if it cannot be read.

    Args:
      entry: the leaf, which was planned.
      region: the region of it.
    """
    if not tiles.size_of(region):
      return empty(Entry(entry.digest, entry.dtype, tiles.shape_of(region)))
    grid = tiles.grid(entry.shape, dtypes.itemsize(entry.dtype))
    around = grid.widened(region)
    whole = around == tiles.whole(entry.shape) or self._tiles(entry) is None
    if whole:
      around = tiles.whole(entry.shape)
    words = self._through(entry, None if whole else around)
    if words is None:
      words = self._recover(entry, None if whole else around)
    if words is None or around == region:
      return words
    # A copy: a view would keep the tiles around it in memory.
    return words[tiles.within(region, around)].copy()

  def _through(
    self, entry: Entry, region: tiles.Region | None
  ) -> np.ndarray | None:
    """Decodes a region through the planned chain, and verifies the end."""
    chain = list(chains.along(entry.digest, self.places))
    words = None
    for link in reversed(chain):
      below = Entry(link.digest, entry.dtype, entry.shape)
      words = self._decode_one(link, below, region, words)
      if words is None:
        return None
    if words is not None and self._verified(words, entry, chain[0], region):
      return words
    return None

  def _recover(
    self,
    entry: Entry,
    region: tiles.Region | None,
    above: frozenset[str] = frozenset(),
  ) -> np.ndarray | None:
    """Tries every place of a leaf, and of its bases, one by one.

    `above` are the leaves that are to be decoded from it: damaged indices
    must not make a loop.
    """
    for place in self.index.find([entry.digest])[entry.digest]:
      if place.base in above:
        self.why[entry.digest] = "its base is a difference to it"
        continue
      words = self.read_from(place, entry, region, above)
      if words is not None:
        return words
    return None

  def read_from(
    self,
    place: Location,
    entry: Entry,
    region: tiles.Region | None,
    above: frozenset[str] = frozenset(),
  ) -> np.ndarray | None:
    """Reads a leaf from one place, its base from wherever it is intact.

    Args:
      place: the place.
      entry: the leaf.
      region: which part of it, made of whole tiles; None for all.
      above: leaves that are to be decoded from it.

    Returns:
      The verified words; None if they cannot be read, and `why` says so.
    """
    base = None
    if place.base is not None:
      below = Entry(place.base, entry.dtype, entry.shape)
      base = self._recover(below, region, above | {entry.digest})
    words = self._decode_one(place, entry, region, base)
    if words is not None and self._verified(words, entry, place, region):
      return words
    return None

  def _decode_one(
    self,
    place: Location,
    entry: Entry,
    region: tiles.Region | None,
    base: np.ndarray | None,
  ) -> np.ndarray | None:
    """Decodes one link of a chain; says in `why` why it cannot."""
    where = f"{self.files.path(place.pack)}, array {place.key!r}"
    if place.base is not None and base is None:
      why = self.why.get(place.base, "stored in no payload of the repository")
      self.why[entry.digest] = (
        f"its base {place.base[:16]} is damaged or missing: {why}"
      )
      return None
    shape = entry.shape if region is None else tiles.shape_of(region)
    expected = encodings.words_shape(entry.dtype, shape)
    try:
      encoding = encodings.ENCODINGS[place.encoding]
      fetch = self._packs.fetch(place)
      words = encoding.decode(entry, region, fetch, base)
    except IntegrityError as error:
      self.why[entry.digest] = str(error)
      return None
    except (PatchjaxError, ValueError, LookupError) as error:
      self.why[entry.digest] = f"{where}: {error}"
      return None
    if words.shape != expected:
      self.why[entry.digest] = (
        f"{where}: expected the shape {entry.shape}, found words of shape "
        f"{words.shape}"
      )
      return None
    return words

  def knows_tiles(self, entry: Entry) -> bool:
    """Returns whether a region of a leaf can be verified on its own.

    Args:
      entry: the leaf.
    """
    return self._tiles(entry) is not None

  def _tiles(self, entry: Entry) -> list[bytes] | None:
    """Returns the digests of the tiles of a leaf, if some index knows them."""
    for place in self.index.find([entry.digest])[entry.digest]:
      if place.tiles is None:
        continue
      try:
        octets = bytes.fromhex(place.tiles)
      except ValueError:
        continue
      level = [octets[i : i + 32] for i in range(0, len(octets), 32)]
      if root(level, entry.dtype, entry.shape) == entry.digest:
        return level
    return None

  def _verified(
    self,
    words: np.ndarray,
    entry: Entry,
    place: Location,
    region: tiles.Region | None = None,
  ) -> bool:
    if region is None:
      fine = words_digest(words, entry.dtype, entry.shape) == entry.digest
    else:
      known = self._tiles(entry)
      grid = tiles.grid(entry.shape, dtypes.itemsize(entry.dtype))
      numbers = grid.inside(region)
      found = tile_digests(words, entry.shape, region, numbers)
      fine = known is not None and found == [known[n] for n in numbers]
    if not fine:
      self.why[entry.digest] = (
        f"{self.files.path(place.pack)}, array {place.key!r}: the bits have "
        "another digest"
      )
    return fine


def empty(entry: Entry) -> np.ndarray:
  """Returns the bits of a leaf without entries; it is stored nowhere.

  Args:
    entry: an entry whose shape has a zero.
  """
  shape = encodings.words_shape(entry.dtype, entry.shape)
  return np.zeros(shape, encodings.word_of(entry.dtype))
