"""fsck: is everything there, and is it what its digest says?

Every object, ref, payload index and stored leaf is read and verified. A
problem says what is affected and how to mend it; nothing is changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history import partial
from patchjax.history.objects import is_id, key_of
from patchjax.history.refs import HEADS, NOTES, REMOTES, TAGS
from patchjax.trees.errors import IntegrityError, PatchjaxError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry

Progress = Callable[[str, int, int], None]

_Place = tuple[str, ...]  # commit, then the parts of a name
_Step = tuple[str, str, str, _Place]  # object id, its kind, who needs it, where

_BATCH = 256 << 20  # bytes of leaves verified at a time

_REPAIR_REF = (
  "write the id of its last commit and a newline into the file; dangling "
  "commits, listed below, are candidates"
)
_REPAIR_OBJECT = (
  "remove the file, if it is there, and copy it from another copy of the "
  "repository; a tree comes back by committing the same value again"
)
_REPAIR_STRANGER = "move the file out of the repository"
_REPAIR_PACK = (
  "copy it from another copy of the repository; or move it out of this one "
  "and commit a good copy of the value: leaves are found by content, so "
  "every version that shares them is whole again"
)
_REPAIR_COPY = (
  "another place holds the leaf intact, and is read instead; move the "
  "damaged payload or blob out of the repository"
)


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that is missing or damaged.

  Attributes:
    kind: `ref`, `object`, `index`, `leaf` or `marker`.
    where: the file or leaf.
    what: what is wrong, and which versions it concerns.
    repair: what to do.
  """

  kind: str
  where: str
  what: str
  repair: str


@dataclasses.dataclass(frozen=True)
class FsckReport:
  """What a check found.

  Attributes:
    problems: what is missing or damaged; empty if all is well.
    counts: how many refs, commits, objects, packs and leaves were verified.
    dangling: what no ref reaches: payloads, blobs and commits of writers that
      were killed or lost a race. Harmless.
    leftovers: temporary files of killed writers. Harmless.
  """

  problems: tuple[Problem, ...]
  counts: Mapping[str, int]
  dangling: tuple[str, ...]
  leftovers: tuple[str, ...]

  @property
  def ok(self) -> bool:
    """Whether nothing is missing or damaged."""
    return not self.problems

  def to_json(self) -> dict[str, Any]:
    """Returns the report as a JSON-able dict."""
    return {"ok": self.ok, **dataclasses.asdict(self)}

  def __str__(self) -> str:
    counts = ", ".join(f"{n:,} {what}" for what, n in self.counts.items())
    lines = [f"verified {counts}"]
    for problem in self.problems:
      lines += [
        f"{problem.kind} {problem.where}",
        f"  {problem.what}",
        f"  repair: {problem.repair}",
      ]
    if self.dangling:
      lines.append(f"{len(self.dangling)} dangling (harmless): unreferenced")
    if self.leftovers:
      lines.append(
        f"{len(self.leftovers)} leftovers of interrupted writers (harmless; "
        "may be deleted while nobody writes)"
      )
    lines.append("ok" if self.ok else f"{len(self.problems)} problem(s)")
    return "\n".join(lines)


def check(repo: Repo, *, progress: Progress | None = None) -> FsckReport:
  """Verifies a whole repository.

  Args:
    repo: the repository.
    progress: called with what is verified, the count so far and the total.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit({"w": np.float32([1, 2])}, message="start")
    ...   print(repo.fsck())
    verified 1 refs, 1 commits, 2 objects, 1 packs, 1 leaves
    ok
  """
  return _Check(repo, progress or (lambda what, done, total: None)).run()


