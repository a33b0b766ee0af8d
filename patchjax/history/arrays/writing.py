"""Writing leaves: what is new, how it is best held, and where it goes.

Only leaves that are stored nowhere are written. A leaf whose parent version
has the same dtype and shape is held as a difference where that is measured to
be smaller: to the parent, or to what the parent itself differs from, so that
reading does not have to undo one costly difference after another. What is
small in all goes into one blob, everything else into checkpoints: those of
whole leaves get the arrays themselves, differences are computed and written
in groups, so that no more than a group is held beside the value.

In several processes `write` is called by all of them together. Each encodes
and writes its own shards; what all must know (which leaves are new, which
base, which encoding) is decided once.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.history.arrays import (
  basing,
  blobs,
  digesting,
  encodings,
  known,
  payloads,
  processes,
  spreading,
)
from patchjax.history.arrays import index as indices
from patchjax.history.arrays.index import Index, Location
from patchjax.history.arrays.parts import parts_of
from patchjax.history.arrays.reading import LeafReader
from patchjax.history.storage.files import Files
from patchjax.history.storage.objects import Objects
from patchjax.history.storage.threads import each
from patchjax.history.upkeep import superseding
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

_APART = 1 << 20  # bytes from which on they are worth a payload of their own

_GROUP = 32 << 20  # bytes of leaves that are encoded at a time
_FLUSH = 128 << 20  # bytes of differences that are written in one go


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A leaf to store, and the leaf that it may be a difference to."""

  name: str
  entry: Entry
  value: Any
  tiles: str | None
  base: Location | None = None
  factors: encodings.Factors | None = None

  @property
  def nbytes(self) -> int:
    return self.entry.size * dtypes.itemsize(self.entry.dtype)

  @functools.cached_property
  def spread(self) -> bool:
    """Whether no process holds all of it."""
    return not (
      digesting.is_local(self.value) or self.value.sharding.is_fully_replicated
    )

  @property
  def made(self) -> bool:
    """Whether it is known that its factors reproduce it."""
    return (
      self.factors is not None
      and self.base is not None
      and encodings.is_made(self.value, self.factors, self.base.digest)
    )

  def place(self, encoding: str) -> Location:
    """Returns where it will be, in a pack to be named."""
    of, depth = None, 0
    if encodings.ENCODINGS[encoding].delta:
      assert self.base is not None
      of, depth = self.base.digest, self.base.depth + 1
    key = self.name
    if self.factors is not None and encoding == encodings.FACTORS.name:
      key = self.factors.key
    return Location(self.entry.digest, "", key, encoding, of, depth, self.tiles)


@dataclasses.dataclass
class Rest:
  """What remains to be done once writing has begun.

  Attributes:
    steps: to call in every process, one after the other, in any thread, up to
      the first that fails. They exchange nothing with other processes; when
      they are through in process 0 all leaves are stored.
    stop: once set, steps that wait for other processes fail.
  """

  steps: list[Callable[[], None]] = dataclasses.field(default_factory=list)
  stop: threading.Event = dataclasses.field(default_factory=threading.Event)

  def finish(self) -> None:
    """Does what remains."""
    for step in self.steps:
      step()


