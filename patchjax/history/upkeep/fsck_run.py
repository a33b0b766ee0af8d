"""One run of `fsck`: refs, objects, what they reach, payloads, leaves.

Refs are read first: what writers add meanwhile is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from patchjax.history.arrays import chains, encodings
from patchjax.history.remotes import partial
from patchjax.history.storage import config, reflog, shallow
from patchjax.history.storage.objects import is_id, key_of
from patchjax.history.storage.refs import HEADS, NOTES, REMOTES, TAGS
from patchjax.history.upkeep import bins, marking, verifying
from patchjax.history.upkeep.fsck import FsckReport, Problem, Progress
from patchjax.trees.errors import IntegrityError, PatchjaxError
from patchjax.trees.names import join

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

_Place = tuple[str, ...]  # commit, then the parts of a name
_Step = tuple[str, str, str, _Place]  # object id, its kind, who needs it, where

_REPAIR_REF = (
  "write the id of its last commit and a newline into the file: `patchjax "
  "reflog` names it; dangling commits, listed below, are candidates too"
)
_REPAIR_NOTE = (
  "remove the file and attach the note again; or write the id of the latest "
  "note object into it, listed below as dangling"
)
_REPAIR_REMOTE = "remove the file, and fetch"
_REPAIR_LOG = "remove the file: only the memory of one move goes with it"
_REPAIR_OBJECT = (
  "remove the file, if it is there, and copy it from another copy of the "
  "repository; a tree comes back by committing the same value again"
)
_REPAIR_TRASH = "run gc: it puts back what one that was killed had taken away"
_REPAIR_STRANGER = "move the file out of the repository"
_REPAIR_SETTINGS = "remove the file, and add the remotes again"
_REPAIR_SHALLOW = (
  "write the ids of the commits whose parents are missing into it, a line "
  "each; or fetch all (`patchjax fetch --complete`)"
)
_REPAIR_PACK = (
  "copy it from another copy of the repository; or move it out of this one "
  "and commit a good copy of the value: leaves are found by content, so "
  "every version that shares them is whole again"
)
_REPAIR_COPY = (
  "another place holds the leaf intact, and is read instead; move the "
  "damaged payload or blob out of the repository"
)


class FsckRun:
  """The state of one check."""

  def __init__(self, repo: Repo, quick: bool, progress: Progress):
    self.repo = repo
    self.quick = quick
    self.progress = progress
    self.problems: list[Problem] = []
    self.kinds: dict[str, str] = {}  # of every intact object
    self.needed: dict[str, str] = {}  # object id -> who needs it
    self.leaves: dict[str, Entry] = {}
    self.names: dict[str, str] = {}  # leaf digest -> `commit: name`
    self.boundary: frozenset[str] = frozenset()  # commits without parents here
    self.left_out = 0  # leaves that a partial clone did not copy
    self.leftovers = bins.leftovers(repo.files)

  def run(self) -> FsckReport:
    """Checks everything."""
    self._settings()
    refs = self._refs()
    past, maybe = self._moves()
    names = self._objects()
    # What only a killed writer's log entry names may be there in part.
    for steps, strict in ((refs, True), (past, True), (maybe, False)):
      self._reach(steps, strict)
    packs = self._packs()
    self._leave_out()
    used = self._leaves()
    commits = sum(self.kinds.get(name) == "commit" for name in self.needed)
    dangling = [
      f"{kind} {name}"
      for name, kind in self.kinds.items()
      if name not in self.needed
    ]
    dangling += [pack for pack in packs if pack not in used]
    counts = {
      "refs": len(refs),
      "commits": commits,
      "objects": len(names),
      "packs": len(packs),
      "leaves": len(self.leaves),
    }
    if self.left_out:  # said where it applies: most repositories are whole
      counts["left out"] = self.left_out
    return FsckReport(
      problems=tuple(self.problems),
      counts=counts,
      dangling=tuple(sorted(dangling)),
      leftovers=tuple(self.leftovers),
      quick=self.quick,
    )

  def _bad(self, kind: str, where: str, what: str, repair: str) -> None:
    self.problems.append(Problem(kind, where, what, repair))

  def _settings(self) -> None:
    """Reads what says where the history ends, and which leaves are here."""
    self.repo.objects.forget()
    try:
      self.boundary = shallow.read(self.repo.files)
    except IntegrityError as error:
      self._bad("settings", shallow.KEY, str(error), _REPAIR_SHALLOW)
    try:
      config.read(self.repo.files)
    except PatchjaxError as error:
      self._bad("settings", config.KEY, str(error), _REPAIR_SETTINGS)

  def _refs(self) -> list[_Step]:
    """Returns a step to each ref that holds an id."""
    found: list[_Step] = []
    repairs = {NOTES: _REPAIR_NOTE, REMOTES: _REPAIR_REMOTE}
    for space in (HEADS, TAGS, REMOTES, NOTES):
      for name in self.repo.refs.names(space):
        ref = f"{space}/{name}"
        try:
          id_ = self.repo.refs.get(space, name)
        except IntegrityError as error:
          repair = repairs.get(space, _REPAIR_REF)
          self._bad("ref", ref, str(error), repair)
          continue
        if id_ is not None:
          kind = "note" if space == NOTES else "commit"
          found.append((id_, kind, ref, ()))
    return found

  def _moves(self) -> tuple[list[_Step], list[_Step]]:
    """Returns steps to what refs held before, and to what they may have."""
    logs: dict[tuple[str, str], None] = {}
    for key in self.repo.files.walk(reflog.LOGS):
      try:
        marking.moved(self.repo.files, key)
      except IntegrityError as error:
        self._bad("reflog", key, str(error), _REPAIR_LOG)
      _, space, *name = key.split("/")[:-1]
      logs[f"refs/{space}", "/".join(name)] = None
    past: list[_Step] = []
    maybe: list[_Step] = []
    for space, name in logs:
      try:
        moves = list(reflog.moves(self.repo.refs, space, name))
      except IntegrityError:
        continue  # the ref itself is damaged, and reported
      for move in moves:
        steps = past if move.done else maybe
        who = f"the reflog of {name}"
        steps += [(i, "commit", who, ()) for i in (move.old, move.new) if i]
    return past, maybe

  def _objects(self) -> list[str]:
    """Verifies every object file; returns their ids."""
    keys = list(self.repo.files.walk("objects"))
    ids = []
    for done, key in enumerate(keys):
      self.progress("objects", done, len(keys))
      name = key.removeprefix("objects/").replace("/", "")
      ids.append(name)
      if not is_id(name):
        self._bad("object", key, "its name is no digest", _REPAIR_STRANGER)
        continue
      try:
        data = self.repo.objects.read(name)
      except (PatchjaxError, OSError) as error:
        if self.repo.files.exists(key):  # else gc was faster
          self._bad("object", key, str(error), _REPAIR_OBJECT)
        continue
      self.kinds[name] = marking.links(data).kind
    return ids

  def _reach(self, steps: Iterable[_Step], strict: bool) -> None:
    """Follows ids to all that they need."""
    stack = list(steps)
    while stack:
      name, kind, user, place = stack.pop()
      if name in self.needed:
        continue
      found = self.kinds.get(name)
      if found is None and not self.repo.files.exists(key_of(name)):
        if strict:
          self.needed[name] = user
          what = f"the {kind} {name[:12]} is missing; {user} needs it"
          hidden = any(name[2:] in leftover for leftover in self.leftovers)
          repair = _REPAIR_TRASH if hidden else _REPAIR_OBJECT
          self._bad("object", key_of(name), what, repair)
        continue
      self.needed[name] = user
      if found is None:
        continue  # damaged, and reported already; or just written
      if kind not in (found, marking.FILE):
        what = f"expected a {kind}, found a {found}; {user} needs it"
        self._bad("object", key_of(name), what, _REPAIR_OBJECT)
        continue
      stack += self._follow(name, kind, place)

  def _follow(self, name: str, kind: str, place: _Place) -> list[_Step]:
    """Returns what an intact object needs."""
    user = f"{kind} {name[:12]}"
    if kind == "commit":
      commit = self.repo.objects.commit(name)
      needs: list[_Step] = [(commit.tree, "tree", user, (user,))]
      if name not in self.boundary:
        needs += [(parent, "commit", user, ()) for parent in commit.parents]
      if commit.patch is not None:
        needs.append((commit.patch, marking.FILE, user, ()))
      return needs
    if kind == "note":
      # Its commit it can do without: `gc` removes that first.
      previous = self.repo.objects.note(name)["previous"]
      return [] if previous is None else [(previous, "note", user, ())]
    needs = []
    if kind == "tree":
      for part, item in self.repo.objects.folder(name).items():
        here = (*place, part)
        if isinstance(item, str):
          needs.append((item, "tree", user, here))
        elif item.size:
          self._leaf(item, here[0], join(here[1:]))
    return needs

  def _leaf(self, entry: Entry, commit: str, name: str) -> None:
    digest = entry.digest
    self.leaves.setdefault(digest, entry)
    self.names.setdefault(digest, f"{commit}: {name}")

  def _packs(self) -> list[str]:
    """Verifies every payload index and every blob; returns them."""
    # Judge what is on the disk, not what was remembered of it.
    self.repo.index.forget()
    self.repo.index.refresh()
    for pack, why in self.repo.index.damaged.items():
      self._bad("index", pack, why, _REPAIR_PACK)
    return self.repo.index.packs()

  def _leave_out(self) -> None:
    """Puts aside the leaves that a partial clone did not copy."""
    commits = [n for n in self.needed if self.kinds.get(n) == "commit"]
    try:
      asked = partial.asked(self.repo, commits)
    except PatchjaxError:
      return  # reported already; what is missing may be damage
    if asked is None:
      return
    stored = self.repo.index.find(self.leaves)
    for digest in self.leaves.keys() - asked:
      if not stored[digest]:
        del self.leaves[digest]
        self.left_out += 1

  def _leaves(self) -> set[str]:
    """Verifies every leaf in every place; returns the packs they need."""
    used: set[str] = set()
    done = 0
    for batch in verifying.batches(self.leaves):
      done += len(batch)
      self.progress("leaves", done, len(self.leaves))
      used |= self._look(batch) if self.quick else self._verify(batch)
      self._sources(batch)
    return used

  def _verify(self, batch: Mapping[str, Entry]) -> set[str]:
    good, why, used = verifying.verify(self.repo.reader, batch)
    if why:
      # A gc may have taken a copy that it knew to lie elsewhere too.
      self.repo.index.refresh()
      doubtful = {digest: batch[digest] for digest in why}
      good, why, packs = verifying.verify(self.repo.reader, doubtful)
      used |= packs
    for digest, reasons in why.items():
      self._unread(digest, batch[digest], reasons, digest in good)
    return used

  def _look(self, batch: Mapping[str, Entry]) -> set[str]:
    """Checks that leaves are stored, with all that they need."""
    used: set[str] = set()
    places = chains.gather(self.repo.index.find, batch)
    for digest in batch:
      chain = chains.chain(digest, places)
      used |= {place.pack for place in chain or ()}
      if chain is None:
        why = chains.explain(digest, places)
        self._unread(digest, batch[digest], [why], False)
    return used

  def _sources(self, batch: Mapping[str, Entry]) -> None:
    """Notes the patch files that leaves are read from."""
    for places in self.repo.index.find(batch).values():
      for place in places:
        id_ = encodings.object_of(place.encoding, place.key)
        if id_ is not None:
          self.needed.setdefault(id_, place.pack)

  def _unread(
    self, digest: str, entry: Entry, reasons: Iterable[str], good: bool
  ) -> None:
    """Reports a leaf that cannot be read from some place, or from any."""
    where = f"{self.names[digest]} {entry.dtype}{list(entry.shape)}"
    repair = _REPAIR_COPY if good else _REPAIR_PACK
    for reason in reasons:
      self._bad("leaf", where, reason, repair)
