"""Encoding leaves that are spread over processes, shard by shard.

What an elementwise encoding makes of a shard is put where the shard is: the
encoded array has the sharding of its leaf, and each process writes its own.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchjax.history.arrays import encodings, known, processes
from patchjax.history.arrays.parts import joined, parts_of
from patchjax.history.arrays.reading import LeafReader
from patchjax.trees import dtypes, tiles
from patchjax.trees.digest import Entry
from patchjax.trees.errors import IntegrityError
from patchjax.trees.tiles import Region

_SAMPLE = 1 << 16  # elements of a shard that are measured


def words(value: Any, entry: Entry) -> Any:
  """Returns the words of a leaf as an array with its sharding.

  Args:
    value: the leaf.
    entry: its dtype and shape.
  """
  found = processes.together(
    lambda: [(part.region, part.fetch()) for part in parts_of(value).parts]
  )
  return joined(value.sharding, entry, found)


def encode(
  value: Any, entry: Entry, base: str, reader: LeafReader
) -> tuple[str, dict[str, Any]]:
  """Returns how a leaf is held, and its array.

  Which encoding is smallest is measured by each process on its own shards;
  the most bytes decide.

  Args:
    value: the leaf.
    entry: its digest, dtype and shape.
    base: digest of the leaf that it may be a difference to.
    reader: reads the base, where no array of it is in memory.
  """
  import jax

  plain = encodings.plain_encoding(entry.dtype), {"": value}
  sharding = value.sharding
  if dtypes.is_key(value) or not isinstance(
    sharding, jax.sharding.NamedSharding
  ):
    return plain
  held = parts_of(value).parts
  bases: list[np.ndarray] = []

  def look() -> bytes:
    bases.extend(_bases(base, entry, [part.region for part in held], reader))
    votes = collections.Counter[str]()
    for part, old in zip(held, bases):
      votes[_choice(part.fetch(), old, entry)] += tiles.size_of(part.region)
    return json.dumps(votes).encode()

  try:
    said = processes.share(look)
  except IntegrityError:
    return plain  # a damaged base must not stand in the way
  votes = collections.Counter[str]()
  for text in said:
    votes.update(json.loads(text))
  name = max(sorted(votes), key=lambda name: votes[name])
  encoding = encodings.ENCODINGS[name]
  if not encoding.delta:
    return plain

  def make() -> list[tuple[Region, np.ndarray]]:
    found = []
    for part, old in zip(held, bases):
      shard = Entry(entry.digest, entry.dtype, tiles.shape_of(part.region))
      found.append((part.region, encoding.encode(part.fetch(), old, shard)[""]))
    return found

  return name, {"": joined(sharding, entry, processes.together(make))}


def _bases(
  base: str, entry: Entry, regions: Sequence[Region], reader: LeafReader
) -> list[np.ndarray]:
  old = known.parts_of(base)
  if old is not None:
    try:
      return [old.read(region) for region in regions]
    except ValueError:
      pass  # it lies in other processes, in another sharding
  below = Entry(base, entry.dtype, entry.shape)
  return reader.read_regions([("the base", below, r) for r in regions])


def _choice(new: np.ndarray, old: np.ndarray, entry: Entry) -> str:
  """Returns the encoding that is smallest for a sample of a shard."""
  axes = len(entry.shape)
  new = new.reshape(-1, *new.shape[axes:])
  old = old.reshape(-1, *old.shape[axes:])
  start = max(len(new) - _SAMPLE, 0) // 2
  sample = slice(start, start + _SAMPLE)
  few = Entry(entry.digest, entry.dtype, (len(new[sample]),))
  return encodings.choose(new[sample], old[sample], few, elementwise=True)[0]
