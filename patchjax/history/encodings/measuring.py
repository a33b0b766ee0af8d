"""What an array will take in a payload: compressed by the payloads' codec."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

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


def compressed(x: np.ndarray) -> int:
  """Returns how many bytes an array takes in a payload.

  Args:
    x: array of a plain dtype.
  """
  import tensorstore as ts

  octets = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  array = ts.open(
    {
      "driver": "zarr3",
      "kvstore": {"driver": "memory", "path": "sample/"},
      "metadata": {
        "shape": [octets.size],
        "data_type": "uint8",
        "chunk_grid": {
          "name": "regular",
          "configuration": {"chunk_shape": [octets.size]},
        },
        # Orbax's own choice for its checkpoints.
        "codecs": [
          {"name": "bytes"},
          {"name": "zstd", "configuration": {"level": 3}},
        ],
      },
      "store_data_equal_to_fill_value": True,
    },
    create=True,
    context=ts.Context(),
  ).result()
  array.write(octets).result()
  store = array.kvstore
  assert store is not None  # every zarr array has one
  return len(store.read("c/0").result().value)
