"""Picking: what a commit did to one version, done to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from patchjax.history.commits import merges
from patchjax.trees import dtypes
from patchjax.trees.errors import ConflictError

if TYPE_CHECKING:
  from patchjax.history.arrays.values import Values
  from patchjax.history.storage.objects import Commit
  from patchjax.patches import Patch
  from patchjax.trees.digest import Entry

Changes = Mapping[str, tuple["Entry | None", "Entry | None"]]
"""What a commit did: `{name: (entry before, entry after)}`."""

_ARITHMETIC = ("add", "mul")


def changes_of(values: Values, old: str | None, new: str) -> Changes:
  """Returns what leads from one tree to another.

  Args:
    values: where the trees are.
    old: id of the one; None for nothing.
    new: id of the other.
  """
  from patchjax.history.commits import leaves

  return {
    name: (before, after)
    for name, before, after in leaves.changes(values.repo.objects, old, new)
  }


def pick(
  values: Values,
  changes: Changes,
  ours: Mapping[str, Entry | None],
  commit: Commit,
  *,
  method: Any = None,
) -> tuple[dict[str, Entry | None], bool]:
  """Does to one version what a commit did to another.

  A leaf that is here what it was before the commit becomes what it was after
  it, to the bit. Where it is something else:

  1. if the commit is a patch that adds or multiplies, the patch is applied to
     the leaf by the pinned evaluation: one rounding, the same everywhere;
  2. else, if no entry of the leaf was changed both by the commit and here,
     each entry is what changed it last, to the bit;
  3. else, with a `method`, the leaf before is the base, ours and theirs are
     the contributors of a merge (`task_arithmetic()`: both differences are
     added, in float32 and rounded once);
  4. else it is a conflict.

  Args:
    values: reads and keeps leaves.
    changes: what the commit did.
    ours: the version it is done to; only leaves of `changes` matter.
    commit: the commit, for its patch and for messages.
    method: a merge method.

  Returns:
    `({name: entry}, plain)`: the leaves that become something else, None for
    those that go; and whether the commit's patch, if it is one, leads to
    them.

  Raises:
    ConflictError: lists every leaf that both changed.
  """
  picked: dict[str, Entry | None] = {}
  patch = _submitted(values, commit) if _collides(changes, ours) else None
  asked, bad = [], []
  plain = True
  for name, (before, after) in changes.items():
    here = ours.get(name)
    if here == before:
      picked[name] = after
    elif here == after:
      plain = False
    elif (
      before is None
      or after is None
      or here is None
      or len({(e.dtype, e.shape) for e in (before, after, here)}) > 1
    ):
      bad.append(f"  {name}: {_spell(before, after, here)}")
    elif (delta := _delta(patch, name)) is not None:
      picked[name] = _applied(values, here, delta)
    else:
      plain = False
      found, count = _entrywise(values, before, after, here)
      if found is not None:
        picked[name] = found
      elif method is not None and merges.is_merged(here):
        asked.append(name)
      else:
        bad.append(f"  {name}: {count:,} of {here.size:,} entries")
  if bad:
    raise ConflictError(
      f"{len(bad)} leaf/leaves that {commit.id[:12]} ({commit.title}) changed "
      "were changed otherwise here:\n"
      + "\n".join(bad)
      + "\nto mend it: merge instead; or give a method for floating point "
      "leaves (method=patchjax.merging.task_arithmetic() adds both changes, "
      "rounded once)"
    )
  if asked:
    before = {n: e for n in asked if (e := changes[n][0]) is not None}
    theirs = {n: e for n in asked if (e := changes[n][1]) is not None}
    mine = {n: e for n in asked if (e := ours.get(n)) is not None}
    picked |= merges.run(values, before, [mine, theirs], method)
  return picked, plain


def put(
  leaves: Mapping[str, Entry], picked: Mapping[str, Entry | None]
) -> dict[str, Entry]:
  """Returns a version with some leaves changed.

  Args:
    leaves: the version.
    picked: what becomes of some leaves; None for those that go.
  """
  changed = {**leaves, **picked}
  return {name: e for name, e in changed.items() if e is not None}


def _collides(changes: Changes, ours: Mapping[str, Entry | None]) -> bool:
  return any(ours.get(name) not in pair for name, pair in changes.items())


def _submitted(values: Values, commit: Commit) -> Patch | None:
  if commit.patch is None:
    return None
  return values.repo.patch_of(commit.id)


def _delta(patch: Patch | None, name: str) -> Any:
  """The change of a leaf as arithmetic that can be done to any number."""
  from patchjax.patches import Delta

  delta = None if patch is None else patch.deltas.get(name)
  if isinstance(delta, Delta) and delta.law in _ARITHMETIC:
    return delta
  return None


def _applied(values: Values, here: Entry, delta: Any) -> Entry:
  from patchjax.patches import pinned

  return values.put(pinned.apply_host(values.arrays({"": here})[""], delta))


def _entrywise(
  values: Values, before: Entry, after: Entry, here: Entry
) -> tuple[Entry | None, int]:
  """Puts two changes of a leaf together, or counts the entries of both."""
  words = values.words({"before": before, "after": after, "here": here})
  old, theirs, ours = (words[key] for key in ("before", "after", "here"))
  changed, moved, differ = theirs != old, ours != old, theirs != ours
  if old.ndim > len(here.shape):  # a complex number or a key is several words
    changed, moved, differ = (
      x.any(axis=-1, keepdims=True) for x in (changed, moved, differ)
    )
  count = int(np.count_nonzero(changed & moved & differ))
  if count:
    return None, count
  result = np.where(changed, theirs, ours)
  return values.put(dtypes.device(result, here.dtype)), 0


def _spell(*entries: Entry | None) -> str:
  before, after, here = (
    "absent" if e is None else f"{e.dtype}{list(e.shape)}" for e in entries
  )
  return f"{before} before it, {after} after it, {here} here"
