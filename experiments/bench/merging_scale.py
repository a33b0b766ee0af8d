"""A merge of 20 GB in the memory of a few leaves, killed once on its way.

Run as `python -m experiments.bench.merging_scale [--gigabytes 20]`. Makes a
base and four models of bfloat16 as sparse files (a sixteenth of the rows is
written, with random numbers; holes are read as zeros), merges them by TIES
with one threshold over the tree in a process of its own, kills it with
SIGKILL when two fifths of the result are written, and starts it again. Prints
what each process read and wrote, its peak memory, and the bound
(k + 3) * largest leaf + 1 GiB. The result is held against what NumPy makes of
the same numbers, bit for bit (`merging_scale_check`). Everything is written
below --folder, and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from experiments.bench import merging_scale_check
from experiments.bench.merging_scale_check import COLUMNS, CONTRIBUTORS, parts
from patchjax.patches import storage

DENSITY = 0.05

_CHILD = """
import json, pathlib, sys, time
import patchjax as pj
start = time.time()
cpu = time.process_time()
*models, out = sys.argv[1:]
done = pj.merging.merge_files(
  models[0],
  models[1:],
  pj.merging.ties(density={density}),
  out,
  shard_bytes={shard},
  progress=True,
)
status = pathlib.Path("/proc/self/status").read_text()
peak = next(x for x in status.splitlines() if x.startswith("VmHWM"))
print(json.dumps({{
  "read": done.read,
  "written": done.written,
  "resumed": done.resumed,
  "peak": int(peak.split()[1]) * 1024,
  "wall": time.time() - start,
  "cpu": time.process_time() - cpu,
}}))
"""


def shapes(gigabytes: float) -> dict[str, tuple[int, int]]:
  """Returns the leaves of one of five models: two large, many of 64 MiB."""
  entries = int(gigabytes * 1e9 / (CONTRIBUTORS + 1) / 2)
  large = entries // 8 // COLUMNS
  small = 8192
  count = (entries - 2 * large * COLUMNS) // (small * COLUMNS)
  return {
    "embed.weight": (large, COLUMNS),
    **{f"layers.{i}.weight": (small, COLUMNS) for i in range(count)},
    "head.weight": (large, COLUMNS),
  }


def write_sparse(
  path: pathlib.Path, leaves: dict[str, tuple[int, int]], seed: int
) -> None:
  """Writes a model, mostly holes."""
  header, end = {}, 0
  for name, shape in leaves.items():
    begin, end = end, end + 2 * shape[0] * shape[1]
    header[name] = {
      "dtype": "BF16",
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  head = storage.header_bytes(header)
  with open(path, "wb") as file:
    file.write(head)
    for name, row, some in parts(leaves, seed):
      begin, _ = header[name]["data_offsets"]
      file.seek(len(head) + begin + 2 * row * COLUMNS)
      file.write(some.data)
    file.truncate(len(head) + end)


def written(folder: pathlib.Path) -> int:
  """Returns the bytes of the result so far."""
  total = 0
  for path in folder.rglob("*"):
    try:
      total += path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
      pass  # it takes its place just now
  return total


def peak_of(process: subprocess.Popen) -> int:
  """Returns the most memory that a process has had so far."""
  try:
    text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  except OSError:
    return 0
  lines = [x for x in text.splitlines() if x.startswith("VmHWM")]
  return int(lines[0].split()[1]) * 1024 if lines else 0


def merge(
  models: list[pathlib.Path], out: pathlib.Path, stop_at: float
) -> tuple[int, dict[str, float] | None]:
  """Runs a merge; kills it when so many bytes are written.

  Returns:
    its peak memory, and what it printed; None if it was killed.
  """
  # Several shards, so that the killed merge has finished some.
  shard = min(1 << 30, models[0].stat().st_size // 4)
  code = _CHILD.format(density=DENSITY, shard=shard)
  process = subprocess.Popen(
    [sys.executable, "-c", code, *map(str, models), str(out)],
    stdout=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  peak = 0
  while process.poll() is None:
    peak = max(peak, peak_of(process))
    if out.exists() and written(out) >= stop_at:
      process.send_signal(signal.SIGKILL)
      process.wait()
      return peak, None
    time.sleep(0.2)  # between two looks at its memory and what it has written
  assert process.stdout is not None
  told = json.loads(process.stdout.read() or "null")
  if process.returncode:
    sys.exit(f"the merge failed with {process.returncode}")
  return max(peak, told["peak"]), told


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--gigabytes", type=float, default=20)
  parser.add_argument("--folder", default=None)
  arguments = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder))
  leaves = shapes(arguments.gigabytes)
  sizes = [2 * rows * columns for rows, columns in leaves.values()]
  bound = (CONTRIBUTORS + 3) * max(sizes) + (1 << 30)
  print(
    f"{CONTRIBUTORS} models and a base of {len(leaves)} leaves: "
    f"{sum(sizes) * (CONTRIBUTORS + 1) / 1e9:.1f} GB of bfloat16, the largest "
    f"leaf {max(sizes) / 1e6:.0f} MB"
  )
  try:
    models = [folder / f"{i}.safetensors" for i in range(CONTRIBUTORS + 1)]
    for i, path in enumerate(models):
      write_sparse(path, leaves, i)
    out = folder / "out"
    start = time.time()
    first, told = merge(models, out, 0.4 * sum(sizes))
    print(
      f"killed after {time.time() - start:.0f} s with {written(out) / 1e9:.2f} "
      f"GB written; peak memory {first / 1e9:.2f} GB"
    )
    if told is not None or list(out.glob("*.safetensors")):
      sys.exit("the killed merge looks complete")
    second, told = merge(models, out, float("inf"))
    if told is None:
      sys.exit("the merge was killed by somebody else")
    peak = max(first, second)
    print(
      f"went on from {told['resumed'] / 1e9:.2f} GB: read "
      f"{told['read'] / 1e9:.1f} GB, {told['wall']:.0f} s, "
      f"{told['cpu']:.0f} CPU-s; peak memory {second / 1e9:.2f} GB"
    )
    print(
      f"peak {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB: "
      + ("held" if peak <= bound else "EXCEEDED")
    )
    shards = sorted(path.name for path in out.iterdir())
    print(f"result: {len(shards) - 1} shards and {shards[-1]}")
    start = time.time()
    checked = merging_scale_check.check(leaves, DENSITY, out)
    print(f"{checked}; {time.time() - start:.0f} s")
    if peak > bound or not checked.right:
      sys.exit(1)
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  main()
