"""Merges models that are mostly holes, and prints what memory it took.

Run as `sparse.py FOLDER LEAVES MEGABYTES`: four models and a base, each of so
many leaves of so many MB, bfloat16, by TIES over the tree.
"""

import json
import pathlib
import sys
import time

import numpy as np

import patchjax as pj
from patchjax.merging.files import merge_files
from patchjax.patches import storage


def sparse_model(path, leaves, rows, *, seed, written=1 / 16):
  """Writes a bfloat16 model of `leaves` x [rows, 1024], mostly holes.

  Args:
    path: the file.
    leaves: how many.
    rows: of each.
    seed: of the numbers in the first rows of each leaf; the others are 0.
    written: which share of the rows these are.
  """
  size = rows * 1024 * 2
  header = {
    f"layers.{i}.weight": {
      "dtype": "BF16",
      "shape": [rows, 1024],
      "data_offsets": [i * size, (i + 1) * size],
    }
    for i in range(leaves)
  }
  head = storage.header_bytes(header)
  rng = np.random.default_rng(seed)
  some = rng.standard_normal((max(1, int(rows * written)), 1024), np.float32)
  # The upper half of a float32: the bfloat16 towards zero.
  block = np.ascontiguousarray(some.view(np.uint16).reshape(-1, 2)[:, 1])
  with open(path, "wb") as file:
    file.write(head)
    for i in range(leaves):
      file.seek(len(head) + i * size)
      file.write(np.roll(block, 7919 * i * seed).data)
    file.truncate(len(head) + leaves * size)
  return leaves * size


def memory():
  """Bytes of memory now, and at most so far."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  told = dict(line.split(":", 1) for line in lines)
  return tuple(int(told[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM"))


def main(folder, leaves, megabytes):
  folder.mkdir()
  rows = megabytes * 512
  paths = [folder / f"{i}.safetensors" for i in range(5)]
  total = sum(
    sparse_model(path, leaves, rows, seed=i) for i, path in enumerate(paths)
  )
  method = pj.merging.ties(density=0.2)
  tiny = [{"w": np.float32([i, 1])} for i in range(5)]
  merge_files(tiny[0], tiny[1:], method, folder / "tiny.safetensors")
  before = memory()[0]
  start = time.process_time()
  merge_files(paths[0], paths[1:], method, folder / "out.safetensors")
  told = {
    "input": total,
    "leaf": rows * 2048,
    "before": before,
    "peak": memory()[1],
    "seconds": time.process_time() - start,
  }
  print(json.dumps(told))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
