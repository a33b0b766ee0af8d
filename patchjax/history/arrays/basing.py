"""Which stored leaf a new one may be held as a difference to.

The obvious one is the leaf of that name in the parent: nothing is as small.
But differences in every word are costly to undo, and reading undoes one after
the other. Once a chain has `chains.HEAVY` of them, the new leaf rather starts
from below them. Unless it changes few words of the parent: then it still says
which.

Along a training run the difference to a fixed leaf grows, so that at some
point storing a leaf whole is cheaper than what all later versions would pay
for the old one. That point is taken to be where the difference to the far base
costs a tenth of the leaf more than the one to the parent would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from patchjax.history.arrays import chains, encodings, known
from patchjax.history.arrays.index import Index, Location
from patchjax.history.arrays.parts import Parts
from patchjax.history.arrays.reading import LeafReader
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.errors import IntegrityError

_EXCESS = 0.1  # of a leaf: what a far base may cost more than the parent
_FEW = 1 / 16  # share of changed words up to which saying where they are is all


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
    `{name: place}` of the leaves that may be differences; with the depth of
    the deepest place of each.
  """
  found = {}
  doubtful = {}
  places = chains.gather(index.find, {old.digest for old, _ in leaves.values()})
  for name, (old, new) in leaves.items():
    chain = chains.chain(old.digest, places)
    if chain is None:
      continue  # nothing can be read through it
    heavy = [i for i, place in enumerate(chain) if chains.is_heavy(place)]
    light = _reckoned(chain[heavy[-1] + 1 if heavy else 0], places)
    # At the end of a long chain a difference to its start is the next one.
    deep = light.depth >= encodings.MAX_DEPTH
    found[name] = _reckoned(chain[-1], places) if deep else light
    parent = _reckoned(chain[0], places)
    if heavy and parent.depth < encodings.MAX_DEPTH:
      if len(heavy) < chains.HEAVY:
        found[name] = parent
      elif new is not None:
        doubtful[name] = (old, new, found[name], parent)
  near, dropped = _near(doubtful, reader)
  found |= {name: doubtful[name][3] for name in near}
  return {name: at for name, at in found.items() if name not in dropped}


def _reckoned(place: Location, places: chains.Places) -> Location:
  """Returns a place with the depth that what lies above it reckons with."""
  return dataclasses.replace(place, depth=chains.depth(place.digest, places))


def _near(
  leaves: Mapping[str, tuple[Entry, Parts, Location, Location]],
  reader: LeafReader,
) -> tuple[list[str], list[str]]:
  """Returns the leaves close to the parent, and those far from their base.

  Looks at one tile of each.

  Args:
    leaves: by name the entry in the parent, the new bits, the place of the
      base and that of the parent.
    reader: reads tiles of both.
  """
  near, far = [], []
  regions = {
    name: grid[len(grid) // 2]
    for name, (old, _, _, _) in leaves.items()
    for grid in [tiles.grid(old.shape, dtypes.itemsize(old.dtype))]
  }
  parents = {name: old for name, (old, _, _, _) in leaves.items()}
  theirs = _tiles(parents, regions, reader)
  for name, words in theirs.items():
    new = leaves[name][1].read(regions[name])
    if np.count_nonzero(words != new) <= _FEW * words.size:
      near.append(name)
  below = {
    name: Entry(place.digest, old.dtype, old.shape)
    for name, (old, _, place, _) in leaves.items()
    if name in theirs and name not in near
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
