"""Writing leaves: what is new, how it is best held, and where it goes.

Only leaves that are stored nowhere are written. A leaf whose parent version
has the same dtype and shape is held as a difference to it where that is
measured to be smaller. What is small in all goes into one blob, everything
else into one checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.history import blobs, encodings, known, payloads
from patchjax.history import index as indices
from patchjax.history.files import Files
from patchjax.history.index import Index, Location
from patchjax.history.reading import LeafReader
from patchjax.history.threads import each
from patchjax.trees import dtypes
from patchjax.trees.digest import Entry
from patchjax.trees.errors import (
  DtypeError,
  IntegrityError,
  PatchjaxError,
  StructureError,
)

# A snapshot repeats equal leaves under each of their names up to this many
# bytes, so that who opens it with Orbax finds them all.
_REPEATED = 64 * 1024


@dataclasses.dataclass(frozen=True)
class _Leaf:
  name: str
  entry: Entry
  value: Any  # None: stored already, and not read

  @functools.cached_property
  def words(self) -> np.ndarray:
    """The bits; not fetched from a device before they are needed."""
    return dtypes.host(self.value)[0]


class LeafWriter:
  """Stores the leaves of values.

  Attributes:
    files: files of the repository.
    index: its combined index.
    reader: reads the bases of differences.
  """

  def __init__(self, files: Files, index: Index, reader: LeafReader):
    self.files = files
    self.index = index
    self.reader = reader

  def write(
    self, named: Mapping[str, Any], parent: Mapping[str, Entry]
  ) -> dict[str, Entry]:
    """Stores what is not stored yet, and returns the entries of all leaves.

    Args:
      named: `{text name: leaf}`; an `Entry` stands for a leaf that is stored.
      parent: the entries of the version before, if there is one.

    Raises:
      StructureError: if there are no leaves, or names that cannot be stored.
      DtypeError: lists every leaf that is no array that JAX can hold.
      RepositoryError: if the disk is full or cannot be written.
    """
    leaves = _describe(named, parent)
    entries = {leaf.name: leaf.entry for leaf in leaves}
    self.index.refresh()
    # Zero-size leaves live in the tree object alone.
    held = [leaf for leaf in leaves if leaf.entry.size]
    places = self.index.find({leaf.entry.digest for leaf in held})
    new = {
      leaf.entry.digest: leaf
      for leaf in reversed(held)
      if leaf.value is not None and not places[leaf.entry.digest]
    }
    if new:
      self._store(leaves, dict(reversed(new.items())), parent)
    return entries

  def _store(
    self,
    leaves: list[_Leaf],
    new: Mapping[str, _Leaf],
    parent: Mapping[str, Entry],
  ) -> None:
    bases = self._bases(new, parent)
    jobs = [(leaf, bases.get(leaf.name)) for leaf in new.values()]
    arrays: dict[str, np.ndarray] = {}
    places: dict[str, Location] = {}
    # numpy and zstd work outside the interpreter's lock.
    for place, parts in each(_encode, jobs):
      for part, array in parts.items():
        arrays[encodings.key_of(place.key, part)] = array
      places[place.digest] = place
    spelled = indices.spell(places.values())
    blob = blobs.pack(arrays, spelled)
    if blob is not None:
      self.files.write(f"blobs/{blobs.name_of(blob)}", blob)
      return
    metadata = {
      "format": "patchjax payload 1",
      "words": {
        loc.key: new[digest].entry.dtype
        for digest, loc in places.items()
        if loc.encoding == encodings.WORDS.name
      },
      "planes": [
        loc.key
        for loc in places.values()
        if encodings.ENCODINGS[loc.encoding].delta
      ],
      "aliases": {},
    }
    if not parent:
      metadata["aliases"] = _repeat(leaves, new, arrays)
    pack = f"payloads/{uuid.uuid4().hex}"
    payloads.save(self.files.path(pack), arrays, metadata=metadata)
    indices.write(self.files, pack, spelled)

  def _bases(
    self, new: Mapping[str, _Leaf], parent: Mapping[str, Entry]
  ) -> dict[str, tuple[np.ndarray, Location]]:
    """Returns the bits and places of the leaves worth a difference."""
    candidates = {}
    for leaf in new.values():
      old = parent.get(leaf.name)
      if (
        old is not None
        and (old.dtype, old.shape) == (leaf.entry.dtype, leaf.entry.shape)
        and leaf.words.nbytes >= encodings.SMALLEST
      ):
        candidates[leaf.name] = old
    found = self.index.find({old.digest for old in candidates.values()})
    places = {
      name: found[old.digest][0]
      for name, old in candidates.items()
      if found[old.digest] and found[old.digest][0].depth < encodings.MAX_DEPTH
    }
    words = {name: known.words_of(places[name].digest) for name in places}
    absent = {name: parent[name] for name in words if words[name] is None}
    try:
      words |= self.reader.read(absent) if absent else {}
    except IntegrityError:
      # A damaged parent must not stand in the way of committing a good value:
      # what has no base in memory is stored whole.
      pass
    return {
      name: (bits, places[name])
      for name, bits in words.items()
      if bits is not None
    }


def _encode(
  job: tuple[_Leaf, tuple[np.ndarray, Location] | None],
) -> tuple[Location, dict[str, np.ndarray]]:
  """Returns how one leaf is stored (in a pack to be named), and its arrays."""
  leaf, base = job
  bits = None if base is None else base[0]
  name, parts = encodings.choose(leaf.words, bits, leaf.entry)
  of, depth = None, 0
  if base is not None and encodings.ENCODINGS[name].delta:
    of, depth = base[1].digest, base[1].depth + 1
  return Location(leaf.entry.digest, "", leaf.name, name, of, depth), parts


def _describe(
  named: Mapping[str, Any], parent: Mapping[str, Entry]
) -> list[_Leaf]:
  named = _arrays(named)
  if not named:
    raise StructureError(
      "the tree has no leaves: expected at least one array; nothing was "
      "committed"
    )
  bad = []
  leaves = []
  for name, x in named.items():
    if isinstance(x, Entry):
      leaves.append(_Leaf(name, x, None))
      continue
    try:
      _check(name, x)
      dtypes.dtype_name(x)
      if not bad:  # with a bad leaf nothing is hashed any more
        leaves.append(_Leaf(name, known.entry_of(x, parent.get(name)), x))
    except PatchjaxError as error:
      bad.append(f"  {name}: {error}")
  if bad:
    raise DtypeError(
      f"{len(bad)} leaf/leaves cannot be committed; nothing was:\n"
      + "\n".join(bad)
    )
  return leaves


def _arrays(named: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves out what is no array, and says so where that may be data."""
  data = {
    name: leaf
    for name, leaf in named.items()
    if not dtypes.is_array(leaf) and not callable(leaf)
  }
  if data:
    listed = ", ".join(f"{name} = {leaf!r:.40}" for name, leaf in data.items())
    warnings.warn(
      f"{len(data)} leaf/leaves are no arrays and are not stored: {listed}; "
      "make them arrays (numpy.asarray) to have them stored",
      stacklevel=6,
    )
  return {name: leaf for name, leaf in named.items() if dtypes.is_array(leaf)}


