"""Chains of differences: from a leaf to its base, down to one that is whole.

A leaf may lie in several places, each with another base, and indices that were
written by different writers may even run in circles. Whoever reads a leaf, or
wants to know what it takes to read it, looks here. A way is found by the
leaves it meets, never by the `depth` that an index notes: a repack or a `gc`
may have moved a base since that was written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from patchjax.history.arrays import encodings
from patchjax.history.arrays.index import Location

HEAVY = 4
"""Differences in every word that a chain may have, before reading is slow."""

Find = Callable[[Iterable[str]], Mapping[str, list[Location]]]
Places = Mapping[str, Collection[Location]]


def is_heavy(place: Location) -> bool:
  """Returns whether a difference costs time for each word of the leaf.

  Args:
    place: where the leaf is.
  """
  encoding = encodings.ENCODINGS.get(place.encoding)
  return encoding is not None and encoding.heavy


def gather(
  find: Find, digests: Iterable[str], known: Collection[str] = ()
) -> dict[str, list[Location]]:
  """Returns every place of leaves, and of all that any of these differs from.

  Args:
    find: says where leaves are, as `Index.find` does.
    digests: digests of the leaves.
    known: leaves that need not be looked at.

  Returns:
    `{digest: places}`; an empty list for a leaf that is stored nowhere.
  """
  places: dict[str, list[Location]] = {}
  # Each leaf is looked at once, however the chains are entangled.
  level = {digest for digest in digests if digest not in known}
  while level:
    found = find(level)
    places |= {digest: list(found[digest]) for digest in level}
    bases = {p.base for each in found.values() for p in each if p.base}
    level = {b for b in bases if b not in places and b not in known}
  return places


def chain(
  digest: str, places: Places, avoiding: Collection[str] = ()
) -> list[Location] | None:
  """Returns where a leaf is read from, down to one that is whole.

  Args:
    digest: digest of the leaf.
    places: where it and its bases are; of each leaf the best place first.
    avoiding: leaves that must be no part of it, such as one that is itself
      to be read from it.

  Returns:
    The places, that of the leaf first; None if it cannot be read.
  """
  if digest in avoiding:
    return None
  found: list[Location] = []
  # A leaf from which there was no way down is not tried again from elsewhere:
  # what it could have used besides is being tried already.
  met = {digest, *avoiding}
  stack: list[Iterator[Location]] = [iter(places.get(digest, ()))]
  while stack:
    place = next(stack[-1], None)
    if place is None:
      stack.pop()
      if found:
        found.pop()
    elif place.base is None:
      return [*found, place]
    elif place.base not in met:
      met.add(place.base)
      found.append(place)
      stack.append(iter(places.get(place.base, ())))
  return None


def routes(digests: Iterable[str], places: Places) -> dict[str, Location]:
  """Returns one place for each of some leaves and the bases they are read by.

  Args:
    digests: digests of the leaves.
    places: see `chain`.

  Returns:
    `{digest: place}`, in which every base has a place again, without circles.
    What cannot be read is not among them.
  """
  found: dict[str, Location] = {}
  for digest in digests:
    for place in chain(digest, places) or ():
      if place.digest in found:
        break  # from here on there is a way already
      found[place.digest] = place
  return found


def along(digest: str, routes: Mapping[str, Location]) -> Iterator[Location]:
  """Yields the places of a leaf and of its bases, the leaf's first.

  Args:
    digest: digest of the leaf.
    routes: see `routes`.
  """
  below: str | None = digest
  while below is not None and (place := routes.get(below)) is not None:
    yield place
    below = place.base


def depth(digest: str, places: Places) -> int:
  """Returns how many differences a leaf may take, in the worst of its places.

  Which of them is read years from now is not known: what is going to be a
  difference to it reckons with the longest.

  Args:
    digest: digest of a leaf that can be read.
    places: see `chain`.
  """
  depths = [0]
  for place in places.get(digest, ()):
    if place.base is not None:
      rest = chain(place.base, places, {digest})
      depths.append(len(rest or ()))
  return max(depths)


def explain(digest: str, places: Places) -> str:
  """Returns why a leaf has no chain, naming the base at fault.

  Args:
    digest: digest of a leaf that has none.
    places: see `chain`.
  """
  seen = {digest}
  stack = [digest]
  while stack:
    at = stack.pop()
    if not places.get(at):
      if at == digest:
        return "stored in no payload of the repository"
      return f"its base {at[:16]} is stored in no payload of the repository"
    bases = {place.base for place in places[at] if place.base} - seen
    seen |= bases
    stack += sorted(bases)
  return (
    "its bases are differences to each other, and none is stored whole: "
    + ", ".join(sorted(base[:16] for base in seen))
  )
