"""`factors`: a leaf as a submitted patch made it, from the patch file itself.

A patch that is committed is kept byte for byte beside its result. A leaf that
the pinned evaluation of one of its deltas reproduces bit for bit needs no room
of its own: its place in the index names the patch file and the delta. Low-rank
factors, sparse and quantized numbers are cut to the region before they are
evaluated, so that a region costs what it holds.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from patchjax.history.arrays.encodings.common import (
  Encoding,
  Fetch,
  expect,
  full,
  needed,
  of_words,
)
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region

if TYPE_CHECKING:
  from patchjax.patches import Patch
  from patchjax.patches.deltas import Delta

_ID, _NAME = "id", "name"  # parts: of which patch, which delta
_OPEN = 4  # patch files that stay parsed


@dataclasses.dataclass(frozen=True)
class Factors:
  """The delta of a committed patch that made a leaf of its base.

  Attributes:
    patch: id of the object that holds the patch file.
    name: the leaf's name in the patch.
    delta: the numeric delta.
  """

  patch: str
  name: str
  delta: Any

  @property
  def key(self) -> str:
    """What an index calls it."""
    return f"{self.patch}/{self.name}"


def object_of(encoding: str, key: str) -> str | None:
  """Returns the id of the object that a leaf is read from beside its pack.

  Args:
    encoding: how the leaf is stored.
    key: its key.

  Example:
    >>> object_of("dense", "w") is None, object_of("factors", "ab/w")
    (True, 'ab')
  """
  return key.partition("/")[0] if encoding == FACTORS.name else None


def factors_of(
  patch: str | None, read: Callable[[str], bytes]
) -> dict[str, Factors]:
  """Returns what a committed patch made of leaves of its base, by name.

  Args:
    patch: id of the object that holds the patch file, if there is one.
    read: returns the bytes of an object, verified.
  """
  if patch is None:
    return {}
  from patchjax.patches.deltas import Delta

  deltas = _patch(patch, lambda: read(patch)).deltas
  return {
    name: Factors(patch, name, delta)
    for name, delta in deltas.items()
    if isinstance(delta, Delta)
  }


def applied(
  named: Mapping[str, Any], old: Mapping[str, Entry], patch: str, data: bytes
) -> dict[str, Any]:
  """Returns the leaves that a patch file makes, and notes that it made them.

  It is the file that is evaluated, as whoever reads the version will: what is
  made here need not be evaluated once more to know that it can be.

  Args:
    named: `{text name: leaf}` of the base, verified; an `Entry` may stand for
      a leaf that the patch does not touch.
    old: the entries of the base.
    patch: id of the object that holds, or will hold, the file.
    data: the file.

  Raises:
    MismatchError: lists every delta that does not fit its leaf.
  """
  from patchjax.patches import pinned

  loaded = _patch(patch, lambda: data)
  changed = pinned.apply_named(named, loaded)
  for name in loaded.deltas.keys() & old.keys() & changed.keys():
    x = changed[name]
    if isinstance(x, np.ndarray) and x is not named[name]:
      x.flags.writeable = False
      key = f"{patch}/{name}"
      _made[id(x)] = (weakref.ref(x, _forget(id(x))), key, old[name].digest)
  return changed


def is_made(x: Any, factors: Factors, base: str) -> bool:
  """Returns whether this very array was made by a patch file of a leaf.

  Args:
    x: an array.
    factors: the delta of the patch.
    base: digest of the leaf before.
  """
  found = _made.get(id(x))
  return (
    found is not None
    and found[0]() is x
    and found[1:] == (factors.key, base)
    and not x.flags.writeable
  )


_made: dict[int, tuple[weakref.ref[np.ndarray], str, str]] = {}


def _forget(identity: int) -> Callable[[weakref.ref[np.ndarray]], None]:
  def forget(reference: weakref.ref[np.ndarray]) -> None:
    # The id may belong to another array by now.
    found = _made.get(identity)
    if found is not None and found[0] is reference:
      del _made[identity]

  return forget


def fetch_patch(key: str, read: Callable[[str], bytes]) -> Fetch:
  """Returns what reads the parts of a leaf that is held as factors.

  Args:
    key: the leaf's key.
    read: returns the bytes of an object, verified.
  """
  patch, _, name = key.partition("/")

  def fetch(
    part: str, region: Region | None = None, out: np.ndarray | None = None
  ) -> np.ndarray:
    del region, out
    data = {"": read, _ID: str.encode, _NAME: lambda _: name.encode()}[part]
    return np.frombuffer(data(patch), np.uint8)

  return fetch


def _encode(
  words: np.ndarray, base: np.ndarray | None, entry: Entry
) -> dict[str, np.ndarray]:
  raise ValueError("factors are no encoding of a leaf without its patch")


def _decode(
  entry: Entry, region: Region | None, fetch: Fetch, base: np.ndarray | None
) -> np.ndarray:
  from patchjax.patches.deltas import Delta

  patch = _patch(bytes(fetch(_ID)).decode(), lambda: bytes(fetch("")))
  name = bytes(fetch(_NAME)).decode()
  delta = patch.deltas.get(name)
  if not isinstance(delta, Delta):
    raise ValueError(f"the patch has no delta of {name!r}")
  return evaluate(entry, region, delta, needed(base))


def evaluate(
  entry: Entry, region: Region | None, delta: Delta, base: np.ndarray
) -> np.ndarray:
  """Returns the words of a region after a delta, by the pinned evaluation.

  Args:
    entry: the leaf.
    region: a region of it; None for all of it.
    delta: a numeric delta of the whole leaf.
    base: the words of the region before.

  Raises:
    ValueError: if the delta does not fit the leaf.
  """
  from patchjax.patches import pinned
  from patchjax.patches.checks import misfit
  from patchjax.patches.cutting import cut

  if why := misfit(delta, entry):
    raise ValueError(why)
  wanted = full(entry, region)
  expect(base, base.dtype, tiles.shape_of(of_words(entry, wanted)))
  if region is not None:
    delta = cut(delta, entry.shape, wanted)
  leaf = dtypes.device(base, entry.dtype)
  return dtypes.host(pinned.apply_host(leaf, delta))[0]


_parsed: dict[str, Patch] = {}


def _patch(patch: str, read: Callable[[], bytes]) -> Patch:
  """Returns a patch; the last few stay parsed."""
  if patch not in _parsed:
    from patchjax.patches.files import loads

    loaded = loads(read(), f"object {patch}")
    while len(_parsed) >= _OPEN:
      _parsed.pop(next(iter(_parsed)), None)
    _parsed[patch] = loaded
  return _parsed[patch]


FACTORS = Encoding(
  "factors",
  _encode,
  _decode,
  parts=(),
  delta=True,
  heavy=True,
)
