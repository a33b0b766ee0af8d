"""Where the bits of a leaf are: indices of payloads, combined in a cache.

Each payload and each blob has an immutable index: leaf digest -> key,
encoding, base digest, depth of the chain of differences. The combined index
is an SQLite file under `cache/`, brought up to date by listing the two
folders. It can be deleted at any time, and is, if it is damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from patchjax.history.arrays import blobs
from patchjax.history.storage.files import Files, is_temporary
from patchjax.trees.digest import canonical_json
from patchjax.trees.errors import IntegrityError

INDEX = "index.json"
_FOLDERS = ("payloads", "blobs")

_CACHE = "index.sqlite"
_BATCH = 256  # indices that are asked for at a time
_TABLES = """
create table if not exists packs (pack text primary key) without rowid;
create table if not exists locations (
  digest text, pack text, key text, encoding text, base text, depth integer,
  tiles text,
  primary key (digest, pack)
) without rowid;
"""
_COLUMNS = "digest", "pack", "key", "encoding", "base", "depth", "tiles"
_AT_ONCE = 500  # no SQLite takes fewer arguments


@dataclasses.dataclass(frozen=True)
class Location:
  """One place where a leaf is stored.

  Attributes:
    digest: digest of the leaf.
    pack: `payloads/<uuid>` or `blobs/<digest>`.
    key: name of the array in it.
    encoding: see `encodings`.
    base: digest of the leaf it is a difference to; None if it is whole.
    depth: number of differences down to a whole leaf.
    tiles: digests of its tiles, one after the other, so that a region can be
      verified without the rest; None where the leaf is a single tile.
  """

  digest: str
  pack: str
  key: str
  encoding: str
  base: str | None
  depth: int
  tiles: str | None = None


_row = operator.attrgetter(*_COLUMNS)


_FIELDS = {field.name for field in dataclasses.fields(Location)} - {
  "digest",
  "pack",
}


def spell(locations: Iterable[Location]) -> dict[str, Any]:
  """Returns the entries of an index file.

  Args:
    locations: the leaves of one payload or blob.
  """
  return {
    loc.digest: {
      "base": loc.base,
      "depth": loc.depth,
      "encoding": loc.encoding,
      "key": loc.key,
      # Absent for most leaves: an index of small leaves stays small.
      **({"tiles": loc.tiles} if loc.tiles is not None else {}),
    }
    for loc in locations
  }


def write(
  files: Files,
  pack: str,
  entries: Mapping[str, Any],
  *,
  generation: int = 0,
) -> None:
  """Writes the index of a payload, which makes the payload exist.

  Args:
    files: files of the repository.
    pack: `payloads/<uuid>`.
    entries: see `spell`.
    generation: one more than that of any place its leaves were repacked from;
      of several places of a leaf, `gc` keeps one of the highest generation.
  """
  spelled = canonical_json(entries)
  checksum = hashlib.sha256(spelled).hexdigest()
  document = {"checksum": checksum, "entries": entries, "version": 1}
  if generation:
    document["generation"] = generation
  files.write(f"{pack}/{INDEX}", canonical_json(document))


def generation(files: Files, pack: str) -> int:
  """Returns how often the leaves of a pack were repacked; 0 if never.

  Args:
    files: files of the repository.
    pack: `payloads/<uuid>` or `blobs/<digest>`.

  Raises:
    FileNotFoundError: if there is no such pack.
  """
  folder, name = pack.split("/")
  if folder == "blobs":
    header = blobs.read_header(files.read(pack), name)[0]
    return int(header.get("generation", 0))
  return int(json.loads(files.read(f"{pack}/{INDEX}")).get("generation", 0))


def read(files: Files, pack: str) -> list[Location]:
  """Returns what the index of a payload or blob says.

  Args:
    files: files of the repository.
    pack: `payloads/<uuid>` or `blobs/<digest>`.

  Raises:
    IntegrityError: if it is damaged.
    FileNotFoundError: if there is none.
  """
  return _locations(files.read(key_of(pack)), pack)


def key_of(pack: str) -> str:
  """Returns the key of the file that holds the index of a pack.

  Args:
    pack: `payloads/<uuid>` or `blobs/<digest>`.
  """
  return pack if pack.startswith("blobs/") else f"{pack}/{INDEX}"


def _locations(data: bytes, pack: str) -> list[Location]:
  folder, name = pack.split("/")
  if folder == "blobs":
    entries = blobs.read_header(data, name)[0]["index"]
  else:
    entries = parse(data, pack)
  try:
    # Fields that a newer version may add do not concern this one.
    return [
      Location(
        digest=digest,
        pack=pack,
        **{name: item[name] for name in item.keys() & _FIELDS},
      )
      for digest, item in entries.items()
    ]
  except (AttributeError, TypeError) as error:
    raise IntegrityError(f"index of {pack} is damaged: {error}") from error


def parse(data: bytes, pack: str) -> dict[str, Any]:
  """Returns the entries of an index file, verified.

  Args:
    data: its bytes.
    pack: `payloads/<uuid>`, for messages.

  Raises:
    IntegrityError: if it is damaged.
  """
  try:
    document = json.loads(data)
    version, entries = document["version"], document["entries"]
    checksum = document["checksum"]
  except (ValueError, TypeError, KeyError) as error:
    raise IntegrityError(f"index of {pack} is damaged: {error}") from error
  if version != 1:
    raise IntegrityError(
      f"index of {pack}: expected version 1, found {version!r}; it was "
      "written by a newer patchjax: upgrade"
    )
  found = hashlib.sha256(canonical_json(entries)).hexdigest()
  if checksum != found:
    raise IntegrityError(
      f"index of {pack} is damaged: expected the digest {checksum}, found "
      f"{found}"
    )
  return entries


class Index:
  """The combined index of a repository.

  Attributes:
    files: files of the repository.
    damaged: `{pack: why}` of the packs whose index cannot be read.
  """

  def __init__(self, files: Files):
    self.files = files
    self.damaged: dict[str, str] = {}
    self._memory: sqlite3.Connection | None = None
    # What was listed, and the number of packs in the cache, once it has all.
    self._complete: tuple[list[list[str]], int] | None = None

  def packs(self) -> list[str]:
    """Returns every payload (with an index) and every blob."""
    payloads = [
      f"payloads/{name}" for name in self.files.holding("payloads", INDEX)
    ]
    return payloads + [f"blobs/{name}" for name in self.files.names("blobs")]

  def find(self, digests: Iterable[str]) -> dict[str, list[Location]]:
    """Returns where leaves are stored, shortest chains first.

    Knows what was there at the last `refresh`.

    Args:
      digests: digests of leaves.

    Returns:
      `{digest: locations}`; an empty list for what is not stored.
    """
    wanted = list(dict.fromkeys(digests))
    try:
      return self._find(wanted)
    except sqlite3.DatabaseError:
      self._mend()
      return self._find(wanted)

  def _find(self, wanted: list[str]) -> dict[str, list[Location]]:
    found: dict[str, list[Location]] = {digest: [] for digest in wanted}
    with self._database() as database:
      # A statement a leaf was a fifth of the cost of a small commit.
      for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        marks = ",".join("?" * len(some))
        for row in database.execute(
          f"select {', '.join(_COLUMNS)} from locations where digest in"
          f" ({marks}) order by depth, pack",
          some,
        ):
          place = Location(*row)
          if not isinstance(place.depth, int):
            raise sqlite3.DatabaseError(f"a depth of {place.depth!r}")
          found[row[0]].append(place)
    return found

  def forget(self) -> None:
    """Deletes the cache: the next search reads every index again."""
    self._memory = self._complete = None
    try:
      os.unlink(self.files.cache(_CACHE))
    except FileNotFoundError:
      pass
    except OSError:
      # The cache of a read-only repository may be old.
      self._memory = _in_memory()

  def refresh(self) -> None:
    """Reads the indices that appeared since the last time."""
    try:
      with self._database() as database:
        self._refresh(database)
    except sqlite3.DatabaseError:
      self._mend()

  def _mend(self) -> None:
    """Makes the cache anew: a damaged one is no loss."""
    self.forget()
    with self._database() as database:
      self._refresh(database)

  @contextlib.contextmanager
  def _database(self) -> Iterator[sqlite3.Connection]:
    database = self._open()
    try:
      yield database
    finally:
      if database is not self._memory:
        database.close()

  def _open(self) -> sqlite3.Connection:
    if self._memory is not None:
      return self._memory
    try:
      path = self.files.cache(_CACHE)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      database = sqlite3.connect(path, timeout=30)
      # A cache may vanish with the power; it survives the end of a process.
      database.execute("pragma synchronous = off")
      database.executescript(_TABLES)
    except (OSError, sqlite3.OperationalError):
      # A repository on a read-only or full disk can still be read.
      database = self._memory = _in_memory()
    return database

  def _refresh(self, database: sqlite3.Connection) -> None:
    listed = [list(self.files.listing(folder)) for folder in _FOLDERS]
    [count] = database.execute("select count(*) from packs").fetchone()
    if (listed, count) == self._complete:
      return  # long histories have many packs, and most verbs look again
    self._complete = None
    known = {pack for (pack,) in database.execute("select pack from packs")}
    present = {
      f"{folder}/{name}"
      for folder, names in zip(_FOLDERS, listed)
      for name in names
    }
    self.damaged.clear()
    found: list[Location] = []
    new = []
    unknown = [
      pack
      for pack in sorted(present - known)
      if not is_temporary(pack.partition("/")[2])
    ]
    for start in range(0, len(unknown), _BATCH):
      batch = unknown[start : start + _BATCH]
      data = self.files.read_all(map(key_of, batch))
      for pack in batch:
        if key_of(pack) not in data:
          continue  # being written, or removed since it was listed
        try:
          found += _locations(data[key_of(pack)], pack)
          new.append(pack)
        except IntegrityError as error:
          self.damaged[pack] = str(error)
    gone = [(pack,) for pack in known - present]
    if new or gone:
      self._take(database, found, new, gone)
    if len(new) == len(unknown):  # none is being written, none is damaged
      self._complete = listed, len(known) + len(new) - len(gone)

  def _take(
    self,
    database: sqlite3.Connection,
    found: list[Location],
    new: list[str],
    gone: list[tuple[str]],
  ) -> None:
    """Puts into the cache what appeared, and removes what is gone."""
    with database:
      database.executemany("delete from locations where pack = ?", gone)
      database.executemany("delete from packs where pack = ?", gone)
      database.executemany(
        "insert or replace into locations values (?, ?, ?, ?, ?, ?, ?)",
        [_row(loc) for loc in found],
      )
      database.executemany(
        "insert or replace into packs values (?)", [(pack,) for pack in new]
      )


def _in_memory() -> sqlite3.Connection:
  database = sqlite3.connect(":memory:", check_same_thread=False)
  database.executescript(_TABLES)
  return database