@dataclasses.dataclass
class _Pack:
  """What goes into one payload or blob."""

  places: list[Location] = dataclasses.field(default_factory=list)
  arrays: dict[str, Any] = dataclasses.field(default_factory=dict)

  words: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, leaf: _Leaf, encoding: str, arrays: Mapping[str, Any]) -> None:
    """Adds a leaf and the arrays that hold it."""
    self.places.append(leaf.place(encoding))
    for part, array in arrays.items():
      self.arrays[encodings.key_of(leaf.name, part)] = array
    if encoding == encodings.WORDS.name:
      self.words[leaf.name] = leaf.entry.dtype

  @property
  def nbytes(self) -> int:
    return sum(array.nbytes for array in self.arrays.values())

  def merge(self, other: _Pack) -> None:
    """Adds all of another pack."""
    self.places += other.places
    self.arrays |= other.arrays
    self.words |= other.words


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
    self,
    named: Mapping[str, Any],
    parent: Mapping[str, Entry],
    patch: str | None = None,
    later: Rest | None = None,
  ) -> dict[str, Entry]:
    """Stores what is not stored yet, and returns the entries of all leaves.

    With `later` what takes long is only begun: the values are copied, and may
    change afterwards.

    Args:
      named: `{text name: leaf}`; an `Entry` stands for a leaf that is stored.
      parent: the entries of the version before, if there is one.
      patch: id of the patch file that made the value of the version before,
        if one did.
      later: takes what remains to be done; None does it at once.

    Raises:
      StructureError: if there are no leaves, or names that cannot be stored.
      DtypeError: lists every leaf that is no array that JAX can hold.
      RepositoryError: if the disk is full or cannot be written.
    """
    named = processes.together(lambda: checked(named))
    values = {k: x for k, x in named.items() if not isinstance(x, Entry)}
    found = digesting.digest(values, parent)
    entries = {
      name: found[name].entry if name in found else x
      for name, x in named.items()
    }
    # Zero-size leaves live in the tree object alone.
    held = {name: e.digest for name, e in entries.items() if e.size}
    stored = set(processes.first(lambda: self._stored(held.values())))
    new: dict[str, str] = {}  # digest -> first name
    for name, digest in held.items():
      if name in values and digest not in stored:
        new.setdefault(digest, name)
    if new:
      unknown = {
        name: values[name] for name in new.values() if found[name].tiles is None
      }
      # Known without hashing, and yet not in this repository.
      found |= digesting.with_tiles(unknown, entries)
      leaves = [
        _Leaf(name, entries[name], values[name], found[name].tiles)
        for name in new.values()
      ]
      repeated = (
        {} if parent else {k: v for k, v in held.items() if k in values}
      )
      self._store(self._based(leaves, parent, patch), repeated, later)
    return entries

  def _stored(self, digests: Iterable[str]) -> list[str]:
    """Returns which leaves are stored, and keeps them from a `gc`."""
    self.index.refresh()
    return sorted(superseding.claim(self.files, self.index, digests))

  def _based(
    self,
    leaves: Sequence[_Leaf],
    parent: Mapping[str, Entry],
    patch: str | None,
  ) -> list[_Leaf]:
    """Adds to each leaf the base that it may be a difference to."""
    factors = encodings.factors_of(patch, Objects(self.files).read)

    def decide() -> dict[str, Any]:
      wanted = {
        leaf.name: (old, None if leaf.spread else parts_of(leaf.value))
        for leaf in leaves
        if (old := parent.get(leaf.name)) is not None
        and (old.dtype, old.shape) == (leaf.entry.dtype, leaf.entry.shape)
        and leaf.nbytes >= encodings.SMALLEST
      }
      found = basing.bases(wanted, self.index, self.reader)
      # No version may need a base any more: then a `gc` may be taking it.
      safe = superseding.claim(
        self.files, self.index, {place.digest for place in found.values()}
      )
      return {
        name: dataclasses.asdict(place) | {"tiles": None}
        for name, place in found.items()
        if place.digest in safe
      }

    bases = processes.first(decide) if parent else {}
    return [
      dataclasses.replace(
        leaf,
        base=Location(**bases[leaf.name]),
        # Of the parent, not of what lies below it.
        factors=factors.get(leaf.name)
        if bases[leaf.name]["digest"] == parent[leaf.name].digest
        else None,
      )
      if leaf.name in bases
      else leaf
      for leaf in leaves
    ]

  def _store(
    self,
    leaves: Sequence[_Leaf],
    repeated: Mapping[str, str],
    later: Rest | None,
  ) -> None:
    # The last one: whole leaves, and what differences are left.
    pack, differences = _Pack(), _Pack()
    size = 0
    for group in _groups([leaf for leaf in leaves if leaf.base is not None]):
      for leaf, (name, arrays) in zip(group, self._encoded(group)):
        if encodings.ENCODINGS[name].delta:
          differences.add(leaf, name, arrays)
          size += sum(array.nbytes for array in arrays.values())
        else:
          pack.add(leaf, name, _whole(leaf))
      if size >= _FLUSH and later is None:
        self._save(differences, {}, later)
        differences, size = _Pack(), 0
    for leaf in leaves:
      if leaf.base is None:
        name = encodings.plain_encoding(leaf.entry.dtype)
        pack.add(leaf, name, _whole(leaf))
    # Orbax writes one checkpoint at a time: only the last can be left to it.
    if later is not None or min(pack.nbytes, differences.nbytes) < _APART:
      pack.merge(differences)
      differences = _Pack()
    # What is worth compressing, and what is not, are read at different prices.
    for part in (pack, differences):
      if part.places:
        self._save(part, repeated, later)

  def _encoded(
    self, group: Sequence[_Leaf]
  ) -> list[tuple[str, dict[str, Any]]]:
    """Returns how each leaf of a group is held, and its arrays."""
    whole = [leaf for leaf in group if not leaf.spread]
    spread = [leaf for leaf in group if leaf.spread]

    def encode() -> dict[str, tuple[str, dict[str, Any]]]:
      others = [leaf for leaf in whole if not leaf.made]
      bases = self._bases(others)
      work = each(
        lambda leaf: encodings.choose(
          parts_of(leaf.value).words(),
          bases.get(leaf.name),
          leaf.entry,
          factors=leaf.factors,
        ),
        others,
      )
      held = {leaf.name: (encodings.FACTORS.name, {}) for leaf in whole}
      return held | {leaf.name: found for leaf, found in zip(others, work)}

    # The words are equal everywhere, and so is what is chosen for them.
    found = processes.together(encode)
    for leaf in spread:
      assert leaf.base is not None
      found[leaf.name] = spreading.encode(
        leaf.value, leaf.entry, leaf.base.digest, self.reader
      )
    return [found[leaf.name] for leaf in group]

  def _bases(self, leaves: Sequence[_Leaf]) -> dict[str, np.ndarray]:
    """Returns the words of the bases that can be read."""
    bases: dict[str, np.ndarray] = {}
    absent: dict[str, Entry] = {}
    for leaf in leaves:
      assert leaf.base is not None
      digest = leaf.base.digest
      old = known.parts_of(digest)
      if old is not None and old.is_whole:
        bases[leaf.name] = old.words()
      else:
        absent[leaf.name] = Entry(digest, leaf.entry.dtype, leaf.entry.shape)
    try:
      return bases | (self.reader.read(absent) if absent else {})
    except IntegrityError:
      # A damaged parent must not stand in the way of committing a good value:
      # what has no base in memory is stored whole.
      return bases

  def _save(
    self,
    pack: _Pack,
    repeated: Mapping[str, str],
    later: Rest | None,
  ) -> None:
    """Writes a pack and its index; repeats equal leaves under their names."""
    do = processes.together if later is None else later.steps.append
    decides = not processes.index()
    spelled = indices.spell(pack.places)
    blob: bytes | None = None

    def is_blob() -> bool:
      nonlocal blob
      blob = _blob(pack, spelled)
      return blob is not None

    def write_blob() -> None:
      if blob is not None:  # in process 0
        self.files.write(f"blobs/{blobs.name_of(blob)}", blob)

    if processes.first(is_blob):
      do(write_blob)
      return
    key_of = {place.digest: place.key for place in pack.places}
    arrays, aliases = dict(pack.arrays), {}
    for name, digest in repeated.items():
      first = key_of.get(digest)
      if first is None or name in arrays:
        continue
      if arrays[first].nbytes <= _REPEATED:
        arrays[name] = arrays[first]
      else:
        aliases[name] = first
    metadata = {
      "format": "patchjax payload 1",
      "words": pack.words,
      "planes": [
        place.key
        for place in pack.places
        if encodings.ENCODINGS[place.encoding].delta
      ],
      "aliases": aliases,
    }
    name = processes.first(lambda: f"payloads/{uuid.uuid4().hex}")

    def write_index() -> None:
      if decides:
        indices.write(self.files, name, spelled)

    do(
      payloads.begin(
        self.files.path(name),
        arrays,
        metadata=metadata,
        compress=processes.first(lambda: _worth(pack)),
        stop=None if later is None else later.stop,
      )
    )
    do(write_index)


