"""Tiles: the pieces of a leaf that are hashed, verified and read on their own.

A tile is a hyper-rectangle of at most 1 MiB. How a leaf is cut depends on its
shape and the size of its elements alone, never on a sharding; yet nearly every
sharding in use is made of whole tiles, so that on a pod each process hashes
and verifies its own shards, and a slice can be verified without the rest.

The cut: as long as a tile is over 1 MiB, the longest dimension of even length
is halved (the first of equals), so that tiles fit shards by powers of two.
Where no length is even, the longest is split into two pieces of which the
last may be shorter: a dimension of odd length is not sharded. The last
dimension stays 256 bytes long at least, since shorter rows cost more to gather
than to hash.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

LARGEST = 1 << 20
"""Bytes of a tile at most."""

_ROW = 256  # bytes of the last dimension at least

Region = tuple[slice, ...]
"""A hyper-rectangle: one slice with start and stop a dimension, no step."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """How a leaf is cut into tiles.

  Attributes:
    shape: shape of the leaf.
    edges: for each dimension where its tiles begin, and its length.
  """

  shape: tuple[int, ...]
  edges: tuple[tuple[int, ...], ...]

  @functools.cached_property
  def counts(self) -> tuple[int, ...]:
    """Number of tiles along each dimension."""
    return tuple(len(edges) - 1 for edges in self.edges)

  def __len__(self) -> int:
    return math.prod(self.counts)

  def __getitem__(self, index: int) -> Region:
    """Returns the region of a tile; tiles are numbered in row-major order."""
    if not 0 <= index < len(self):
      raise IndexError(f"tile {index} of {len(self)}")
    region = []
    for edges, count in zip(reversed(self.edges), reversed(self.counts)):
      index, k = divmod(index, count)
      region.append(slice(edges[k], edges[k + 1]))
    return tuple(reversed(region))

  def __iter__(self) -> Iterator[Region]:
    return map(self.__getitem__, range(len(self)))

  def cover(self, region: Region) -> list[int]:
    """Returns the tiles that a region touches, in order.

    Args:
      region: a region of the leaf; an empty one touches none.
    """
    return self._numbers(
      range(bisect_right(edges, s.start) - 1, bisect_left(edges, s.stop))
      if s.start < s.stop
      else range(0)
      for edges, s in zip(self.edges, region)
    )

  def inside(self, region: Region) -> list[int]:
    """Returns the tiles that lie in a region as a whole, in order.

    Args:
      region: a region of the leaf.
    """
    return self._numbers(
      range(bisect_left(edges, s.start), bisect_right(edges, s.stop) - 1)
      for edges, s in zip(self.edges, region)
    )

  def widened(self, region: Region) -> Region:
    """Returns the smallest region of whole tiles around a region.

    Args:
      region: a region of the leaf.
    """
    return tuple(
      slice(
        edges[bisect_right(edges, s.start) - 1],
        edges[bisect_left(edges, s.stop)],
      )
      if s.start < s.stop
      else s
      for edges, s in zip(self.edges, region)
    )

  def _numbers(self, ranges: Iterator[range]) -> list[int]:
    strides = [math.prod(self.counts[d + 1 :]) for d in range(len(self.counts))]
    return [
      sum(map(int.__mul__, place, strides))
      for place in itertools.product(*ranges)
    ]


@functools.lru_cache(maxsize=1 << 14)
def grid(shape: tuple[int, ...], itemsize: int) -> Grid:
  """Returns how a leaf is cut.

  Args:
    shape: its shape.
    itemsize: bytes of an element (both words of a complex number, all words
      of a PRNG key).

  Example:
    >>> grid((1024, 1024), 4).edges
    ((0, 512, 1024), (0, 512, 1024))
    >>> len(grid((3, 5), 4))
    1
  """
  blocks = list(shape)  # lengths by exact halving
  pieces = list(shape)  # lengths within a block
  last = len(shape) - 1

  def shortened(d: int) -> int:
    return -(-pieces[d] // 2)

  while math.prod(pieces) * itemsize > LARGEST:
    free = [
      d
      for d in range(len(shape))
      if pieces[d] > 1 and (d != last or shortened(d) * itemsize >= _ROW)
    ]
    even = [d for d in free if pieces[d] == blocks[d] and not blocks[d] % 2]
    d = max(even or free, key=lambda d: (pieces[d], -d))
    pieces[d] = shortened(d)
    if even:
      blocks[d] = pieces[d]
  edges = tuple(
    tuple(
      start + inner
      for start in range(0, length, block)
      for inner in range(0, block, piece)
    )
    + (length,)
    if length
    else (0,)
    for length, block, piece in zip(shape, blocks, pieces)
  )
  return Grid(shape, edges)


def whole(shape: Sequence[int]) -> Region:
  """Returns the region of a whole leaf.

  Args:
    shape: its shape.

  Example:
    >>> whole((2, 3))
    (slice(0, 2, None), slice(0, 3, None))
  """
  return tuple(slice(0, n) for n in shape)


def region_of(index: Sequence[slice], shape: Sequence[int]) -> Region:
  """Returns a region with every start and stop spelled out.

  Args:
    index: slices without a step, as `jax.Shard.index` has them.
    shape: shape of the leaf.

  Example:
    >>> region_of((slice(None), slice(1, None)), (2, 3))
    (slice(0, 2, None), slice(1, 3, None))
  """
  return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape))


def shape_of(region: Region) -> tuple[int, ...]:
  """Returns the shape of a region.

  Args:
    region: a region.

  Example:
    >>> shape_of((slice(2, 5),))
    (3,)
  """
  return tuple(max(s.stop - s.start, 0) for s in region)


def size_of(region: Region) -> int:
  """Returns the number of elements of a region.

  Args:
    region: a region.
  """
  return math.prod(shape_of(region))


def within(region: Region, outer: Region) -> Region:
  """Returns a region in the coordinates of one that holds it.

  Args:
    region: a region.
    outer: the region whose corner becomes zero.

  Example:
    >>> within((slice(4, 6),), (slice(4, 8),))
    (slice(0, 2, None),)
  """
  return tuple(
    slice(s.start - o.start, s.stop - o.start) for s, o in zip(region, outer)
  )


def overlap(a: Region, b: Region) -> Region | None:
  """Returns what two regions share, or None.

  Args:
    a: a region.
    b: another of the same leaf.

  Example:
    >>> overlap((slice(0, 4),), (slice(2, 9),))
    (slice(2, 4, None),)
  """
  shared = tuple(
    slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(a, b)
  )
  return shared if all(s.start < s.stop for s in shared) else None


def holds(outer: Region, region: Region) -> bool:
  """Returns whether a region lies in another.

  Args:
    outer: a region.
    region: the one that may lie in it.

  Example:
    >>> holds((slice(0, 4),), (slice(2, 9),))
    False
  """
  return all(
    o.start <= s.start and s.stop <= o.stop for s, o in zip(region, outer)
  )


def around(regions: Sequence[Region]) -> Region:
  """Returns the smallest region that holds all of some regions.

  Args:
    regions: one or more regions of the same leaf.

  Example:
    >>> around([(slice(0, 2),), (slice(6, 8),)])
    (slice(0, 8, None),)
  """
  return tuple(
    slice(min(s.start for s in slices), max(s.stop for s in slices))
    for slices in zip(*regions)
  )


def itemsize_of(words: np.ndarray, shape: Sequence[object]) -> int:
  """Returns the bytes of an element of a leaf.

  Args:
    words: its bit patterns, or some of them; complex numbers and keys have
      several words an element, on a last axis.
    shape: the shape of the leaf, or a region of it: as long.

  Example:
    >>> itemsize_of(np.zeros((3, 2), np.uint32), (3,))
    8
  """
  return words.itemsize * math.prod(words.shape[len(shape) :])
