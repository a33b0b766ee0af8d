"""Which payloads and blobs are needed, where leaves lie in several places.

After a repack, and after two writers raced, a leaf lies in more than one
place. A pack is needed if some leaf is read best from it. Of a pack that is
needed every leaf stays readable: a leaf that an index lists, with all that it
is a difference to, counts as stored, and the next commit may rely on it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from patchjax.history.arrays import chains, encodings
from patchjax.history.arrays.index import INDEX, Index, Location
from patchjax.history.storage.files import Files
from patchjax.history.storage.objects import key_of

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
    found |= _packs(digest, places)
  stack = list(found)
  while stack:
    for place in packs.get(stack.pop(), ()):
      below = _packs(place.digest, places)
      stack += below - found
      found |= below
  return found


def _packs(digest: str, places: Places) -> set[str]:
  read = chains.chain(digest, places) or places.get(digest, ())
  return {place.pack for place in read}


def claim(files: Files, index: Index, digests: Iterable[str]) -> set[str]:
  """Returns which leaves need not be written, and keeps them from a `gc`.

  Args:
    files: files of the repository.
    index: its combined index, refreshed.
    digests: digests of leaves that a commit is going to refer to.

  Returns:
    Leaves that are stored with all that they are differences to.
  """
  digests = set(digests)
  places = chains.gather(index.find, digests)
  found = {d: chain for d in digests if (chain := chains.chain(d, places))}
  keys = {d: _keys(chain) for d, chain in found.items()}
  touched = set().union(*keys.values())
  # What belongs to another user cannot be freshened: it is there, at least.
  gone = {k for k in touched if not files.freshen(k) and not files.exists(k)}
  return {digest for digest in found if not keys[digest] & gone}


def _keys(places: Iterable[Location]) -> set[str]:
  """Returns the keys of the files by whose time a `gc` goes."""
  found = set()
  for place in places:
    inside = place.pack.startswith("payloads/")
    found.add(f"{place.pack}/{INDEX}" if inside else place.pack)
    object_ = encodings.object_of(place.encoding, place.key)
    found |= set() if object_ is None else {key_of(object_)}
  return found
