"""Which stored leaf a new one may be held as a difference to.

The obvious one is the leaf of that name in the parent. If that is costly to
decode itself (a difference in every word), a chain of such differences would
have to be undone one after the other: then the new leaf rather starts from
below them, where it costs hardly more bytes. Unless it changes few words of
the parent: then nothing is as small as saying which.

Each difference in every word that lies below a leaf makes reading it dearer.
And the bytes: along a training run the difference to a fixed leaf grows, so
that at some point storing a leaf whole is cheaper than what all later versions
would pay for the old one. That point is taken to be where the difference to
the far base costs a tenth of the leaf more than the one to the parent would.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from patchjax.history.arrays import encodings, known
from patchjax.history.arrays.index import Index, Location
from patchjax.history.arrays.parts import Parts
from patchjax.history.arrays.reading import LeafReader
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.errors import IntegrityError

_EXCESS = 0.1  # of a leaf: what a far base may cost more than the parent
_HEAVY = 3  # differences in every word that factors may lie on top of
_FEW = 1 / 16  # share of changed words up to which saying where they are is all


def bases(
  leaves: Mapping[str, tuple[Entry, Parts | None]],
  index: Index,
  reader: LeafReader,
  patched: Collection[str] = (),
) -> dict[str, Location]:
  """Returns where the bases of leaves are stored.

  Args:
    leaves: by name the entry of the leaf in the parent, and the new bits; None
      if this process does not hold them all.
    index: of the repository.
    reader: reads tiles of parents.
    patched: names of leaves that a patch made: they are differences to the
      parent, whose factors are smaller than anything else.

  Returns:
    `{name: place}` of the leaves that may be differences.
  """
  found = {}
  doubtful = {}
  chains = _chains({old.digest for old, _ in leaves.values()}, index)
  for name, (old, new) in leaves.items():
    chain = chains[old.digest]
    heavy = [i for i, place in enumerate(chain) if _is_heavy(place)]
    light = heavy[-1] + 1 if heavy else 0
    if light < len(chain):
      # At the end of a long chain a difference to its start is the next one.
      deep = chain[light].depth >= encodings.MAX_DEPTH
      found[name] = chain[-1] if deep else chain[light]
    if light and chain[0].depth < encodings.MAX_DEPTH:
      if name in patched and len(heavy) < _HEAVY:
        found[name] = chain[0]
      elif new is not None:
        doubtful[name] = (old, new, found.get(name))
  near, dropped = _near(doubtful, reader)
  found |= {name: chains[leaves[name][0].digest][0] for name in near}
  return {name: at for name, at in found.items() if name not in dropped}


def _chains(digests: set[str], index: Index) -> dict[str, list[Location]]:
  """Returns the places of leaves and of all that they differ from."""
  places: dict[str, Location] = {}
  level = digests
  while level:
    found = index.find(level)
    new = {digest: at[0] for digest, at in found.items() if at}
    places |= new
    level = {place.base for place in new.values() if place.base is not None}
    level -= places.keys()
  chains = {}
  for digest in digests:
    chain: list[Location] = []
    at: str | None = digest
    # An index that contradicts itself must not be followed in circles.
    while at in places and len(chain) <= encodings.MAX_DEPTH:
      chain.append(places[at])
      at = places[at].base
    chains[digest] = chain
  return chains


def _is_heavy(place: Location) -> bool:
  encoding = encodings.ENCODINGS.get(place.encoding)
  return encoding is not None and encoding.heavy


def _near(
  leaves: Mapping[str, tuple[Entry, Parts, Location | None]],
  reader: LeafReader,
) -> tuple[list[str], list[str]]:
  """Returns the leaves close to the parent, and those far from their base.

  Looks at one tile of each.
  """
  near, far = [], []
  regions = {
    name: grid[len(grid) // 2]
    for name, (old, _, _) in leaves.items()
    for grid in [tiles.grid(old.shape, dtypes.itemsize(old.dtype))]
  }
  parents = {name: old for name, (old, _, _) in leaves.items()}
  theirs = _tiles(parents, regions, reader)
  for name, words in theirs.items():
    new = leaves[name][1].read(regions[name])
    if np.count_nonzero(words != new) <= _FEW * words.size:
      near.append(name)
  below = {
    name: Entry(place.digest, old.dtype, old.shape)
    for name, (old, _, place) in leaves.items()
    if place is not None and name in theirs and name not in near
  }
  for name, words in _tiles(below, regions, reader).items():
    new = leaves[name][1].read(regions[name])
    whole, size = _sizes(new, words, below[name])
    if size > _sizes(new, theirs[name], below[name])[1] + _EXCESS * whole:
      far.append(name)
  return near, far


def _sizes(
  new: np.ndarray, old: np.ndarray, entry: Entry
) -> tuple[float, float]:
  """Returns what a tile takes whole, and as a difference."""
  sizes = encodings.measure(new, old, entry)
  plain = sizes.pop(encodings.plain_encoding(entry.dtype))
  return plain, min(sizes.values())


def _tiles(
  leaves: Mapping[str, Entry],
  regions: Mapping[str, tiles.Region],
  reader: LeafReader,
) -> dict[str, np.ndarray]:
  """Returns one tile of each leaf that can be read."""
  found = {}
  for name, entry in leaves.items():
    held = known.parts_of(entry.digest)
    if held is not None and held.is_whole:
      found[name] = held.read(regions[name])
  absent = [name for name in leaves if name not in found]
  if not absent:
    return found  # reading nothing would look for new packs all the same
  try:
    read = reader.read_regions(
      [(name, leaves[name], regions[name]) for name in absent]
    )
    found |= dict(zip(absent, read, strict=True))
  except IntegrityError:
    pass  # a damaged leaf is no base
  return found
