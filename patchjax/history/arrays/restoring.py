"""Restoring: from stored leaves to the tree that the user asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from patchjax.history.arrays import known, state
from patchjax.history.arrays.reading import LeafReader, empty
from patchjax.trees import dtypes, tiles
from patchjax.trees.check import check_named
from patchjax.trees.digest import Entry
from patchjax.trees.names import flatten, nested
from patchjax.trees.selectors import select_named

_GROUP = 256 << 20  # bytes of leaves that are read at a time
_TOGETHER = 8 << 20  # bytes of a leaf up to which its shards are read together


def pick(
  entries: Mapping[str, Entry], like: Any, only: Any, what: str
) -> dict[str, Entry]:
  """Returns the entries to read, once `like` is known to fit.

  Args:
    entries: the leaves of the version.
    like: see `Repo.checkout`.
    only: see `Repo.checkout`.
    what: what the version is called, for messages.

  Raises:
    MismatchError: if `like` expects other leaves; lists every one.
    SelectionError: if `only` picks nothing.
  """
  if like is not None:
    expected = state.expected(flatten(like)[0], entries)
    if only is not None:
      # Only what is asked for has to fit: the rest stays as it is.
      picked = select_named(expected, only)
      expected = {name: expected[name] for name in picked}
      entries = {k: v for k, v in entries.items() if k in expected}
    check_named(expected, entries, what=what)
    return {name: entries[name] for name in expected}
  return {name: entries[name] for name in select_named(entries, only)}


def restore(reader: LeafReader, entries: Mapping[str, Entry], like: Any) -> Any:
  """Reads leaves and returns their tree.

  A leaf that `like` has on several devices is read by region: each device of
  this process gets its shard, and nothing else is read. What is on the host
  at a time, beside the leaves that stay there, is bounded.

  Args:
    reader: reads them.
    entries: the leaves to read.
    like: see `Repo.checkout`.

  Raises:
    IntegrityError: if stored bits are missing or damaged; lists every leaf of
      the first group that is.
  """
  named, treedef = flatten(like) if like is not None else ({}, None)
  placed: dict[str, Any] = {}
  for group in _groups(entries):
    shards = {
      name: shards
      for name, entry in group.items()
      if (shards := _shards(entry, named.get(name))) is not None
    }
    whole = {k: entry for k, entry in group.items() if k not in shards}
    placed |= _read_whole(reader, whole, named)
    placed |= _read_shards(reader, {k: group[k] for k in shards}, shards)
  if treedef is None:
    return nested({name: placed[name] for name in entries})
  import jax

  leaves = [placed.get(name, leaf) for name, leaf in named.items()]
  return jax.tree.unflatten(treedef, leaves)


def _groups(entries: Mapping[str, Entry]) -> Iterator[dict[str, Entry]]:
  """Yields the leaves in groups of a bounded number of bytes."""
  group: dict[str, Entry] = {}
  size = 0
  for name, entry in entries.items():
    group[name] = entry
    size += entry.size * dtypes.itemsize(entry.dtype)
    if size >= _GROUP:
      yield group
      group, size = {}, 0
  if group:
    yield group


def _read_whole(
  reader: LeafReader, entries: Mapping[str, Entry], named: Mapping[str, Any]
) -> dict[str, Any]:
  words = reader.read(entries) if entries else {}
  used: set[int] = set()
  placed = {}
  for name, entry in entries.items():
    bits = words.pop(name)
    if id(bits) in used:
      # Equal leaves are read once, and must not share memory: numpy arrays
      # can be written to, and JAX may use their memory without a copy.
      bits = bits.copy()
    used.add(id(bits))
    placed[name] = _place(bits, entry, named.get(name))
  return placed


@dataclasses.dataclass(frozen=True)
class _Shards:
  """What the devices of this process hold of a leaf."""

  sharding: Any
  devices: Mapping[Any, tiles.Region]
  regions: tuple[tiles.Region, ...]  # what is read

  def read_of(self, region: tiles.Region) -> int:
    """Returns which of the regions that are read holds a shard."""
    return next(
      i for i, held in enumerate(self.regions) if tiles.holds(held, region)
    )


def _shards(entry: Entry, like: Any) -> _Shards | None:
  """Returns the shards of a leaf that is read by region, else None."""
  sharding = getattr(like, "sharding", None)
  if sharding is None or not getattr(like, "committed", True):
    return None
  if sharding.is_fully_replicated and sharding.is_fully_addressable:
    return None
  if dtypes.is_wide(like):
    return None  # stays on the host: JAX would narrow it
  devices = {
    device: tiles.region_of(index, entry.shape)
    for device, index in sharding.addressable_devices_indices_map(
      entry.shape
    ).items()
  }
  unique = {
    tuple((s.start, s.stop) for s in region): region
    for region in devices.values()
  }
  regions = tuple(unique.values())
  if regions and entry.size * dtypes.itemsize(entry.dtype) <= _TOGETHER:
    # One chunk, most likely: it would be decoded again for every shard.
    regions = (tiles.around(regions),)
  return _Shards(sharding, devices, regions)


def _read_shards(
  reader: LeafReader,
  entries: Mapping[str, Entry],
  shards: Mapping[str, _Shards],
) -> dict[str, Any]:
  import jax

  wanted = [
    (name, entry, region)
    for name, entry in entries.items()
    for region in shards[name].regions
  ]
  found = iter(reader.read_regions(wanted) if wanted else [])
  placed = {}
  for name, entry in entries.items():
    plan = shards[name]
    words = [next(found) for _ in plan.regions]
    arrays = []
    for device, region in plan.devices.items():
      which = plan.read_of(region)
      part = words[which][tiles.within(region, plan.regions[which])]
      memory = plan.sharding.memory_kind
      where = jax.sharding.SingleDeviceSharding(device, memory_kind=memory)
      arrays.append(jax.device_put(stored(part, entry), where))
    # The dtype of no array at all: a process may have none of the devices.
    dtype = arrays[0].dtype if arrays else dtype_of(entry)
    placed[name] = jax.make_array_from_single_device_arrays(
      entry.shape, plan.sharding, arrays, dtype=dtype
    )
    known.remember(placed[name], entry)
  return placed


def dtype_of(entry: Entry) -> Any:
  """Returns the dtype of a leaf: numpy's, or JAX's own for PRNG keys.

  Args:
    entry: the leaf.
  """
  return stored(empty(Entry(entry.digest, entry.dtype, (0,))), entry).dtype


def stored(words: np.ndarray, entry: Entry) -> Any:
  """Returns a leaf as it was stored: on the host, PRNG keys as keys.

  Args:
    words: its bits.
    entry: its entry.
  """
  return dtypes.device(words, entry.dtype)


def _place(words: np.ndarray, entry: Entry, like: Any) -> Any:
  """Returns one leaf where `like` has it: on the host, or in its sharding."""
  import jax

  x = stored(words, entry)
  if state.is_data(like):
    return state.restored(x, like)
  if isinstance(like, np.ndarray | np.generic):
    return x if x.flags.writeable else x.copy()
  if dtypes.is_wide(x):
    return x  # JAX would narrow it
  sharding = getattr(like, "sharding", None)
  if not getattr(like, "committed", True):
    sharding = None  # free to follow what it meets, as the count of adam is
  placed = jax.device_put(x, sharding)
  if getattr(like, "weak_type", False):
    placed = state.weak(placed)
  known.remember(placed, entry)
  return placed
