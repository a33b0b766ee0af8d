"""What this machine can do: the measure of all other numbers of a run."""

from __future__ import annotations

import os
import statistics

import numpy as np
import tensorstore as ts

from experiments.bench import timing
from experiments.bench.history_tables import Section, Table
from experiments.bench.history_versions import Settings


def run(settings: Settings) -> Section:
  """Returns bandwidths of copying, hashing and compressing.

  Args:
    settings: not looked at.
  """
  del settings
  one, every = timing.hash_bandwidth()
  rows = [
    ("copy (bytes read and written)", timing.copy_bandwidth()),
    ("SHA-256, one core", one),
    (f"SHA-256, {os.cpu_count()} cores", every),
    ("zstd level 3 of float32 weights, one chunk", _zstd()),
  ]
  return Section(
    [
      Table(
        "this machine, now",
        ("what", "GB/s"),
        [(what, f"{rate / 1e9:.2f}") for what, rate in rows],
      )
    ]
  )


def _zstd(size: int = 1 << 24) -> float:
  """Bytes a second that TensorStore compresses as Orbax has it do."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal(size // 4, dtype=np.float32)
  store = ts.open(
    {
      "driver": "zarr3",
      "kvstore": {"driver": "memory"},
      "metadata": {
        "shape": [x.size],
        "data_type": "float32",
        "codecs": [
          {"name": "bytes"},
          {"name": "zstd", "configuration": {"level": 3}},
        ],
      },
    },
    create=True,
    context=ts.Context(),
  ).result()
  taken = timing.interleaved({"write": lambda: store.write(x).result()})
  return size / statistics.median(taken["write"].wall)