def _check(name: str, x: Any) -> None:
  try:
    name.encode()
  except UnicodeEncodeError as error:
    raise StructureError(
      f"the name {name!r} is no valid Unicode text; rename the leaf"
    ) from error
  import jax
  from jax.core import Tracer

  if isinstance(x, Tracer):
    raise DtypeError("a traced value has no bits; commit outside of jit")
  if isinstance(x, jax.ShapeDtypeStruct):
    raise DtypeError("an abstract array has no bits; commit arrays")
  if isinstance(x, jax.Array):
    if x.is_deleted():
      raise DtypeError(
        "the array was deleted or donated; commit before donating it"
      )
    if not x.is_fully_addressable:
      raise DtypeError(
        "the array is spread over several processes; gather it to this one "
        "(jax.experimental.multihost_utils.process_allgather) first"
      )


def _repeat(
  leaves: list[_Leaf],
  new: Mapping[str, _Leaf],
  arrays: dict[str, np.ndarray],
) -> dict[str, str]:
  """Adds equal leaves under their own names; returns aliases of large ones."""
  aliases = {}
  for leaf in leaves:
    first = new.get(leaf.entry.digest)
    if first is None or leaf.value is None or leaf.name in arrays:
      continue
    if leaf.words.nbytes <= _REPEATED:
      arrays[leaf.name] = arrays[first.name]
    else:
      aliases[leaf.name] = first.name
  return aliases
