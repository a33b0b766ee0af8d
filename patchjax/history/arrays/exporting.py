"""Export: any version as a plain Orbax checkpoint, for those without us."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from patchjax.trees.errors import RepositoryError
from patchjax.trees.names import nested, split

if TYPE_CHECKING:
  from patchjax.history.repo import Repo


def export(repo: Repo, ref: str, path: str | os.PathLike[str]) -> None:
  """Writes a version as a plain Orbax checkpoint.

  `orbax.checkpoint.v1.load(path)` gives nested dicts of arrays. What Orbax
  cannot hold is described in the checkpoint's `custom_metadata`: leaves of
  dtypes without a zarr type (PRNG keys, numbers of less than a byte) are
  written as the unsigned words of their bits, zero-size leaves are left out.

  Args:
    repo: the repository.
    ref: the version.
    path: folder to create.

  Raises:
    RepositoryError: if the folder exists or cannot be written, or nothing is
      left to write.
    IntegrityError: if stored bits are missing or damaged.
  """
  from patchjax.history.arrays import encodings, payloads

  path = os.path.abspath(os.path.expanduser(path))
  if path.endswith((".safetensors", ".npz")):
    raise RepositoryError(
      f"{path}: expected the name of a folder for an Orbax checkpoint; files "
      "of other libraries are written by patchjax.interop.export"
    )
  if os.path.exists(path):
    raise RepositoryError(f"{path} exists already; choose a new folder")
  commit = repo.show(ref)
  entries = repo.objects.tree(commit.tree)
  held = {name: entry for name, entry in entries.items() if entry.size}
  if not held:
    raise RepositoryError(
      f"version {ref!r} has zero-size leaves only, which Orbax cannot hold"
    )
  words = repo.reader.read(held)
  arrays = {
    name: encodings.to_stored(words[name], entry.dtype)
    for name, entry in held.items()
  }
  metadata = {
    "commit": commit.id,
    "words": {
      name: entry.dtype
      for name, entry in held.items()
      if encodings.plain_encoding(entry.dtype) == encodings.WORDS.name
    },
    "zero_size": {
      name: {"dtype": entry.dtype, "shape": list(entry.shape)}
      for name, entry in entries.items()
      if not entry.size
    },
  }
  if _collide(arrays):
    payloads.save(path, arrays, metadata={**metadata, "flat": True})
  else:
    payloads.save(path, nested(arrays), metadata=metadata)


def _collide(names: Collection[str]) -> bool:
  """Whether Orbax would confuse two of the leaves in nested dicts."""
  # It joins the keys of a path by dots: `a.b` and `a -> b` would collide, in
  # silence if they have one shape.
  dotted = {".".join(split(name)) for name in names}
  return len(dotted) < len(names) or not all(all(split(n)) for n in names)
