"""fsck: is everything there, and is it what its digest says?

Every object, ref, reflog entry, payload index and stored leaf is read and
verified. A problem says what is affected and how to mend it; nothing is
changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that is missing or damaged.

  Attributes:
    kind: `ref`, `reflog`, `object`, `index`, `leaf` or `settings`.
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
    counts: how many refs, commits, objects, packs and leaves were verified;
      of a partial clone, how many leaves are not here.
    dangling: what no ref and no reflog entry reaches: payloads, blobs and
      commits of writers that were killed or lost a race. Harmless.
    leftovers: temporary files of killed writers. Harmless.
    quick: whether the bits of the leaves were left unread.
  """

  problems: tuple[Problem, ...]
  counts: Mapping[str, int]
  dangling: tuple[str, ...]
  leftovers: tuple[str, ...]
  quick: bool = False

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
    if self.quick:
      lines.append("the bits of the leaves were not read")
    for problem in self.problems:
      lines += [
        f"{problem.kind} {problem.where}",
        f"  {problem.what}",
        f"  repair: {problem.repair}",
      ]
    if self.dangling:
      lines.append(
        f"{len(self.dangling)} dangling (harmless; gc removes them in time)"
      )
    if self.leftovers:
      lines.append(
        f"{len(self.leftovers)} leftovers of interrupted writers (harmless; gc "
        "removes them in time)"
      )
    lines.append("ok" if self.ok else f"{len(self.problems)} problem(s)")
    return "\n".join(lines)


def fsck(
  repo: Repo, *, quick: bool = False, progress: Progress | None = None
) -> FsckReport:
  """Verifies a whole repository; others may go on writing to it.

  Args:
    repo: the repository.
    quick: does not read the bits of leaves: only whether they are stored, with
      all that they are differences to. What it costs does not grow with them.
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
  from patchjax.history.upkeep.fsck_run import FsckRun

  tell = progress or (lambda what, done, total: None)
  return FsckRun(repo, quick, tell).run()
