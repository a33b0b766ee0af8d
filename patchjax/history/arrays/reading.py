"""Reading leaves: from digests to verified bits, whole or by region.

Where the best place of a leaf cannot be read, another is tried; before a leaf
is given up, the indices are read anew. Then all that is missing or damaged is
named at once, with what to do about it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from patchjax.history.arrays.decoding import Decoding, empty
from patchjax.history.arrays.index import Index
from patchjax.history.remotes import partial
from patchjax.history.storage.files import Files
from patchjax.history.storage.threads import each
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
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
    words = {d: empty(entry) for d, entry in unique.items() if not entry.size}
    session = Decoding(self.files, self.index)
    words |= session.decode({d: e for d, e in unique.items() if d not in words})
    if len(words) < len(unique):
      self._look_again()
      session = Decoding(self.files, self.index)
      absent = {d: e for d, e in unique.items() if d not in words}
      words |= session.decode(absent)
    bad = {name: e for name, e in entries.items() if e.digest not in words}
    if bad:
      raise IntegrityError(self._explain(bad, session.why))
    return {name: words[entry.digest] for name, entry in entries.items()}

  def read_regions(
    self, wanted: Sequence[tuple[str, Entry, tiles.Region]]
  ) -> list[np.ndarray]:
    """Returns the bits of regions of leaves, verified tile by tile.

    Only the chunks that hold the tiles around a region are read.

    Args:
      wanted: name, entry and region (of the leaf, without the words' last
        axis) of each.

    Returns:
      The words of each, in order; none of them shares memory with another.

    Raises:
      IntegrityError: lists every leaf that is missing or damaged.
    """
    self.index.refresh()
    session = Decoding(self.files, self.index)
    session.plan({entry.digest for _, entry, _ in wanted if entry.size})
    found = each(lambda item: session.region(item[1], item[2]), wanted)
    if any(words is None for words in found):
      self._look_again()
      session = Decoding(self.files, self.index)
      found = [
        session.region(item[1], item[2]) if words is None else words
        for item, words in zip(wanted, found)
      ]
    bad = {
      name: entry
      for (name, entry, _), words in zip(wanted, found)
      if words is None
    }
    if bad:
      raise IntegrityError(self._explain(bad, session.why))
    return [words for words in found if words is not None]

  def _look_again(self) -> None:
    """Reads all indices anew, before a leaf is given up.

    The cache may be damaged, or a `gc` in another process may just have taken
    a copy that it knew to lie elsewhere too.
    """
    self.index.forget()
    self.index.refresh()

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
    session = Decoding(self.files, self.index)
    good = set(session.decode(entries, recover=False))
    used = {place.pack for place in session.places.values()}
    why = collections.defaultdict(list)
    for digest, places in self.index.find(entries).items():
      entry = entries[digest]
      used |= {place.pack for place in places}
      if not places:
        why[digest].append("stored in no payload")
      # One place was read with the others; if in vain, that may be due to a
      # copy of its base.
      done = session.places[digest] if digest in good else None
      for place in places:
        if place == done:
          continue
        session.why.pop(digest, None)
        if session.read_from(place, entry, None) is None:
          why[digest].append(session.why[digest])
        else:
          good.add(digest)
    return good, dict(why), used

  def verify_in_parts(
    self, entry: Entry, bound: int
  ) -> tuple[bool, list[str], set[str]]:
    """Reads one leaf from every place, some of its tiles at a time.

    Args:
      entry: the leaf.
      bound: about how many bytes to hold in memory.

    Returns:
      `(good, why, used)`: whether it can be read from some place, what is
      wrong with the others, and the packs used.
    """
    session = Decoding(self.files, self.index)
    session.plan([entry.digest])
    if not session.knows_tiles(entry):
      good, all_why, used = self.verify({entry.digest: entry})
      return bool(good), all_why.get(entry.digest, []), used
    places = self.index.find([entry.digest])[entry.digest]
    used = {place.pack for place in (*session.places.values(), *places)}
    itemsize = dtypes.itemsize(entry.dtype)
    grid = tiles.grid(entry.shape, itemsize)
    why: list[str] = []
    for place in places:
      for region in _slabs(grid, bound // itemsize):
        session.why.pop(entry.digest, None)
        if session.read_from(place, entry, region) is None:
          why.append(session.why[entry.digest])
          break
    return len(why) < len(places), why, used

  def _explain(self, bad: Mapping[str, Entry], why: Mapping[str, str]) -> str:
    absent = [n for n, e in bad.items() if e.digest not in why]
    if len(absent) == len(bad):
      left_out = partial.explain(self.files, absent)
      if left_out is not None:
        return left_out
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


def _slabs(grid: tiles.Grid, size: int) -> Iterator[tiles.Region]:
  """Yields regions that make up a leaf: slices along its longest row of tiles.

  Args:
    grid: how the leaf is cut.
    size: about how many elements a slab may have; at least a tile's width.
  """
  axis = max(range(len(grid.shape)), key=lambda d: grid.counts[d])
  edges = grid.edges[axis]
  width = max(size // (math.prod(grid.shape) // grid.shape[axis]), 1)
  start = 0
  while start < len(edges) - 1:
    stop = start + 1
    while stop + 1 < len(edges) and edges[stop + 1] - edges[start] <= width:
      stop += 1
    region = list(tiles.whole(grid.shape))
    region[axis] = slice(edges[start], edges[stop])
    yield tuple(region)
    start = stop
