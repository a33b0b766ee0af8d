"""A process that commits until it is killed, for the crash tests.

Usage: python writer.py REPO NAME FIRST COUNT. Prints `ready`, then commit ids.
Each value says which commit it is: `step` counts up, and the leaves follow
from it, so that a reader can check a version against its own message.
"""

import sys

import numpy as np

from patchjax.history import Repo
from patchjax.trees.errors import ConflictError


def value_of(name, step):
  """Returns the value of a step: now all new, now nearly the same."""
  rng = np.random.default_rng([sum(name.encode()), step])
  large = np.arange(60_000, dtype=np.float32).reshape(200, 300)
  large[0] = rng.standard_normal(300)
  if step % 3 == 0:  # incompressible: goes into a checkpoint
    large = rng.standard_normal((200, 300)).astype(np.float32)
  return {
    "large": large,
    "bias": rng.standard_normal(8).astype(np.float32),
    "step": np.int32(step),
  }


def main(path, name, first, count):
  repo = Repo(path)
  print("ready", flush=True)
  for step in range(first, first + count):
    while True:
      tip = repo.resolve("main")
      # Every third commit is small: a blob instead of a checkpoint.
      value = value_of(name, step)
      if step % 3 == 2:
        value = {**repo.checkout(tip, like=value), "bias": value["bias"]}
        value["step"] = np.int32(-1)
      try:
        commit = repo.commit(
          value, message=f"{step} {value['step']}", author=name, parents=[tip]
        )
        break
      except ConflictError:
        continue
    print(commit, flush=True)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
