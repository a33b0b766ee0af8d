"""Which encoding is smallest: measured on a sample of the leaf, not guessed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patchjax.history.arrays.encodings.bits import BITS, code_tile
from patchjax.history.arrays.encodings.common import Encoding
from patchjax.history.arrays.encodings.factors import FACTORS, Factors, evaluate
from patchjax.history.arrays.encodings.measuring import compressed, sample
from patchjax.history.arrays.encodings.plain import DENSE, WORDS, plain_encoding
from patchjax.history.arrays.encodings.planes import PLANES, to_planes
from patchjax.history.arrays.encodings.sparse import SPARSE, code_changes
from patchjax.trees.digest import Entry

ENCODINGS: dict[str, Encoding] = {
  encoding.name: encoding
  for encoding in (DENSE, WORDS, PLANES, BITS, SPARSE, FACTORS)
}
"""Every encoding by its name in indices."""

SMALLEST = 4096
"""Bytes below which a difference is not worth reading the base."""

GAIN = 0.9
"""Share of its bytes that a leaf may keep, to be worth holding otherwise: a
difference costs reading its base, and moving a leaf costs writing it."""

# Shares of changed words: below the first the others are not even measured,
# above the second sparse is not (above the third in small words: what it saves
# is not worth decoding it).
_FEW, _MANY, _MANY_SMALL = 1 / 16, 1 / 6, 1 / 8

_BLOCK = 1 << 16  # words compared at a time


def choose(
  words: np.ndarray,
  base: np.ndarray | None,
  entry: Entry,
  *,
  factors: Factors | None = None,
  elementwise: bool = False,
) -> tuple[str, dict[str, np.ndarray]]:
  """Returns the smallest encoding of a leaf, and what it stores.

  Args:
    words: the bits of the leaf.
    base: those of a leaf of the same dtype and shape; None if there is none.
    entry: the leaf.
    factors: the delta that a patch made of the base, if one did. Taken if it
      reproduces the leaf: the patch file is kept in any case.
    elementwise: whether only what can be encoded shard by shard may be chosen.

  Returns:
    `(name of the encoding, {part: array})`.
  """
  if base is None:
    name = plain_encoding(entry.dtype)
  elif factors is not None and _reproduces(words, base, entry, factors):
    return FACTORS.name, {}
  else:
    name, _ = smallest(measure(words, base, entry, elementwise=elementwise))
  return name, ENCODINGS[name].encode(words, base, entry)


def smallest(sizes: Mapping[str, float]) -> tuple[str, float]:
  """Returns the encoding to take, and its size.

  Args:
    sizes: as `measure` gives them; summed over processes if there are several.

  Example:
    >>> smallest({"dense": 100, "planes": 95})
    ('dense', 100)
  """
  plain = next(name for name in sizes if not ENCODINGS[name].delta)
  best = min(sizes, key=lambda name: sizes[name])
  # No base at all is worth a few bytes.
  name = best if sizes[best] < GAIN * sizes[plain] else plain
  return name, sizes[name]


def measure(
  words: np.ndarray,
  base: np.ndarray,
  entry: Entry,
  *,
  elementwise: bool = False,
) -> dict[str, float]:
  """Returns how many bytes a leaf, or a part of one, takes in each encoding.

  Args:
    words: bits of the leaf, or of a part of it.
    base: those of the base.
    entry: the leaf.
    elementwise: whether only what can be encoded shard by shard is of
      interest.

  Returns:
    `{name: bytes}`, measured on a sample.
  """
  picked = sample(words.size)
  new, old = words.reshape(-1)[picked], base.reshape(-1)[picked]
  scale = words.size / max(new.size, 1)
  sizes = {plain_encoding(entry.dtype): scale * compressed(new)}
  changed = 1.0
  if not elementwise:
    count = _changes(words, base)
    changed = count / max(words.size, 1)
    small = words.itemsize <= 2
    if changed < (_MANY_SMALL if small else _MANY):
      sizes[SPARSE.name] = _sparse(words, base, new, old, count)
    if changed < _FEW:
      return sizes
    if small:
      sizes[BITS.name] = scale * _bytes(code_tile(new, old))
  sizes[PLANES.name] = scale * compressed(to_planes(new, old))
  return sizes


def _bytes(sections: list[tuple[int, bytes]]) -> int:
  return sum(len(data) for _, data in sections)


def _sparse(
  words: np.ndarray,
  base: np.ndarray,
  new: np.ndarray,
  old: np.ndarray,
  count: int,
) -> float:
  """Returns the bytes of `count` changes, by those of a sample."""
  found = np.flatnonzero(new != old)
  if len(found) < min(count, 64):
    # The sample missed them: as if each took its word, and a gap of a word.
    return 2.0 * count * words.itemsize
  return (
    count
    * _bytes(code_changes(found, new[found], old[found]))
    / max(len(found), 1)
  )


def _changes(words: np.ndarray, base: np.ndarray) -> int:
  """Returns how many words differ."""
  new, old = words.reshape(-1), base.reshape(-1)
  return sum(
    int(np.count_nonzero(new[i : i + _BLOCK] != old[i : i + _BLOCK]))
    for i in range(0, new.size, _BLOCK)
  )


def _reproduces(
  words: np.ndarray, base: np.ndarray, entry: Entry, factors: Factors
) -> bool:
  try:
    found = evaluate(entry, None, factors.delta, base)
  except ValueError:
    return False
  return np.array_equal(found, words)
