"""One run of `gc`: mark, decide, remove."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from patchjax.history.arrays import encodings, index
from patchjax.history.storage.objects import is_id, key_of
from patchjax.history.storage.refs import NOTES
from patchjax.history.upkeep import (
  bins,
  marking,
  superseding,
  sweeping,
  verifying,
)
from patchjax.history.upkeep.gc import GcReport, Progress, Removed
from patchjax.trees.errors import IntegrityError

if TYPE_CHECKING:
  from patchjax.history.arrays.index import Location
  from patchjax.history.repo import Repo


class GcRun:
  """The state of one collection."""

  def __init__(
    self,
    repo: Repo,
    cutoff: float,
    oldest: float,
    dry_run: bool,
    progress: Progress,
  ):
    self.repo = repo
    self.files = repo.files
    self.oldest = oldest
    self.dry_run = dry_run
    self.progress = progress
    self.bin = bins.bin_of(repo.files, cutoff)
    self.marks = marking.Marks(repo.objects, repo.objects.shallow)
    self.removed: list[Removed] = []
    self.damaged: set[str] = set()
    self.kinds: dict[str, str] = {}  # of what is to go, by key
    self.copies: set[str] = set()  # payloads and blobs that lie elsewhere too

  def run(self) -> GcReport:
    """Marks, decides and removes."""
    if not self.dry_run:
      self.bin.recover()
    # Listed before the refs are read: what appears later is no candidate.
    leftovers = bins.leftovers(self.files)
    objects = self._objects()
    packs = self._packs()
    notes = self._mark()
    if not self.dry_run:
      self._note(objects, packs, leftovers)
    # Of these some parts may be missing: their writers are not done yet.
    recent = [id_ for id_, fresh in objects.items() if fresh]
    self.marks.extend(recent)
    kept = self._kept(packs)
    # Copies were verified meanwhile: what moved since is seen now.
    before = len(self.marks.leaves)
    notes = self._mark()
    if len(self.marks.leaves) > before:
      kept = self._kept(packs)
    nodes = self._dead(objects, notes, packs, kept)
    for key in marking.expired(self.files, self.oldest):
      self.kinds[key] = "reflog"
      self._remove(key)
    gone = set(sweeping.sweep(nodes, self._remove))
    for key in leftovers:
      if not self.bin.stale(key):
        continue  # somebody may be writing it
      self.kinds[key] = "leftover"
      self._remove(key)
    if not self.dry_run:
      self.repo.objects.forget()
      self.repo.index.refresh()
    stay = [id_ for id_ in objects if key_of(id_) not in gone]
    return GcReport(
      removed=tuple(self.removed),
      kept={"objects": len(stay), "packs": len(packs.keys() - gone)},
      damaged=tuple(sorted(self.damaged)),
      dry_run=self.dry_run,
    )

  def _objects(self) -> dict[str, bool]:
    """Returns `{id: whether it is fresh}` of all objects."""
    found = {}
    for key in self.files.walk("objects"):
      id_ = key.removeprefix("objects/").replace("/", "")
      if is_id(id_):
        found[id_] = self.bin.fresh(key)
    return found

  def _packs(self) -> dict[str, list[Location]]:
    """Returns what the index of every payload and blob says.

    From the files: what was remembered of them may be old.
    """
    self.repo.index.refresh()  # what the reader will go by
    found = {}
    for pack in self.repo.index.packs():
      try:
        found[pack] = index.read(self.files, pack)
      except FileNotFoundError:
        continue  # removed since it was listed
      except IntegrityError as error:
        raise IntegrityError(
          f"{error}\nnothing was removed: what {pack} holds and needs cannot "
          "be known; run fsck, and mend it first"
        ) from error
    return found

  def _mark(self) -> dict[str, str]:
    """Marks what is reachable; returns `{commit: its latest note}`."""
    marks = self.marks
    before = set(marks.absent)
    marks.extend(marking.roots(self.files))
    notes = self.repo.refs.all(NOTES)
    marks.extend(note for c, note in notes.items() if c in marks.objects)
    bad = [text for id_, text in marks.absent.items() if id_ not in before]
    # What a killed writer's entry names may be there in part.
    before |= set(marks.absent)
    marks.extend(marking.logged(self.files, since=self.oldest))
    bad += [
      text
      for id_, text in marks.absent.items()
      if id_ not in before and self.files.exists(key_of(id_))
    ]
    if bad:
      listed = "\n".join(f"  {text}" for text in bad)
      raise IntegrityError(
        f"nothing was removed: {len(bad)} object(s) that are needed cannot be "
        f"read, so what they need cannot be known:\n{listed}\nrun fsck, and "
        "mend them first"
      )
    return notes

  def _note(
    self,
    objects: Iterable[str],
    packs: Mapping[str, Sequence[Location]],
    leftovers: Iterable[str],
  ) -> None:
    """Tells the bin what could go, were it old enough."""
    dead = {key_of(id_) for id_ in objects if id_ not in self.marks.objects}
    places = superseding.by_digest(packs, {})
    needed = superseding.needed(self.marks.leaves, packs, places)
    self.bin.note(dead | (packs.keys() - needed) | set(leftovers))

  def _kept(self, packs: Mapping[str, Sequence[Location]]) -> set[str]:
    """Returns the packs that must stay."""
    live = self.marks.leaves
    # A fresh pack may belong to a commit that is under way; one that holds
    # nothing but leaves of others does not.
    kept = {
      pack
      for pack, places in packs.items()
      if self.bin.fresh(pack) and any(p.digest not in live for p in places)
    }
    places = superseding.by_digest(packs, self._generations(packs))
    kept = superseding.needed(live, packs, places, kept)
    doubtful = {
      place.digest
      for pack in packs.keys() - kept
      for place in packs[pack]
      if place.digest in live
    }
    bad = self._damaged(doubtful)
    if bad:
      self.damaged |= bad
      kept |= {place.pack for digest in bad for place in places[digest]}
      kept = superseding.needed(live, packs, places, kept)
    # Leaves held as factors are read from patch files.
    self.marks.extend(id_ for pack in kept for id_ in _objects_of(packs[pack]))
    return kept

  def _generations(self, packs: Iterable[str]) -> dict[str, int]:
    found = {}
    for pack in packs:
      with contextlib.suppress(FileNotFoundError):
        found[pack] = index.generation(self.files, pack)
    return found

  def _damaged(self, digests: Iterable[str]) -> set[str]:
    """Returns the leaves of which some copy is not what it should be."""
    bad: set[str] = set()
    entries = {digest: self.marks.leaves[digest] for digest in sorted(digests)}
    done = 0
    for batch in verifying.batches(entries):
      done += len(batch)
      self.progress("copies", done, len(entries))
      bad |= verifying.verify(self.repo.reader, batch)[1].keys()
    return bad

  def _dead(
    self,
    objects: Iterable[str],
    notes: Mapping[str, str],
    packs: Mapping[str, Sequence[Location]],
    kept: Iterable[str],
  ) -> dict[str, set[str]]:
    """Returns `{key: keys that it uses}` of everything that is to go."""
    dead = [id_ for id_ in objects if id_ not in self.marks.objects]
    unused = {pack: packs[pack] for pack in packs.keys() - set(kept)}
    holding = collections.defaultdict(set)
    for pack, places in unused.items():
      live = [place.digest in self.marks.leaves for place in places]
      kind = "payload" if pack.startswith("payloads/") else "blob"
      self.kinds[pack] = "superseded" if any(live) else kind
      if places and all(live):
        self.copies.add(pack)
      for place in places:
        holding[place.digest].add(pack)
    nodes = {
      pack: set().union(
        *(holding[place.base] for place in places if place.base),
        map(key_of, _objects_of(places)),
      )
      for pack, places in unused.items()
    }
    for done, id_ in enumerate(dead):
      self.progress("unreachable", done, len(dead))
      try:
        links = marking.links(self.repo.objects.read(id_))
      except IntegrityError:
        links = marking.Links(marking.FILE)  # damaged, and nobody's
      key = key_of(id_)
      self.kinds[key] = links.kind
      nodes[key] = {key_of(name) for name in (*links.needs, *links.parents)}
      nodes[key].update(*(holding[leaf.digest] for leaf in links.leaves))
    for commit, note in notes.items():
      if commit not in self.marks.objects:
        key = f"{NOTES}/{commit}"
        self.kinds[key] = "note"
        nodes[key] = {key_of(note)}
        if key_of(commit) in nodes:
          nodes[key_of(commit)].add(key)
    return nodes

  def _remove(self, key: str) -> bool:
    """Removes something, or says so; returns whether it is gone."""
    item = Removed(self.kinds[key], key, self.bin.size(key))
    if not self.dry_run:
      if item.kind == "leftover":
        if not self.bin.discard(key):
          return False  # somebody went on with it
      elif item.kind == "reflog" or key.startswith(NOTES):
        self.bin.delete(key)
      elif not self.bin.remove(key, always=key in self.copies):
        return False  # in use again
    self.removed.append(item)
    return True


def _objects_of(places: Iterable[Location]) -> set[str]:
  """Returns the ids of the objects that leaves of a pack are read from."""
  found = {encodings.object_of(place.encoding, place.key) for place in places}
  return {id_ for id_ in found if id_ is not None}
