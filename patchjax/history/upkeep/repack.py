"""repack: every leaf held as well as hindsight allows, under the same ids.

A commit decides quickly, and knows only what was there before. A repack looks
at the whole history: it finds better bases (another parent, another branch,
any tagged release), flattens chains that are dear to read, and gathers the
leaves of many small packs in few. Objects are not touched, so no id changes.

New packs are written beside the old ones; each leaf is read back from its new
place and compared with its digest before the index makes that place exist.
Killed at any moment, a repack leaves every leaf readable where it was. The old
packs stay until the next `gc` finds that newer ones (of a higher generation)
hold all that is needed of them. It does not wait: who has read an old index
finds a pack gone, reads the indices anew, and with them where the leaf is now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class RepackReport:
  """What a `repack` did.

  Attributes:
    leaves: how many leaves were looked at.
    recoded: how many are held as something else, or differ from another base.
    gathered: how many were copied as they were, out of small packs or onto a
      base that moved.
    packs: how many packs were written.
    before: bytes that these leaves took before, as far as it was measured.
    after: bytes that they take now.
    dry_run: whether nothing was written.
  """

  leaves: int
  recoded: int
  gathered: int
  packs: int
  before: int
  after: int
  dry_run: bool

  def to_json(self) -> dict[str, Any]:
    """Returns the report as a JSON-able dict."""
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    verb = "would rewrite" if self.dry_run else "rewrote"
    moved = self.recoded + self.gathered
    text = (
      f"{verb} {moved:,} of {self.leaves:,} leaves ({self.recoded:,} encoded "
      f"anew): about {self.before:,} bytes become {self.after:,}"
    )
    if moved and not self.dry_run:
      text += (
        f", in {self.packs:,} new packs\nthe old ones go with the next `gc`"
      )
    return text


def repack(
  repo: Repo, *, progress: Progress | None = None, dry_run: bool = False
) -> RepackReport:
  """Rewrites leaves that can be held in fewer bytes, or read faster.

  No id changes, and what is there stays until `gc` removes it. Writers may
  go on meanwhile.

  Args:
    repo: the repository.
    progress: called with what is looked at, the count so far and the total.
    dry_run: only say what would be rewritten.

  Raises:
    IntegrityError: if a leaf is missing or damaged, or does not come back
      from its new place; every leaf can be read as before.
    RepositoryError: if the disk is full or cannot be written.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> x = np.random.default_rng(0).random((100, 100)).astype(np.float32)
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": x}, message="here")
    ...   other = repo.commit(
    ...     {"w": x * np.float32(1.001)}, message="there", branch="other",
    ...     parents=[],
    ...   )
    ...   report = repo.repack()
    ...   report.recoded, repo.resolve("other") == other
    (1, True)
  """
  from patchjax.history.arrays.repacking import Repacking

  tell = progress or (lambda what, done, total: None)
  return Repacking(repo, tell, dry_run).run()