def _blob(pack: _Pack, spelled: dict[str, Any]) -> bytes | None:
  """Returns the blob of a pack, if it is small enough for one."""
  if pack.nbytes > blobs.TRY or not all(map(_is_here, pack.arrays.values())):
    return None
  host = {key: np.asarray(x) for key, x in pack.arrays.items()}
  return blobs.pack(host, spelled)


def _is_here(x: Any) -> bool:
  return isinstance(x, np.ndarray) or x.is_fully_addressable


def _whole(leaf: _Leaf) -> dict[str, Any]:
  """Returns the array of a leaf that is stored by itself."""
  import jax

  x = leaf.value
  dense = encodings.plain_encoding(leaf.entry.dtype) == encodings.DENSE.name
  if leaf.spread:
    return {"": x if dense else spreading.words(x, leaf.entry)}
  if (
    dense
    and isinstance(x, jax.Array)
    and leaf.nbytes > blobs.LARGEST
    # Of several processes Orbax takes no array of one of them.
    and (processes.count() == 1 or not x.is_fully_addressable)
  ):
    devices = x.sharding.device_set
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
      return {"": x}  # Orbax takes it shard by shard
  words = parts_of(x).words()
  return {"": encodings.to_stored(words, leaf.entry.dtype)}


def _worth(pack: _Pack) -> bool:
  """Returns whether most bytes of a pack are worth compressing."""
  gain = 0
  for place in pack.places:
    encoding = encodings.ENCODINGS[place.encoding]
    for part in encoding.parts:
      array = pack.arrays[encodings.key_of(place.key, part)]
      if encoding.delta:
        worth = not encoding.coded
      elif isinstance(array, np.ndarray):
        worth = encodings.compressible(array)
      else:
        # On an accelerator: weights are not, anything else may be.
        worth = np.dtype(array.dtype).kind not in "fcV"
      gain += array.nbytes if worth else -array.nbytes
  return gain > 0


