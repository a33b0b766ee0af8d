"""What a merge has done so far: enough to go on after it was killed.

Files grow in a folder of their own, under names that no reader looks for. The
journal beside them says of which inputs they are made, which cuts were found,
and up to which byte each file is on disk. At the end they take their places,
the index last: without it a model in shards is none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from patchjax.merging.streaming.layout import Layout, Shard
from patchjax.patches import storage
from patchjax.trees.dtypes import is_key
from patchjax.trees.errors import ConflictError

try:
  import fcntl
except ImportError:  # Windows: nobody is kept out
  fcntl = None

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
  """The record of one merge, in its folder.

  Attributes:
    resumed: bytes that an earlier process wrote, and that are kept.
  """

  def __init__(self, layout: Layout, parts: Mapping[str, str]):
    self._layout = layout
    self._path = layout.work / "journal.json"
    self._now: dict[str, Any] = {"parts": dict(parts), "done": {}, "cuts": {}}
    before = self._read()
    if before.get("parts") == self._now["parts"] and self._whole(before):
      self._now = before
    elif before:
      changed = [
        k for k, v in parts.items() if before.get("parts", {}).get(k) != v
      ]
      warnings.warn(
        f"{layout.target}: the merge that was begun there starts over: "
        + (f"other {', '.join(changed)}" if changed else "files are missing"),
        stacklevel=4,
      )
      self._forget(before)
    self._save()
    self.resumed = sum(self._now["done"].values())

  def _read(self) -> dict[str, Any]:
    try:
      found = json.loads(self._path.read_bytes())
    except (OSError, ValueError):
      return {}
    return found if isinstance(found, dict) else {}

  def _whole(self, before: Mapping[str, Any]) -> bool:
    """Returns whether the files hold what the journal says."""
    for shard in self._layout.shards:
      size = before["done"].get(shard.path.name, 0)
      found = [
        path.stat().st_size
        for path in (self._part(shard), shard.path)
        if path.exists()
      ]
      if size and not (found and found[0] >= size):
        return False
    return True

  def _save(self) -> None:
    with storage.replacing(self._path) as file:
      file.write(json.dumps(self._now).encode())

  def _forget(self, before: Mapping[str, Any]) -> None:
    """Removes what an abandoned merge left."""
    for part in self._layout.work.glob("*.part"):
      part.unlink()
    for name in before.get("placed", ()):
      # Some took their places already, and have no index.
      (self._layout.older.parent / name).unlink(missing_ok=True)

  # -------------------------------------------------------------------------
  # Cuts.

  def cut(self, key: str, like: Any) -> Any:
    """Returns what a stage has counted, or None.

    Args:
      key: names the stage.
      like: a carry of its structure.
    """
    held = self._now["cuts"].get(key)
    if held is None:
      return None
    leaves = [
      np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)
      for dtype, shape, text in held
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def found(self, key: str, carry: Any) -> None:
    """Records what a stage has counted.

    Args:
      key: names the stage.
      carry: its last carry, of plain numbers.
    """
    leaves = [np.asarray(x) for x in jax.tree.leaves(carry)]
    self._now["cuts"][key] = [
      [x.dtype.name, list(x.shape), x.tobytes().hex()] for x in leaves
    ]
    self._save()

  # -------------------------------------------------------------------------
  # Files.

  def done(self, shard: Shard) -> int:
    """Returns how many bytes of a shard are on disk."""
    return self._now["done"].get(shard.path.name, 0)

  def keep(self, shard: Shard, file: BinaryIO, end: int) -> None:
    """Makes what is written of a shard stay, and records it.

    Args:
      shard: the shard.
      file: its file.
      end: how many bytes are written.
    """
    file.flush()
    os.fsync(file.fileno())
    self._now["done"][shard.path.name] = end
    self._save()

  @contextlib.contextmanager
  def growing(self, shard: Shard) -> Iterator[BinaryIO]:
    """Yields the file of a shard, at the end of what is kept of it.

    Args:
      shard: the shard.
    """
    with open(self._part(shard), "r+b" if self.done(shard) else "w+b") as file:
      file.truncate(self.done(shard))
      file.seek(0, os.SEEK_END)
      if not self.done(shard):
        file.write(shard.header)
      yield file

  def _part(self, shard: Shard) -> pathlib.Path:
    return self._layout.work / f"{shard.path.name}.part"

  @property
  def placing(self) -> bool:
    """Whether all is written, and files take their places."""
    return "placed" in self._now

  def place(self) -> list[pathlib.Path]:
    """Puts finished files where they belong; returns them."""
    layout = self._layout
    paths = [shard.path for shard in layout.shards]
    if not self.placing:
      self._now["placed"] = [path.name for path in paths]
      self._now["stale"] = _older_files(layout)
      self._save()
    index = layout.work / "index.part"
    text = layout.index_bytes()
    if _content(layout.older) != text:
      # Between the old files and the new there is no model.
      layout.older.unlink(missing_ok=True)
    for shard in layout.shards:
      if (part := self._part(shard)).exists():
        os.replace(part, shard.path)
    if layout.index is not None:
      with open(index, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(index, layout.index)
      paths.append(layout.index)
    for name in self._now["stale"]:
      (layout.older.parent / name).unlink(missing_ok=True)
    return paths


def _content(path: pathlib.Path) -> bytes | None:
  return path.read_bytes() if path.exists() else None


def _older_files(layout: Layout) -> list[str]:
  """Returns files of a model that is replaced and that nobody overwrites."""
  names: set[str] = set()
  if layout.older.exists():
    try:
      told = json.loads(layout.older.read_bytes())["weight_map"].values()
      names = {name for name in told if os.path.basename(name) == name}
    except (ValueError, TypeError, KeyError, AttributeError):
      pass
  whole = layout.older.name.removesuffix(storage.INDEX) + ".safetensors"
  if layout.index is not None and (layout.older.parent / whole).exists():
    names.add(whole)
  return sorted(names - {shard.path.name for shard in layout.shards})


@contextlib.contextmanager
def journal_of(layout: Layout, parts: Mapping[str, str]) -> Iterator[Journal]:
  """Yields the record of a merge, alone in its folder.

  The folder is removed at the end, and after an error that would come again
  or that leaves no room; otherwise the next merge of the same goes on.

  Args:
    layout: what is written.
    parts: digests of all that the result depends on, by what they are of.

  Raises:
    ConflictError: if another process merges into the same place.
    OSError: if there is too little room.
  """
  parent = layout.work.parent
  fresh = not parent.exists()
  parent.mkdir(exist_ok=True)
  layout.work.mkdir(exist_ok=True)
  keep = False
  with open(layout.work / "lock", "wb") as lock:
    _lock(lock, layout)
    try:
      journal = Journal(layout, parts)
      _check_room(layout, journal)
      yield journal
    except Exception as error:  # raised again: what is here may be of use
      keep = isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno not in _FULL
      )
      raise
    except BaseException:
      keep = True  # interrupted by hand
      raise
    finally:
      if not keep:
        shutil.rmtree(layout.work, ignore_errors=True)
        if fresh:
          with contextlib.suppress(OSError):
            parent.rmdir()  # if nothing is in it


def _lock(file: BinaryIO, layout: Layout) -> None:
  if fcntl is None:
    return
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ConflictError(
      f"{layout.target}: another process is merging into it; wait for it, or "
      "write elsewhere"
    ) from error


def _check_room(layout: Layout, journal: Journal) -> None:
  free = shutil.disk_usage(layout.work).free
  needed = layout.size - journal.resumed
  if not journal.placing and needed > free:
    raise OSError(
      errno.ENOSPC,
      f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
      str(layout.target),
    )


def digest_of(value: Any) -> str:
  """Returns a digest of specs, options and numbers.

  Args:
    value: a pytree of arrays, numbers, texts.
  """
  hasher = hashlib.blake2b(digest_size=16)
  leaves, structure = jax.tree.flatten(value)
  hasher.update(repr(structure).encode())
  for leaf in leaves:
    if is_key(leaf):
      hasher.update(str(leaf.dtype).encode())
      leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
      array = np.asarray(leaf)
      hasher.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    else:
      hasher.update(f"{type(leaf).__name__} {leaf!r}".encode())
  return hasher.hexdigest()


def parts_of(**values: Any) -> dict[str, str]:
  """Returns digests by name.

  Args:
    **values: see `digest_of`.
  """
  return {name: digest_of(value) for name, value in values.items()}


def unknown(sources: Sequence[Any]) -> Any:
  """Returns what stands for the identity of models, fresh if one has none.

  Args:
    sources: identities; None where nothing is known.
  """
  if any(source is None for source in sources):
    return os.urandom(16).hex()
  return json.dumps(list(sources))
