"""Merges files in processes that are killed, until one gets through.

Run as `killed.py BASE MODEL... OUT`; prints JSON. Each process is killed at
its n-th call of fsync, rename or unlink, before or after it, for n that grows:
everything a merge leaves on disk is made by these.
"""

import json
import os
import pathlib
import random
import signal
import sys
import traceback

import patchjax as pj
from patchjax.merging.files import merge_files
from patchjax.merging.streaming import layout


def merge(start, given, out):
  return merge_files(
    start, given, pj.merging.ties(density=0.3), out, shard_bytes=600
  )


def child(kill_at, after, write, arguments):
  layout.PORTION = 1
  left = [kill_at]

  def watched(function):
    def run(*args, **kwargs):
      left[0] -= 1
      if not left[0] and not after:
        os.kill(os.getpid(), signal.SIGKILL)
      try:
        return function(*args, **kwargs)
      finally:
        if not left[0]:
          os.kill(os.getpid(), signal.SIGKILL)

    return run

  for name in ("fsync", "replace", "unlink"):
    setattr(os, name, watched(getattr(os, name)))
  done = merge(*arguments)
  os.write(write, str(done.resumed).encode())


def seen(out):
  """What a reader finds: the old model, the new one, or none."""
  index = out / "model.safetensors.index.json"
  if not index.exists():
    return "none" if not (out / "model.safetensors").exists() else "wrong"
  shards = set(json.loads(index.read_text())["weight_map"].values())
  if not all((out / name).exists() for name in shards):
    return "wrong"
  return "old" if len(shards) == OLD else "new"


start, *given, out = sys.argv[1:]
arguments = (start, given, out)
OLD = len(list(pathlib.Path(out).glob("*.safetensors")))
rng = random.Random(1)
kills, resumed, found = 0, 0, []
points = [2, 3, 8, 14, 14, 12, 11, 6, 7, 9, 11]
while True:
  at = points[kills] if kills < len(points) else 10**9
  after = rng.random() < 0.5
  reader, write = os.pipe()
  pid = os.fork()
  if not pid:
    try:
      child(at, after, write, arguments)
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  os.close(write)
  _, status = os.waitpid(pid, 0)
  told = os.read(reader, 99)
  os.close(reader)
  found.append(seen(pathlib.Path(out)))
  if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
    kills += 1
    continue
  if status:
    sys.exit("a merge failed")
  resumed = int(told)
  break
print(json.dumps({"kills": kills, "resumed": resumed, "seen": found}))
