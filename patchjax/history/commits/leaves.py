"""The leaves in which two trees differ, found through their folders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
  from patchjax.history.storage.objects import Objects
  from patchjax.trees.digest import Entry

Change: TypeAlias = "tuple[str, Entry | None, Entry | None]"


def changes(
  objects: Objects, old: str | None, new: str | None
) -> Iterator[Change]:
  """Yields the leaves in which two trees differ.

  Equal folders have equal ids and are not looked into: the cost grows with
  the difference, not with the model.

  Args:
    objects: objects of the repository.
    old: id of the one tree; None for one without leaves.
    new: id of the other.

  Yields:
    `(text name, entry in the one, entry in the other)`, None where there is
    no such leaf.
  """
  from patchjax.trees.names import join

  def visit(
    old: Entry | str | None, new: Entry | str | None, parts: tuple[str, ...]
  ) -> Iterator[Change]:
    if old == new:
      return
    before, after = (
      objects.folder(item) if isinstance(item, str) else {}
      for item in (old, new)
    )
    if parts:  # a leaf on one side may be a folder on the other
      leaves = [None if isinstance(x, str) else x for x in (old, new)]
      if leaves != [None, None]:
        yield join(parts), leaves[0], leaves[1]
    for part in {**before, **after}:
      yield from visit(before.get(part), after.get(part), (*parts, part))

  yield from visit(old, new, ())
