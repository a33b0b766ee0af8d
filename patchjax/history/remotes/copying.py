"""Copying what a walk met: planned, copied, and verified if asked to.

The same for a fetch and a push; the refs that lead to it are moved by those.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from patchjax.history.remotes import partial
from patchjax.history.remotes.reach import Progress, Reached
from patchjax.history.remotes.transfer import Counts, Transfer
from patchjax.trees.errors import IntegrityError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def copy(
  source: Repo,
  target: Repo,
  found: Reached,
  parts: bool,
  verify: bool,
  progress: Progress,
) -> Counts:
  """Copies what a walk met; the refs that lead to it are the caller's.

  Args:
    source: where it is.
    target: where it shall be.
    found: what a walk met.
    parts: whether to leave out leaves that only share a payload with it.
    verify: whether to compute the digest of each leaf.
    progress: see `fetch`.

  Raises:
    IntegrityError: if leaves are in neither repository, or damaged.
  """
  from patchjax.history.arrays import packing

  transfer = Transfer(source, target, progress=progress)
  transfer.objects(found)
  plan = packing.plan(source, target, found, partial=parts)
  if plan.missing:
    raise IntegrityError(_absent(source, found, plan.missing))
  transfer.patches(plan.files)
  transfer.packs([part for part in plan.parts if part.places is None])
  packing.take(source, target, plan, transfer.copied)
  if verify:
    _verify(target, found, {part.pack for part in plan.parts}, progress)
  return transfer.counts


def _verify(
  target: Repo, found: Reached, copied: Collection[str], progress: Progress
) -> None:
  """Reads all leaves; takes the packs of a bad one away again."""
  target.index.refresh()
  for done, (digest, entry) in enumerate(found.leaves.items(), 1):
    try:
      # One by one: memory holds one leaf and its bases.
      target.reader.read({found.names[digest]: entry})
    except IntegrityError:
      _drop(target, digest, copied)
      raise
    progress("leaves", done, len(found.leaves))


def _drop(target: Repo, digest: str, copied: Collection[str]) -> None:
  """Removes what was copied of a damaged leaf: else it counts as being here."""
  from patchjax.history.arrays import chains
  from patchjax.history.upkeep import bins

  places = chains.gather(target.index.find, [digest]).values()
  trash = bins.bin_of(target.files, math.inf)
  for pack in {place.pack for found in places for place in found}:
    if pack in copied:
      trash.delete(pack)
  target.index.refresh()


def _absent(source: Repo, found: Reached, missing: Iterable[str]) -> str:
  names = sorted(found.names.get(digest, digest[:16]) for digest in missing)
  shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
  origin = partial.sources(source.files)
  why = (
    f"it is a partial clone of {origin[0].url}: run `patchjax -C "
    f"{source.path} fetch --complete` there first, or use {origin[0].url}"
    if origin
    else "run fsck there; nothing was moved"
  )
  return (
    f"{source.path} lacks {len(names)} leaf/leaves that its versions need: "
    f"{shown}; {why}"
  )
