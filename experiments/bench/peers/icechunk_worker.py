"""Icechunk's side: runs in a virtual environment of its own.

Reads one JSON command a line and answers with one line: what it took, in
seconds on the clock and of this process. Imports nothing of patchjax.
"""

import json
import os
import sys
import time

import icechunk
import numpy as np
import zarr
from safetensors.numpy import load_file


def main() -> None:
  """Serves commands until the input ends."""
  # Whatever a library prints must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  repo = icechunk.Repository.create(
    icechunk.local_filesystem_storage(sys.argv[1])
  )
  for line in sys.stdin:
    command = json.loads(line)
    arrays = load_file(command["file"]) if "file" in command else {}
    start, used = time.perf_counter(), time.process_time()
    commit = command.get("commit")
    if commit is None:
      commit = _commit(repo, arrays, command["message"])
    else:
      arrays = _checkout(repo, commit)
    answer = {
      "commit": commit,
      "wall": time.perf_counter() - start,
      "cpu": time.process_time() - used,
    }
    if "save" in command:
      np.savez(command["save"], allow_pickle=False, **arrays)
    print(json.dumps(answer), file=answers, flush=True)


def _commit(repo, arrays, message) -> str:
  session = repo.writable_session("main")
  root = zarr.open_group(session.store, mode="a")
  for name, array in arrays.items():
    if name not in root:
      root.create_array(name, shape=array.shape, dtype=array.dtype)
    root[name][...] = array
  return session.commit(message)


def _checkout(repo, commit):
  session = repo.readonly_session(snapshot_id=commit)
  root = zarr.open_group(session.store, mode="r")
  found = {}

  def visit(group, prefix):
    for name, item in group.members():
      if isinstance(item, zarr.Group):
        visit(item, f"{prefix}{name}/")
      else:
        found[f"{prefix}{name}"] = item[...]

  visit(root, "")
  return found


if __name__ == "__main__":
  main()
