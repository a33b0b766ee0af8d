"""Which stored leaf a new one may be held as a difference to.

The obvious one is the leaf of that name in the parent. If that is costly to
decode itself (a difference in every word), a chain of such differences would
have to be undone one after the other: then the new leaf rather starts from
below them, where it costs hardly more bytes. Unless it changes few words of
the parent: then nothing is as small as saying which.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patchjax.history import encodings, known
from patchjax.history.index import Index, Location
from patchjax.history.parts import Parts
from patchjax.history.reading import LeafReader
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.errors import IntegrityError

_FEW = 1 / 6  # share of changed words up to which their places are worth saying


def bases(
  leaves: Mapping[str, tuple[Entry, Parts | None]],
  index: Index,
  reader: LeafReader,
) -> dict[str, Location]:
  """Returns where the bases of leaves are stored.

  Args:
    leaves: by name the entry of the leaf in the parent, and the new bits; None
      if this process does not hold them all.
    index: of the repository.
    reader: reads tiles of parents.

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
      found[name] = chain[light]
    if light and new is not None:
      doubtful[name] = (old, new)
  found |= {
    name: chains[leaves[name][0].digest][0] for name in _near(doubtful, reader)
  }
  return {
    name: place
    for name, place in found.items()
    if place.depth < encodings.MAX_DEPTH
  }


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
  leaves: Mapping[str, tuple[Entry, Parts]], reader: LeafReader
) -> list[str]:
  """Returns the leaves that share nearly all words with the parent's.

  Looks at one tile of each.
  """
  regions = {}
  theirs: dict[str, np.ndarray] = {}
  for name, (old, _) in leaves.items():
    grid = tiles.grid(old.shape, dtypes.itemsize(old.dtype))
    regions[name] = grid[len(grid) // 2]
    held = known.parts_of(old.digest)
    if held is not None and held.is_whole:
      theirs[name] = held.read(regions[name])
  absent = [name for name in leaves if name not in theirs]
  try:
    read = reader.read_regions(
      [(name, leaves[name][0], regions[name]) for name in absent]
    )
    theirs |= dict(zip(absent, read, strict=True))
  except IntegrityError:
    pass  # a damaged parent is no base
  return [
    name
    for name, words in theirs.items()
    if np.count_nonzero(words != leaves[name][1].read(regions[name]))
    <= _FEW * words.size
  ]
