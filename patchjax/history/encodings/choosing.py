"""Which encoding is smallest: measured on a sample of the leaf, not guessed."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchjax.history.encodings.measuring import compressed, sample
from patchjax.history.encodings.plain import plain_encoding, to_stored
from patchjax.history.encodings.planes import PLANES, to_planes
from patchjax.trees.digest import Entry

MAX_DEPTH = 8
"""Longest chain of differences; the next version is stored whole."""

SMALLEST = 4096
"""Bytes below which a difference is not worth reading the base."""

_GAIN = 0.9  # a difference costs reading its base: it must save a tenth


def choose(
  words: np.ndarray,
  base: np.ndarray | None,
  entry: Entry,
  *,
  factors: Any = None,
  elementwise: bool = False,
) -> tuple[str, dict[str, np.ndarray]]:
  """Returns the smallest encoding of a leaf, and what it stores.

  Args:
    words: the bits of the leaf.
    base: those of a leaf of the same dtype and shape; None if there is none.
    entry: the leaf.
    factors: the delta that a patch made of the base, if one did.
    elementwise: whether only what can be encoded shard by shard may be chosen.

  Returns:
    `(name of the encoding, {part: array})`.
  """
  del factors, elementwise
  if base is not None:
    picked = sample(words.size)
    new, old = words.reshape(-1)[picked], base.reshape(-1)[picked]
    if compressed(to_planes(new, old)) < _GAIN * compressed(new):
      return PLANES.name, PLANES.encode(words, base, entry)
  return plain_encoding(entry.dtype), {"": to_stored(words, entry.dtype)}
