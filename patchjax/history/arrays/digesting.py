"""The digests of a value: what has not changed is not hashed, and nobody
gathers a leaf to hash it.

In several processes each hashes the tiles that it holds. Tiles that no process
holds as a whole (shards smaller than a tile, or not aligned to them) are rare:
such a leaf is resharded on its devices first, to shards of whole tiles (see
`coarser`); where even that is impossible, the pieces of a tile are exchanged.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.history.arrays import known, processes
from patchjax.history.arrays.parts import Parts, joined, parts_of
from patchjax.trees import digest as digests
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.errors import StructureError

_EXCHANGED = 16 << 20  # bytes of tiles exchanged at a time


@dataclasses.dataclass(frozen=True)
class Digested:
  """A leaf and its digest.

  Attributes:
    entry: its digest, dtype and shape.
    tiles: the digests of its tiles, as an index keeps them; None if there is
      one only, or they were not computed.
  """

  entry: Entry
  tiles: str | None = None


def digest(
  named: Mapping[str, Any], parent: Mapping[str, Entry]
) -> dict[str, Digested]:
  """Returns the digests of leaves, by the cheapest proof there is.

  Called by all processes with the same leaves.

  Args:
    named: `{text name: array}`.
    parent: the entries of the version before.

  Raises:
    StructureError: if processes hold different trees, or different values of
      an array on the host.
  """
  if processes.count() == 1:
    return {name: _alone(x, parent.get(name)) for name, x in named.items()}
  return _in_processes(named, parent)


def _alone(x: Any, parent: Entry | None) -> Digested:
  found = known.recall(x)
  if found is not None:
    return Digested(found)
  held = parts_of(x)
  found = known.equal(held, parent)
  if found is not None:
    known.remember(x, found)
    return Digested(found)
  made = _hashed_alone(held)
  known.remember(x, made.entry)
  return made


def _hashed_alone(held: Parts) -> Digested:
  grid = tiles.grid(held.shape, dtypes.itemsize(held.dtype))
  return _made(held, digests.hash_tiles(held.read, list(grid)))


def _made(held: Parts, level: Sequence[bytes]) -> Digested:
  root = digests.root(level, held.dtype, held.shape)
  spelled = b"".join(level).hex() if len(level) > 1 else None
  return Digested(Entry(root, held.dtype, held.shape), spelled)


def with_tiles(
  named: Mapping[str, Any], entries: Mapping[str, Entry]
) -> dict[str, Digested]:
  """Returns leaves that were known without hashing, with digests of tiles.

  Args:
    named: `{text name: array}`.
    entries: what is known of them.
  """
  large = {
    name: x for name, x in named.items() if len(_grid_of(entries[name])) > 1
  }
  if processes.count() == 1:
    return {k: _hashed_alone(parts_of(x)) for k, x in large.items()}
  return _hashed(large)


def _grid_of(entry: Entry) -> tiles.Grid:
  return tiles.grid(entry.shape, dtypes.itemsize(entry.dtype))


def _in_processes(
  named: Mapping[str, Any], parent: Mapping[str, Entry]
) -> dict[str, Digested]:
  found = {
    name: Digested(entry) for name, entry in _claims(named, parent).items()
  }
  found |= _hashed({k: x for k, x in named.items() if k not in found})
  return {name: found[name] for name in named}


def _hashed(named: Mapping[str, Any]) -> dict[str, Digested]:
  """Returns the digests of leaves, each tile hashed by who holds it."""
  found: dict[str, Digested] = {}
  plans = {name: _Plan.of(x) for name, x in named.items()}
  here = processes.index()
  said = processes.share(
    lambda: b"".join(
      octets for plan in plans.values() for octets in plan.hash_tiles(here)
    )
  )
  starts = [0] * len(said)
  for name, plan in plans.items():
    level: list[bytes] = [b""] * len(plan.grid)
    for process, text in enumerate(said):
      for number in plan.tiles_of(process):
        octets = text[starts[process] : starts[process] + 32]
        starts[process] += 32
        if level[number] not in (b"", octets):
          raise StructureError(
            f"{name}: the array on the host has other values in process "
            f"{process} than in process 0; a value is committed by all "
            "processes together: give all of them the same arrays"
          )
        level[number] = octets
    for number, octets in _exchanged(plan):
      level[number] = octets
    found[name] = _made(parts_of(named[name]), level)
    known.remember(named[name], found[name].entry)
  return found


def _claims(
  named: Mapping[str, Any], parent: Mapping[str, Entry]
) -> dict[str, Entry]:
  """Returns the entries of leaves that all processes know without hashing."""
  structure = {
    name: (dtypes.dtype_name(x), tuple(np.shape(x)), is_local(x))
    for name, x in named.items()
  }

  def claim() -> bytes:
    spelled = repr(list(structure.items())).encode()
    lines = [hashlib.sha256(spelled).hexdigest()]
    for name, x in named.items():
      entry = known.recall(x) or known.equal(parts_of(x), parent.get(name))
      lines.append(entry.digest if entry is not None else "")
    return "\n".join(lines).encode()

  said = [text.decode().split("\n") for text in processes.share(claim)]
  for process, lines in enumerate(said):
    if lines[0] != said[0][0]:
      raise StructureError(
        f"process {process} commits other names, dtypes or shapes than "
        "process 0; all processes must commit the same tree"
      )
  return {
    name: Entry(claims[0], *structure[name][:2])
    for name, *claims in zip(structure, *(lines[1:] for lines in said))
    if claims[0] and len(set(claims)) == 1
  }


def is_local(x: Any) -> bool:
  """Returns whether an array is one of this process alone.

  The others must then hold the same of their own: arrays on the host, and on
  local devices.

  Args:
    x: a numpy array or `jax.Array`.
  """
  devices = getattr(getattr(x, "sharding", None), "device_set", ())
  return {device.process_index for device in devices} <= {processes.index()}


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Who hashes which tile of a leaf; the same in every process.

  Attributes:
    grid: how the leaf is cut.
    value: the leaf.
    words: its words, resharded to whole tiles, if need be.
    owners: the processes that hash each tile: every one for local arrays
      (which must be equal), none for a tile that nobody holds.
  """

  grid: tiles.Grid
  value: Any
  words: Any
  owners: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, x: Any) -> _Plan:
    entry = Entry("", dtypes.dtype_name(x), tuple(np.shape(x)))
    grid = _grid_of(entry)
    if is_local(x):
      everyone = tuple(range(processes.count()))
      return cls(grid, x, None, (everyone,) * len(grid))
    owners = _owners(grid, x.sharding)
    if () not in owners or (shardings := coarser(x.sharding, grid)) is None:
      return cls(grid, x, None, owners)
    words = _reshard(x, entry, *shardings)
    return cls(grid, x, words, _owners(grid, shardings[1]))

  def tiles_of(self, process: int) -> list[int]:
    """Returns the tiles that a process hashes."""
    return [i for i, owners in enumerate(self.owners) if process in owners]

  def hash_tiles(self, process: int) -> list[bytes]:
    """Returns the digests of the tiles that a process hashes."""
    regions = [self.grid[i] for i in self.tiles_of(process)]
    if self.words is None:
      return digests.hash_tiles(parts_of(self.value).read, regions)
    held = parts_of(self.words)
    inner = tiles.whole(self.words.shape[len(self.grid.shape) :])
    return digests.hash_tiles(lambda r: held.read((*r, *inner)), regions)