class _Check:
  """The state of one check."""

  def __init__(self, repo: Repo, progress: Progress):
    self.repo = repo
    self.progress = progress
    self.problems: list[Problem] = []
    self.kinds: dict[str, str] = {}  # of every intact object
    self.children: dict[str, list[str]] = {}  # of every intact commit and tree
    self.needed: dict[str, str] = {}  # object id -> who needs it
    self.leaves: dict[str, Entry] = {}
    self.names: dict[str, str] = {}  # leaf digest -> `commit: name`
    self.left_out = 0  # leaves that a partial clone did not copy

  def run(self) -> FsckReport:
    """Checks everything."""
    refs = self._refs()
    names = self._objects()
    commits = self._reach(refs)
    packs = self._packs()
    self._leave_out()
    used = self._leaves()
    dangling = [
      f"{kind} {name}"
      for name, kind in self.kinds.items()
      if name not in self.needed
    ]
    dangling += [pack for pack in packs if pack not in used]
    return FsckReport(
      problems=tuple(self.problems),
      counts={
        "refs": len(refs),
        "commits": commits,
        "objects": len(names),
        "packs": len(packs),
        "leaves": len(self.leaves),
        # Said where it applies: most repositories are whole.
        **({"left out": self.left_out} if self.left_out else {}),
      },
      dangling=tuple(sorted(dangling)),
      leftovers=tuple(self.repo.files.leftovers()),
    )

  def _bad(self, kind: str, where: str, what: str, repair: str) -> None:
    self.problems.append(Problem(kind, where, what, repair))

  def _refs(self) -> dict[str, str]:
    """Returns `{space/name: id}` of the refs that hold one."""
    found = {}
    for space in (HEADS, TAGS, REMOTES, NOTES):
      for name in self.repo.refs.names(space):
        try:
          id_ = self.repo.refs.get(space, name)
        except IntegrityError as error:
          self._bad("ref", f"{space}/{name}", str(error), _REPAIR_REF)
          continue
        if id_ is not None:
          found[f"{space}/{name}"] = id_
    return found

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
        self._bad("object", key, str(error), _REPAIR_OBJECT)
        continue
      self.kinds[name] = _kind(data)
    return ids

  def _reach(self, refs: Mapping[str, str]) -> int:
    """Follows every ref to all it needs; returns the number of commits."""
    stack = [
      (id_, "note" if ref.startswith(NOTES) else "commit", ref, ())
      for ref, id_ in refs.items()
    ]
    while stack:
      name, kind, user, place = stack.pop()
      if name in self.needed:
        continue
      self.needed[name] = user
      found = self.kinds.get(name)
      if found is None:
        if not self.repo.files.exists(key_of(name)):
          self._bad(
            "object",
            key_of(name),
            f"the {kind} {name[:12]} is missing; {user} needs it",
            _REPAIR_OBJECT,
          )
        continue  # damaged ones are reported already
      if kind not in (found, "file"):
        what = f"expected a {kind}, found a {found}; {user} needs it"
        self._bad("object", key_of(name), what, _REPAIR_OBJECT)
        continue
      stack += self._follow(name, kind, place)
    return sum(self.kinds.get(name) == "commit" for name in self.needed)

  def _follow(self, name: str, kind: str, place: _Place) -> list[_Step]:
    """Returns what an intact object needs."""
    if kind == "commit":
      commit = self.repo.objects.commit(name)
      user = f"commit {name[:12]}"
      needs: list[_Step] = [(commit.tree, "tree", user, (user,))]
      parents = self.repo.objects.parents(name)  # none where it was cut
      needs += [(parent, "commit", user, ()) for parent in parents]
      if commit.patch is not None:
        needs.append((commit.patch, "file", user, ()))
      return needs
    if kind == "note":
      note = self.repo.objects.note(name)
      user = f"note {name[:12]}"
      # Its commit it can do without: `gc` removes that first.
      if note["previous"] is None:
        return []
      return [(note["previous"], "note", user, ())]
    needs = []
    if kind == "tree":
      for part, item in self.repo.objects.folder(name).items():
        here = (*place, part)
        if isinstance(item, str):
          needs.append((item, "tree", f"tree {name[:12]}", here))
        elif item.size:
          self.leaves.setdefault(item.digest, item)
          self.names.setdefault(item.digest, f"{here[0]}: {'/'.join(here[1:])}")
    return needs

  def _packs(self) -> list[str]:
    """Verifies every payload index and every blob; returns them."""
    # Judge what is on the disk, not what was remembered of it.
    index = self.repo.index
    index.forget()
    index.refresh()
    for pack, why in index.damaged.items():
      self._bad("index", pack, why, _REPAIR_PACK)
    return index.packs()

  def _leave_out(self) -> None:
    """Puts aside the leaves that a partial clone did not copy."""
    commits = [n for n in self.needed if self.kinds.get(n) == "commit"]
    try:
      asked = partial.asked(self.repo, commits)
    except IntegrityError:
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
    from patchjax.history import encodings

    used: set[str] = set()
    batch: dict[str, Entry] = {}
    size = 0
    for done, (digest, entry) in enumerate(self.leaves.items()):
      batch[digest] = entry
      size += entry.size * encodings.word_of(entry.dtype).itemsize
      if size >= _BATCH or done + 1 == len(self.leaves):
        self.progress("leaves", done + 1, len(self.leaves))
        used |= self._verify(batch)
        batch, size = {}, 0
    return used

  def _verify(self, batch: Mapping[str, Entry]) -> set[str]:
    reader = self.repo.reader
    good, why, used = reader.verify(batch)
    for digest, reasons in why.items():
      entry = batch[digest]
      where = f"{self.names[digest]} {entry.dtype}{list(entry.shape)}"
      repair = _REPAIR_COPY if digest in good else _REPAIR_PACK
      for reason in reasons:
        self._bad("leaf", where, reason, repair)
    return used


def _kind(data: bytes) -> str:
  """Returns what an object is: commit, tree, note, or any file."""
  try:
    return str(json.loads(data)["type"])
  except (ValueError, TypeError, KeyError):
    return "file"
