"""Runs a command and says what it took: `measured.py FILE COMMAND...`.

A process of its own, and a small one: a child's peak of resident memory is
never less than its parent's was when it was started.
"""

import json
import resource
import subprocess
import sys
import time


def main() -> int:
  """Runs the command; writes what it took to the file, as JSON."""
  start = time.perf_counter()
  done = subprocess.run(sys.argv[2:], check=False)
  wall = time.perf_counter() - start
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  found = {
    "wall": wall,
    "cpu": used.ru_utime + used.ru_stime,
    "rss": 1024 * used.ru_maxrss,
  }
  with open(sys.argv[1], "w") as file:
    json.dump(found, file)
  return done.returncode


if __name__ == "__main__":
  sys.exit(main())
