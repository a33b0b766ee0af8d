"""Copying between repositories: what is immutable, once and verified.

Nothing that is copied is visible before a ref leads to it, and the refs come
last. A payload becomes visible with its index, which follows its data. So a
copy that was interrupted has done no harm, and the next one goes on where it
ended: what is there by name is not copied again.

Objects, blobs and indices are verified by their digests while they are
copied; the data of payloads carry no digest of their own, and are verified
with every leaf that is checked out, or at once with `verify`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from patchjax.history.storage.objects import key_of
from patchjax.history.storage.threads import each
from patchjax.trees.errors import IntegrityError

if TYPE_CHECKING:
  from patchjax.history.arrays.packing import Part
  from patchjax.history.remotes.reach import Reached
  from patchjax.history.repo import Repo

Progress = Callable[[str, int, int], None]

_BATCH = 256  # files, or objects, that are written in one go
_GROUP = 256 << 20  # bytes of payloads after which indices are written
_LARGE = 256 << 20  # bytes from which on a file is copied alone, for memory


@dataclasses.dataclass
class Counts:
  """What a copy did.

  Attributes:
    commits: commits that the other side lacked.
    objects: objects that were copied.
    packs: payloads and blobs that were copied.
    files: files that were copied, of all kinds.
    bytes: bytes that were copied.
  """

  commits: int = 0
  objects: int = 0
  packs: int = 0
  files: int = 0
  bytes: int = 0


class Transfer:
  """A copy from one repository to another.

  Attributes:
    source: where things are.
    target: where they shall be.
    counts: what was copied so far.
  """

  def __init__(self, source: Repo, target: Repo, *, progress: Progress):
    """Prepares a copy.

    Args:
      source: where things are.
      target: where they shall be.
      progress: called with `bytes`, the bytes copied so far, and the bytes
        there are to copy; 0 where a store does not tell.
    """
    self.source = source
    self.target = target
    self.counts = Counts()
    self._progress = progress
    self._lock = threading.Lock()
    self._total = 0

  def objects(self, found: Reached) -> None:
    """Copies commits, trees and patch files.

    Args:
      found: what a walk met.
    """
    self.counts.commits += len(found.commits)
    small = self._absent({n: len(d) for n, d in found.objects.items()})
    for start in range(0, len(small), _BATCH):
      batch = {n: found.objects[n] for n in small[start : start + _BATCH]}
      self.target.files.write_all({key_of(n): d for n, d in batch.items()})
      self.copied(len(batch), sum(map(len, batch.values())))
    self.counts.objects += len(small)
    self.patches(found.files)

  def patches(self, names: Iterable[str]) -> None:
    """Copies submitted patch files, which may be large.

    Args:
      names: their ids.
    """
    source = self.source.files
    # A store is not asked file by file.
    sizes = {n: source.size(key_of(n)) if source.local else None for n in names}
    absent = self._absent(sizes)
    self._copy(map(key_of, absent), verified=True)
    self.counts.objects += len(absent)

  def _absent(self, sizes: Mapping[str, int | None]) -> list[str]:
    """Returns the objects that the target lacks; freshens the others.

    No copy leaves a part of an object under its name; a disk may. One that is
    shorter than it should be is copied again.
    """
    files, names = self.target.files, list(sizes)
    if files.local:
      # What we are going to rely on must not fall to a `gc` meanwhile.
      return [n for n in names if not self._holds(key_of(n), sizes[n])]
    if len(names) <= _BATCH:
      there = each(lambda name: files.exists(key_of(name)), names)
      return [name for name, found in zip(names, there) if not found]
    # One listing tells of a thousand objects.
    listed = {key.replace("/", "")[7:] for key in files.walk("objects")}
    return [name for name in names if name not in listed]

  def packs(self, parts: Iterable[Part]) -> None:
    """Copies payloads and blobs, whole; see `packing.plan`.

    Args:
      parts: what to copy.
    """
    names = [part.pack for part in parts]
    blobs = [name for name in names if name.startswith("blobs/")]
    payloads = [name for name in names if not name.startswith("blobs/")]
    there = self._listed("payloads")
    sizes = {name: self._sizes(name, there) for name in payloads}
    if self.source.files.local:
      found = [size or 0 for files in sizes.values() for size in files.values()]
      found += [self.source.files.size(name) or 0 for name in blobs]
      self._total = self.counts.bytes + sum(found)
    self._copy(blobs, verified=True)
    for group in _groups(sizes):
      self._copy([key for name in group for key in sizes[name]], sizes=sizes)
      if self.target.files.local:
        # A `gc` may have taken what an older copy had left: looked at again,
        # and fresh from now on.
        lacking = {name: self._sizes(name, there) for name in group}
        again = [key for files in lacking.values() for key in files]
        self._copy(again, sizes=lacking)
      self._indices(group)
    self.counts.packs += len(names)

  def _listed(self, folder: str) -> dict[str, set[str]]:
    """Returns the files of each payload that the target has in part."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    if not self.target.files.local:
      for key in self.target.files.walk(folder):
        found["/".join(key.split("/")[:2])].add(key)
    return found

  def _sizes(
    self, pack: str, there: Mapping[str, set[str]]
  ) -> dict[str, int | None]:
    """Returns the data files of a payload that are to be copied."""
    from patchjax.history.arrays.index import INDEX

    source, target = self.source.files, self.target.files
    has = set(target.walk(pack)) if target.local else there.get(pack, set())
    found = {}
    for key in source.walk(pack):
      if key == f"{pack}/{INDEX}":
        continue
      # A store is not asked file by file.
      size = source.size(key) if source.local else None
      # What an interrupted copy left must not fall to a `gc` meanwhile, which
      # takes it for a leftover until its index is there.
      if key not in has or (target.local and not self._holds(key, size)):
        found[key] = size
    return found

  def _holds(self, key: str, size: int | None) -> bool:
    """Returns whether a file is there, fresh, and as long as it should be."""
    target = self.target.files
    return target.freshen(key) and (size is None or target.holds(key, size))

  def _indices(self, packs: Iterable[str]) -> None:
    """Copies indices, which makes their payloads exist."""
    from patchjax.history.arrays import index

    data = {}
    for pack in packs:
      key = f"{pack}/{index.INDEX}"
      data[key] = self.source.files.read(key)
      index.parse(data[key], pack)
    self.target.files.write_all(data)
    self.copied(len(data), sum(map(len, data.values())))

  def _copy(
    self,
    keys: Iterable[str],
    *,
    verified: bool = False,
    sizes: Mapping[str, Mapping[str, int | None]] | None = None,
  ) -> None:
    """Copies files side by side, large ones one by one."""
    keys = list(keys)
    known = {k: s for files in (sizes or {}).values() for k, s in files.items()}
    large = {key for key in keys if (known.get(key) or 0) >= _LARGE}

    def one(key: str) -> None:
      pieces = self.source.files.pieces(key)
      digest = key.rpartition("/")[2]
      if key.startswith("objects/"):
        digest = key.removeprefix("objects/").replace("/", "")
      if verified:
        pieces = _verified(pieces, digest, self.source.files.path(key))
      if self.target.files.local:
        self.target.files.write_pieces(key, self._counted(pieces))
        self.copied(1, 0)
      else:
        # Sent in one request: it counts when it has arrived.
        data = b"".join(pieces)
        self.target.files.write(key, data)
        self.copied(1, len(data))

    each(one, [key for key in keys if key not in large])
    for key in sorted(large):
      one(key)

  def _counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
      yield piece
      self.copied(0, len(piece))

  def copied(self, files: int, size: int) -> None:
    """Counts what was copied.

    Args:
      files: how many files.
      size: how many bytes.
    """
    with self._lock:
      self.counts.files += files
      self.counts.bytes += size
      total = max(self._total, self.counts.bytes) if self._total else 0
      self._progress("bytes", self.counts.bytes, total)


def _verified(
  pieces: Iterable[bytes], digest: str, path: str
) -> Iterator[bytes]:
  """Yields pieces; raises at the end, before they are kept, if they are bad."""
  hasher = hashlib.sha256()
  for piece in pieces:
    hasher.update(piece)
    yield piece
  if hasher.hexdigest() != digest:
    raise IntegrityError(
      f"{path} is damaged: its bytes have the digest {hasher.hexdigest()}; it "
      "was not copied: run fsck there, and mend it first"
    )


def _groups(
  sizes: Mapping[str, Mapping[str, int | None]],
) -> Iterator[list[str]]:
  """Yields payloads by the group: what an interruption may cost."""
  group: list[str] = []
  size = files = 0
  for name, parts in sizes.items():
    group.append(name)
    size += sum(part or 0 for part in parts.values())
    files += len(parts)
    if size >= _GROUP or files >= _BATCH:
      yield group
      group, size, files = [], 0, 0
  if group:
    yield group