def _groups(leaves: Sequence[_Leaf]) -> Iterator[list[_Leaf]]:
  """Yields leaves in groups of a bounded number of bytes."""
  group: list[_Leaf] = []
  size = 0
  for leaf in leaves:
    if group and size + leaf.nbytes > _GROUP:
      yield group
      group, size = [], 0
    group.append(leaf)
    size += leaf.nbytes
  if group:
    yield group


def checked(named: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves that are stored, once all of them can be.

  Args:
    named: `{text name: leaf}`.

  Raises:
    StructureError: if there are none.
    DtypeError: lists every leaf that cannot be stored.
  """
  named = _arrays(named)
  if not named:
    raise StructureError(
      "the tree has no leaves: expected at least one array; nothing was "
      "committed"
    )
  bad = []
  for name, x in named.items():
    if isinstance(x, Entry):
      continue
    try:
      _check(name, x)
      dtypes.dtype_name(x)
    except PatchjaxError as error:
      bad.append(f"  {name}: {error}")
  if bad:
    raise DtypeError(
      f"{len(bad)} leaf/leaves cannot be committed; nothing was:\n"
      + "\n".join(bad)
    )
  return named


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
      stacklevel=8,
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
    if not x.is_fully_addressable and processes.count() == 1:
      raise DtypeError(
        "the array is spread over several processes, of which JAX no longer "
        "knows; commit before jax.distributed.shutdown()"
      )