def _owners(grid: tiles.Grid, sharding: Any) -> tuple[tuple[int, ...], ...]:
  """Returns for each tile the one process that hashes it, if one can."""
  held: dict[int, dict[Any, tiles.Region]] = collections.defaultdict(dict)
  for device, index in sharding.devices_indices_map(grid.shape).items():
    region = tiles.region_of(index, grid.shape)
    key = tuple((s.start, s.stop) for s in region)
    held[device.process_index][key] = region
  able: list[list[int]] = [[] for _ in range(len(grid))]
  for process, regions in sorted(held.items()):
    sizes = collections.Counter[int]()
    for region in regions.values():
      for number in grid.cover(region):
        shared = tiles.overlap(grid[number], region)
        sizes[number] += tiles.size_of(shared) if shared is not None else 0
    for number, size in sizes.items():
      if size == tiles.size_of(grid[number]):
        able[number].append(process)
  # Replicas share the work.
  return tuple(
    (who[number % len(who)],) if who else () for number, who in enumerate(able)
  )


def coarser(sharding: Any, grid: tiles.Grid) -> tuple[Any, Any] | None:
  """Returns shardings that make a leaf's shards whole tiles.

  Along each dimension as few shards are joined as need be: the mesh axes are
  split in two, the minor part is replicated. The devices and their order stay.

  Args:
    sharding: how the leaf lies now.
    grid: its tiles.

  Returns:
    `(the same layout on the split mesh, the coarser one)`, or None if the
    sharding names no mesh.
  """
  import jax

  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  mesh: Any = sharding.mesh
  sizes = dict(zip(mesh.axis_names, mesh.devices.shape))
  axes: dict[str, tuple[tuple[str, int], ...]] = {
    name: ((name, size),) for name, size in sizes.items()
  }
  fine: list[Any] = []
  coarse: list[Any] = []
  padded = [*sharding.spec] + [None] * (len(grid.shape) - len(sharding.spec))
  for length, edges, part in zip(grid.shape, grid.edges, padded):
    names = (part,) if isinstance(part, str) else tuple(part or ())
    total = math.prod(sizes[name] for name in names)
    keep = max(
      n
      for n in range(1, total + 1)
      if total % n == 0
      and _is_prefix([sizes[name] for name in names], n)
      and set(range(0, length, max(length // n, 1))) <= set(edges)
    )
    kept: list[str] = []
    all_: list[str] = []
    for name in names:
      size = sizes[name]
      major = math.gcd(keep, size)
      keep //= major
      if 1 < major < size:
        axes[name] = (
          (f"{name}_major", major),
          (f"{name}_minor", size // major),
        )
        kept.append(f"{name}_major")
        all_ += [f"{name}_major", f"{name}_minor"]
      else:
        kept += [name] if major == size else []
        all_.append(name)
    fine.append(tuple(all_) or None)
    coarse.append(tuple(kept) or None)
  split = [item for name in mesh.axis_names for item in axes[name]]
  devices = mesh.devices.reshape([size for _, size in split])
  finer = jax.sharding.Mesh(devices, [name for name, _ in split])

  def over(spec: list[tuple[str, ...] | None]) -> jax.sharding.NamedSharding:
    parts = jax.sharding.PartitionSpec(*spec)
    return jax.sharding.NamedSharding(
      finer, parts, memory_kind=sharding.memory_kind
    )

  return over(fine), over(coarse)


def _is_prefix(sizes: Sequence[int], n: int) -> bool:
  """Returns whether n shards are the major part of axes of these sizes."""
  for size in sizes:
    major = math.gcd(n, size)
    n //= major
    if major < size:
      break
  return n == 1


def _reshard(x: Any, entry: Entry, fine: Any, coarse: Any) -> Any:
  """Returns the words of a leaf in a coarser sharding."""
  import jax

  # As words: on their way through a collective, XLA rewrites NaNs of small
  # floating point numbers, and writes past the end of arrays of int4.
  parts = [(part.region, part.fetch()) for part in parts_of(x).parts]
  words = joined(fine, entry, parts)
  inner = [None] * (words.ndim - len(entry.shape))
  spec = jax.sharding.PartitionSpec(*coarse.spec, *inner)
  target = jax.sharding.NamedSharding(
    coarse.mesh, spec, memory_kind=coarse.memory_kind
  )
  return jax.jit(_same, out_shardings=target)(words)


def _same(words: Any) -> Any:
  return words


def _exchanged(plan: _Plan) -> list[tuple[int, bytes]]:
  """Returns the digests of the tiles that no process holds as a whole."""
  held = parts_of(plan.value)
  itemsize = dtypes.itemsize(held.dtype)
  found: list[tuple[int, bytes]] = []
  numbers = [i for i, owners in enumerate(plan.owners) if not owners]
  step = max(_EXCHANGED // tiles.LARGEST, 1)
  for first in range(0, len(numbers), step):
    group = numbers[first : first + step]
    said = processes.share(
      lambda group=group: b"".join(
        held.fill(plan.grid[i])[0].tobytes() for i in group
      )
    )
    # Zeros where a process holds nothing, and replicas are equal: one `or`.
    joined = np.frombuffer(said[0], np.uint8).copy()
    for text in said[1:]:
      joined |= np.frombuffer(text, np.uint8)
    start = 0
    for number in group:
      size = tiles.size_of(plan.grid[number]) * itemsize
      tile = joined[start : start + size]
      found.append((number, digests.tile_digest(tile)))
      start += size
  return found
