"""Reading leaves: from digests to verified bits.

Chains of differences are followed down to a whole leaf, each payload is opened
once for all arrays that are needed from it, and the digest of every leaf is
computed from the decoded bits before anybody sees them.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import numpy as np

from patchjax.history import blobs, encodings, payloads
from patchjax.history.files import Files
from patchjax.history.index import Index, Location
from patchjax.trees.digest import Entry, words_digest
from patchjax.trees.errors import IntegrityError


class LeafReader:
  """Reads leaves of a repository by digest.

  Attributes:
    files: files of the repository.
    index: its combined index.
  """

  def __init__(self, files: Files, index: Index):
    self.files = files
    self.index = index

  def read(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Returns the bits of leaves, verified.

    Args:
      entries: `{name: entry}` of the leaves.

    Returns:
      `{name: words}`, as `dtypes.from_words` takes them. Leaves of equal
      digest share one array.

    Raises:
      IntegrityError: lists every leaf that is missing or damaged.
    """
    self.index.refresh()
    unique = {entry.digest: entry for entry in entries.values()}
    words = {
      digest: empty(entry) for digest, entry in unique.items() if not entry.size
    }
    wanted = {d: e for d, e in unique.items() if d not in words}
    plan = self._plan(wanted)
    why: dict[str, str] = {}
    words |= self._decode(wanted, plan, why)
    for digest in [d for d in wanted if d not in words]:
      found = self._recover(wanted[digest], encodings.MAX_DEPTH + 1, why)
      if found is not None:
        words[digest] = found
    bad = {name: e for name, e in entries.items() if e.digest not in words}
    if bad:
      raise IntegrityError(self._explain(bad, why))
    return {name: words[entry.digest] for name, entry in entries.items()}

  def verify(
    self, entries: Mapping[str, Entry]
  ) -> tuple[set[str], dict[str, list[str]], set[str]]:
    """Reads leaves from every place that claims to hold them.

    Args:
      entries: `{digest: entry}`.

    Returns:
      `(good, why, used)`: digests that can be read from some place, what is
      wrong with the places of the others and of these, and the packs used.
    """
    plan = self._plan(entries)
    used = {place.pack for place in plan.values()}
    first: dict[str, str] = {}
    good = set(self._decode(entries, plan, first))
    why = collections.defaultdict(list)
    for digest, places in self.index.find(entries).items():
      entry = entries[digest]
      used |= {place.pack for place in places}
      if digest not in good:
        why[digest].append(first.get(digest, "stored in no payload"))
      for place in places[1:]:
        each: dict[str, str] = {}
        if self._from(place, entry, each) is None:
          why[digest].append(each[digest])
        else:
          good.add(digest)
    return good, dict(why), used

  def _plan(self, wanted: Iterable[str]) -> dict[str, Location]:
    """Returns where to read each leaf, and all the bases that it needs."""
    plan: dict[str, Location] = {}
    level = set(wanted)
    while level:
      for digest, places in self.index.find(level).items():
        if places:
          plan[digest] = places[0]
      bases = (plan[digest].base for digest in level if digest in plan)
      level = {base for base in bases if base is not None} - plan.keys()
    return plan

  def _decode(
    self,
    wanted: Mapping[str, Entry],
    plan: Mapping[str, Location],
    why: dict[str, str],
  ) -> dict[str, np.ndarray]:
    """Decodes what can be; says in `why` what cannot."""
    # A base has the dtype and shape of the leaf that is a difference to it.
    entries = dict(wanted)
    deepest = sorted(plan.values(), key=lambda loc: -loc.depth)
    for location in deepest:
      if location.base is not None and location.digest in entries:
        entry = entries[location.digest]
        entries.setdefault(
          location.base, Entry(location.base, entry.dtype, entry.shape)
        )
    keys = collections.defaultdict(set)
    uses = collections.Counter(wanted.keys())
    for location in plan.values():
      keys[location.pack].update(_keys(location))
      if location.base is not None:
        uses[location.base] += 1
    raw: dict[str, dict[str, np.ndarray]] = {}
    done: dict[str, np.ndarray] = {}
    words: dict[str, np.ndarray] = {}
    for location in reversed(deepest):
      digest, entry = location.digest, entries.get(location.digest)
      if entry is None:
        continue  # an index that contradicts itself
      if location.pack not in raw:
        raw[location.pack] = self._load(location.pack, keys[location.pack], why)
      stored = {
        key: raw[location.pack].pop(key)
        for key in _keys(location)
        if key in raw[location.pack]
      }
      base = done.get(location.base) if location.base is not None else None
      found = self._one(location, entry, stored, base, why)
      if location.base is not None:
        uses[location.base] -= 1
        if not uses[location.base]:
          done.pop(location.base, None)
      if found is not None:
        done[digest] = found
    for digest, entry in wanted.items():
      found = done.get(digest)
      if found is not None and self._verified(found, entry, plan[digest], why):
        words[digest] = found
    return words

  def _load(
    self, pack: str, keys: Iterable[str], why: dict[str, str]
  ) -> dict[str, np.ndarray]:
    try:
      if pack.startswith("blobs/"):
        return blobs.unpack(self.files.read(pack), pack[6:], keys)
      return payloads.load(self.files.path(pack), keys)
    except (IntegrityError, OSError) as error:
      why[pack] = str(error)
      return {}

  def _one(
    self,
    location: Location,
    entry: Entry,
    stored: Mapping[str, np.ndarray],
    base: np.ndarray | None,
    why: dict[str, str],
  ) -> np.ndarray | None:
    place = self.files.path(location.pack)
    if not stored:
      why[location.digest] = why.get(
        location.pack, f"{place} lacks the array {location.key!r}"
      )
      return None
    if location.base is not None and base is None:
      why[location.digest] = "its base is damaged or missing: " + why.get(
        location.base, location.base
      )
      return None
    try:
      encoding = encodings.ENCODINGS[location.encoding]
      parts = encodings.parts_of(stored, location.key, encoding)
      words = encoding.decode(entry, None, encodings.fetch_from(parts), base)
    except (ValueError, LookupError) as error:
      why[location.digest] = f"{place}, array {location.key!r}: {error}"
      return None
    if words.shape != encodings.words_shape(entry.dtype, entry.shape):
      why[location.digest] = (
        f"{place}, array {location.key!r}: expected the shape "
        f"{entry.shape}, found words of shape {words.shape}"
      )
      return None
    return words

  def _recover(
    self, entry: Entry, below: int, why: dict[str, str]
  ) -> np.ndarray | None:
    """Tries every place of a leaf, and of its bases, one by one."""
    for place in self.index.find([entry.digest])[entry.digest]:
      if place.depth >= below:
        break  # chains only go down: damaged indices must not make a loop
      words = self._from(place, entry, why)
      if words is not None:
        return words
    return None

  def _from(
    self, place: Location, entry: Entry, why: dict[str, str]
  ) -> np.ndarray | None:
    """Reads a leaf from one place, its base from wherever it is intact."""
    base = None
    if place.base is not None:
      below = Entry(place.base, entry.dtype, entry.shape)
      base = self._recover(below, place.depth, why)
    stored = self._load(place.pack, _keys(place), why)
    words = self._one(place, entry, stored, base, why)
    if words is not None and self._verified(words, entry, place, why):
      return words
    return None

  def _verified(
    self,
    words: np.ndarray,
    entry: Entry,
    place: Location,
    why: dict[str, str],
  ) -> bool:
    if words_digest(words, entry.dtype, entry.shape) == entry.digest:
      return True
    why[entry.digest] = (
      f"{self.files.path(place.pack)}, array {place.key!r}: the bits have "
      "another digest"
    )
    return False

  def _explain(self, bad: Mapping[str, Entry], why: Mapping[str, str]) -> str:
    lines = [f"{len(bad)} leaf/leaves cannot be read:"]
    for name, entry in sorted(bad.items()):
      reason = why.get(entry.digest, "stored in no payload of the repository")
      lines.append(
        f"  {name}: {entry.dtype}{list(entry.shape)}, digest "
        f"{entry.digest[:16]}: {reason}"
      )
    lines += [f"  {pack}: {text}" for pack, text in self.index.damaged.items()]
    lines.append(
      "to repair: put the named payloads or blobs back from another copy of "
      "the repository; or move the damaged ones out of it and commit a good "
      "copy of the value (leaves are found by content, so every version "
      "that shares them is whole again)"
    )
    return "\n".join(lines)


def _keys(location: Location) -> list[str]:
  """Returns the keys under which the arrays of a leaf may lie."""
  encoding = encodings.ENCODINGS.get(location.encoding)
  parts = ("",) if encoding is None else encoding.parts
  return [encodings.key_of(location.key, part) for part in parts]


def empty(entry: Entry) -> np.ndarray:
  """Returns the bits of a leaf without entries; it is stored nowhere.

  Args:
    entry: an entry whose shape has a zero.
  """
  shape = encodings.words_shape(entry.dtype, entry.shape)
  return np.zeros(shape, encodings.word_of(entry.dtype))
