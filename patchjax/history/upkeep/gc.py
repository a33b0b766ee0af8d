"""gc: what nothing reaches any more is removed.

Reachable is what a branch, a tag, a remote-tracking ref or a young reflog
entry leads to, whether it was pushed anywhere or not; what was written or
freshened within the grace period, and all that it needs; and the payloads and
blobs that hold any of it, down to the bases of differences. Everything else
goes, users before what they use: killed at any moment, a `gc` leaves a
repository in which every version that was whole is whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history.storage.files import Files
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

Progress = Callable[[str, int, int], None]

GRACE = datetime.timedelta(weeks=2)
EXPIRE = datetime.timedelta(days=90)

_LOCK = "cache/gc.lock"


@dataclasses.dataclass(frozen=True)
class Removed:
  """Something that a `gc` removed, or would.

  Attributes:
    kind: `commit`, `tree`, `note`, `file`, `payload`, `blob`, `superseded` (a
      payload or blob whose leaves lie elsewhere too), `reflog`, `leftover`.
    key: its file or folder, relative to the repository.
    bytes: what it takes on the disk.
  """

  kind: str
  key: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class GcReport:
  """What a `gc` did.

  Attributes:
    removed: what is gone, in the order in which it went; in a dry run, what
      would go.
    kept: how many objects and packs stay.
    damaged: leaves of which a copy is damaged, so that no copy was removed.
    dry_run: whether nothing was touched.
  """

  removed: tuple[Removed, ...]
  kept: Mapping[str, int]
  damaged: tuple[str, ...]
  dry_run: bool

  @property
  def bytes(self) -> int:
    """Bytes on the disk that were given back, or would be."""
    return sum(item.bytes for item in self.removed)

  def to_json(self) -> dict[str, Any]:
    """Returns the report as a JSON-able dict."""
    return {"bytes": self.bytes, **dataclasses.asdict(self)}

  def __str__(self) -> str:
    verb = "would remove" if self.dry_run else "removed"
    lines = []
    if self.dry_run:
      lines += [f"{r.kind} {r.key} {r.bytes:,}" for r in self.removed]
    kinds = collections.Counter(item.kind for item in self.removed)
    listed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    lines.append(f"{verb} {listed or 'nothing'}: {self.bytes:,} bytes")
    kept = ", ".join(f"{n:,} {what}" for what, n in self.kept.items())
    lines.append(f"kept {kept}")
    if self.damaged:
      lines.append(
        f"{len(self.damaged)} leaves have a damaged copy; no copy of them was "
        "removed: run fsck"
      )
    return "\n".join(lines)


def gc(
  repo: Repo,
  *,
  grace: datetime.timedelta | float = GRACE,
  expire: datetime.timedelta | float = EXPIRE,
  dry_run: bool = False,
  progress: Progress | None = None,
) -> GcReport:
  """Removes what no ref and no young reflog entry reaches.

  Safe beside any number of writers as long as none of them takes longer for a
  commit than `grace`. Not so in a bucket, whose files do not tell when they
  were used last: run it while nobody pushes. There the first `gc` writes down
  what could go, and one that runs `grace` later removes it.

  Args:
    repo: the repository.
    grace: what was written or used by a commit within this time stays, with
      all that it needs: timedelta or seconds. 0 only while nobody writes: it
      takes what a commit that is under way has written so far. What a repack
      has replaced does not wait for it: readers find the new place.
    expire: reflog entries older than this go, and hold nothing any more.
    dry_run: only say what would go.
    progress: called with what is looked at, the count so far and the total.

  Raises:
    RepositoryError: if another `gc` is at work.
    IntegrityError: if something reachable is missing or damaged, so that it
      cannot be known what it needs; nothing was removed.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit({"w": np.float32([1, 2])}, message="start")
    ...   print(repo.gc())
    removed nothing: 0 bytes
    kept 2 objects, 1 packs
  """
  now = time.time()
  age = _seconds("grace", grace)
  # Without grace nothing is fresh, however coarse the clock of the files is.
  cutoff = now - age if age else math.inf
  oldest = now - _seconds("expire", expire)
  report = progress or (lambda what, done, total: None)
  with _alone(repo.files):
    from patchjax.history.upkeep.gc_run import GcRun

    return GcRun(repo, cutoff, oldest, dry_run, report).run()


def _seconds(name: str, age: datetime.timedelta | float) -> float:
  seconds = (
    age.total_seconds() if isinstance(age, datetime.timedelta) else float(age)
  )
  if not seconds >= 0:
    raise RepositoryError(f"gc: {name} must be 0 or more, found {age!r}")
  return seconds


@contextlib.contextmanager
def _alone(files: Files) -> Iterator[None]:
  """Keeps a second `gc` out; the lock dies with the process that holds it."""
  try:
    import fcntl
  except ImportError:  # no such locks on Windows
    fcntl = None
  if fcntl is None or not files.local:
    yield
    return
  path = files.path(_LOCK)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise RepositoryError(
        f"another gc is at work in {files.root}: wait for its end"
      ) from error
    yield
