"""Verifying many leaves: some at a time, and a huge one in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from patchjax.trees import dtypes

if TYPE_CHECKING:
  from patchjax.history.arrays.reading import LeafReader
  from patchjax.trees.digest import Entry

BATCH = 256 << 20
"""Bytes of leaves that are in memory at a time."""


def batches(entries: Mapping[str, Entry]) -> Iterator[dict[str, Entry]]:
  """Yields leaves by the batch, in order.

  Args:
    entries: `{digest: entry}`.
  """
  batch: dict[str, Entry] = {}
  size = 0
  for digest, entry in entries.items():
    batch[digest] = entry
    size += _bytes(entry)
    if size >= BATCH:
      yield batch
      batch, size = {}, 0
  if batch:
    yield batch


def verify(
  reader: LeafReader, batch: Mapping[str, Entry]
) -> tuple[set[str], dict[str, list[str]], set[str]]:
  """Reads leaves from every place that claims to hold them.

  Args:
    reader: of the repository.
    batch: `{digest: entry}`, of about a batch. What is larger than a batch by
      itself is read some of its tiles at a time.

  Returns:
    See `LeafReader.verify`.
  """
  small = {d: entry for d, entry in batch.items() if _bytes(entry) <= BATCH}
  good, why, used = reader.verify(small)
  for digest in batch.keys() - small.keys():
    fine, reasons, packs = reader.verify_in_parts(batch[digest], BATCH)
    used |= packs
    if fine:
      good.add(digest)
    if reasons or not fine:
      why[digest] = reasons or ["stored in no payload"]
  return good, why, used


def _bytes(entry: Entry) -> int:
  return entry.size * dtypes.itemsize(entry.dtype)
