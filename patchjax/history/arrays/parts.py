"""Parts: what this process holds of a leaf, as words on the host.

A leaf is a list of regions and their bits. A numpy array is one part, a
sharded array one part for every shard that a device of this process holds. On
a CPU the words are the array's own memory; from an accelerator a shard is
fetched when it is needed, and let go with its part.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchjax.history.arrays import encodings
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.tiles import Region


class Part:
  """A region of a leaf that this process holds.

  Attributes:
    region: where it lies.
  """

  def __init__(self, region: Region, x: Any):
    self.region = region
    self._x = x
    self._words: np.ndarray | None = None
    self._lock = threading.Lock()

  def fetch(self) -> np.ndarray:
    """Returns its words; kept as long as this object lives."""
    with self._lock:
      if self._words is None:
        self._words = _words(self._x)
      return self._words


@dataclasses.dataclass(frozen=True)
class Parts:
  """What this process holds of a leaf.

  Attributes:
    dtype: name of the dtype.
    shape: shape of the leaf.
    parts: regions that do not overlap.
  """

  dtype: str
  shape: tuple[int, ...]
  parts: tuple[Part, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of all parts."""
    elements = sum(tiles.size_of(part.region) for part in self.parts)
    return elements * dtypes.itemsize(self.dtype)

  @property
  def is_whole(self) -> bool:
    """Whether this process holds all of the leaf."""
    held = sum(tiles.size_of(part.region) for part in self.parts)
    return held == math.prod(self.shape)

  def words(self) -> np.ndarray:
    """Returns the words of the whole leaf; a copy if it has several parts.

    Raises:
      ValueError: if this process does not hold all of it.
    """
    return self.read(tiles.whole(self.shape))

  def read(self, region: Region) -> np.ndarray:
    """Returns the words of a region; a copy if it lies in several parts.

    Args:
      region: a region of the leaf.

    Raises:
      ValueError: if this process does not hold all of it.
    """
    for part in self.parts:
      if tiles.holds(part.region, region):
        return part.fetch()[tiles.within(region, part.region)]
    words, held = self.fill(region)
    if held < tiles.size_of(region):
      raise ValueError(f"{region} is not held by this process")
    return words

  def fill(self, region: Region) -> tuple[np.ndarray, int]:
    """Returns what this process holds of a region, zeros elsewhere.

    Args:
      region: a region of the leaf.

    Returns:
      `(words, number of elements that are held)`.
    """
    shape = encodings.words_shape(self.dtype, tiles.shape_of(region))
    words = np.zeros(shape, encodings.word_of(self.dtype))
    held = 0
    for part in self.parts:
      shared = tiles.overlap(part.region, region)
      if shared is not None:
        inner = part.fetch()[tiles.within(shared, part.region)]
        words[tiles.within(shared, region)] = inner
        held += tiles.size_of(shared)
    return words, held


def parts_of(x: Any) -> Parts:
  """Returns what this process holds of a leaf.

  Args:
    x: a numpy array or scalar, or a `jax.Array` over any devices.

  Raises:
    DtypeError: if it is of no known dtype.
  """
  dtype = dtypes.dtype_name(x)
  shape = tuple(np.shape(x))
  shards = getattr(x, "addressable_shards", None)
  if shards is None:
    return Parts(dtype, shape, (Part(tiles.whole(shape), x),))
  parts: dict[tuple[tuple[int, int], ...], Part] = {}
  for shard in shards:
    region = tiles.region_of(shard.index, shape)
    if _bounds(region) not in parts:  # a replica has the same bits
      parts[_bounds(region)] = Part(region, shard.data)
  return Parts(dtype, shape, tuple(parts.values()))


def _words(x: Any) -> np.ndarray:
  """Returns the words of a numpy array, or of one on one device."""
  import jax

  if (
    isinstance(x, jax.Array)
    and not dtypes.is_key(x)
    and next(iter(x.devices())).platform != "cpu"
  ):
    # JAX keeps the copy on the host as long as the array lives: this one goes.
    x = jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x])
  return dtypes.host(x)[0]


def joined(
  sharding: Any, entry: Entry, parts: Sequence[tuple[Region, np.ndarray]]
) -> Any:
  """Returns words that lie where the shards of a leaf lie, as one array.

  Args:
    sharding: that of the leaf: a `NamedSharding` if the words have more axes.
    entry: the leaf's dtype and shape.
    parts: regions of the leaf and their words, or what was made of them: with
      axes before those of the leaf, the same for all.
  """
  import jax

  some = parts[0][1]
  inner = encodings.words_shape(entry.dtype, entry.shape)[len(entry.shape) :]
  lead = some.shape[: some.ndim - len(entry.shape) - len(inner)]
  widened = sharding
  if lead or inner:
    spec = [*sharding.spec]
    spec += [None] * (len(entry.shape) - len(spec))
    widened = jax.sharding.NamedSharding(
      sharding.mesh,
      jax.sharding.PartitionSpec(
        *[None] * len(lead), *spec, *[None] * len(inner)
      ),
      memory_kind=sharding.memory_kind,
    )
  found = {_bounds(region): array for region, array in parts}
  arrays = []
  held = sharding.addressable_devices_indices_map(entry.shape)
  for device, index in held.items():
    where = jax.sharding.SingleDeviceSharding(
      device, memory_kind=sharding.memory_kind
    )
    region = tiles.region_of(index, entry.shape)
    arrays.append(jax.device_put(found[_bounds(region)], where))
  return jax.make_array_from_single_device_arrays(
    (*lead, *entry.shape, *inner), widened, arrays, dtype=some.dtype
  )


def _bounds(region: Region) -> tuple[tuple[int, int], ...]:
  return tuple((s.start, s.stop) for s in region)
