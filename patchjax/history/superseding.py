"""Which payloads and blobs are needed, where leaves lie in several places.

After a repack, and after two writers raced, a leaf lies in more than one
place. A pack is needed if some leaf is read best from it. Of a pack that is
needed every leaf stays readable: a leaf that an index lists counts as stored,
and the next commit may rely on it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from patchjax.history.index import Location

Places = Mapping[str, Sequence[Location]]


def by_digest(
  packs: Mapping[str, Sequence[Location]], generations: Mapping[str, int]
) -> dict[str, list[Location]]:
  """Returns the places of each leaf, the best first.

  Args:
    packs: `{pack: what its index says}`.
    generations: `{pack: how often its leaves were repacked}`.

  Returns:
    `{digest: places}`: repacked ones first, then short chains.
  """
  places = collections.defaultdict(list)
  for locations in packs.values():
    for place in locations:
      places[place.digest].append(place)
  for found in places.values():
    found.sort(key=lambda p: (-generations.get(p.pack, 0), p.depth, p.pack))
  return dict(places)


def needed(
  leaves: Iterable[str],
  packs: Mapping[str, Sequence[Location]],
  places: Places,
  kept: Iterable[str] = (),
) -> set[str]:
  """Returns the packs that are needed to read some leaves.

  Args:
    leaves: digests of the leaves.
    packs: `{pack: what its index says}`.
    places: see `by_digest`.
    kept: packs that stay in any case.

  Returns:
    Packs from which every one of the leaves, and every leaf in any of these
    packs, is read without the others. Of a leaf that cannot be read (its base
    is gone) every place is needed: one may be mended yet.
  """
  found = set(kept)
  for digest in leaves:
    found |= _chain(digest, places) or {
      place.pack for place in places.get(digest, ())
    }
  stack = list(found)
  while stack:
    for place in packs.get(stack.pop(), ()):
      if place.base is not None:
        below = _chain(place.base, places, place.depth) or {
          other.pack for other in places.get(place.base, ())
        }
        stack += below - found
        found |= below
  return found


def _chain(
  digest: str, places: Places, below: float = float("inf")
) -> set[str] | None:
  """Returns the packs that a leaf is read from; None if it cannot be."""
  for place in places.get(digest, ()):
    # Chains only go down, and readers rely on it.
    if place.depth >= below:
      continue
    if place.base is None:
      return {place.pack}
    rest = _chain(place.base, places, place.depth)
    if rest is not None:
      return {place.pack, *rest}
  return None
