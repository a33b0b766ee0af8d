"""What an array will take in a payload: compressed by the payloads' codec."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import zstandard

_WORTH = 0.75  # of the bytes: more is not worth compressing

_LEVEL = 3  # of zstd: Orbax's own choice for its checkpoints

_STRIPS, _STRIP = 4, 4096  # words measured: evenly spread strips


@functools.cache
def sample(size: int) -> Any:
  """Returns the indices of the measured strips of a leaf.

  Args:
    size: number of its words.

  Example:
    >>> len(sample(1 << 20))
    16384
  """
  if size <= _STRIPS * _STRIP:
    return slice(None)
  starts = np.linspace(0, size - _STRIP, _STRIPS).astype(np.int64)
  return (starts[:, None] + np.arange(_STRIP)).reshape(-1)


def compressible(x: np.ndarray) -> bool:
  """Returns whether compressing an array is worth its price, on a sample.

  Coding and decoding take longer than the bytes alone, and weights hardly get
  smaller by it.

  Args:
    x: array of a plain dtype.

  Example:
    >>> compressible(np.zeros(100_000, np.float32))
    True
  """
  if not x.size:
    return False
  # Strips of the array as it lies, without a copy of all of it.
  some = x.reshape(-1)[sample(x.size)] if x.flags.c_contiguous else x[:1]
  return compressed(some) < _WORTH * some.nbytes


def compressed(x: np.ndarray) -> int:
  """Returns how many bytes an array takes in a payload.

  Args:
    x: array of a plain dtype.
  """
  octets = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  return len(_coder(threading.get_ident()).compress(octets.data))


@functools.lru_cache(maxsize=64)
def _coder(thread: int) -> Any:
  """Returns what payloads are compressed by; a thread has its own."""
  del thread
  return zstandard.ZstdCompressor(level=_LEVEL)
