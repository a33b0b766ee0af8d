"""Killing a process before its n-th storage operation.

A library of a page of C, put before the C library by `LD_PRELOAD`, counts what
Python, SQLite, TensorStore and Orbax do to files. Where there is no C compiler
an audit hook counts what Python does: openings for writing, renames, removals,
new folders. It does not see the native code of TensorStore and SQLite, nor
writes and syncs; kills at random moments have to stand in for these.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_UNFINISHED = ".orbax-checkpoint-tmp"
_VARIABLE = "PATCHJAX_FAULTS"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = {
  "os.remove": "unlink",
  "os.rmdir": "rmdir",
  "os.mkdir": "mkdir",
  "os.rename": "rename",
  "os.link": "link",
  "os.truncate": "truncate",
  "os.utime": "touch",
}


def preload(module: str) -> None:
  """Starts this program again with the counting library loaded.

  Does nothing the second time, or without a C compiler.

  Args:
    module: the program, as `python -m` takes it.
  """
  if _VARIABLE in os.environ:
    # It is in memory; those that this process starts do without.
    shutil.rmtree(os.environ.pop(_VARIABLE))
    del os.environ["LD_PRELOAD"]
    return
  compiler = shutil.which("cc") or shutil.which("gcc")
  if compiler is None:
    return
  folder = tempfile.mkdtemp(prefix="patchjax-faults-")
  library = os.path.join(folder, "operations.so")
  command = [compiler, "-O1", "-shared", "-fPIC", "-o", library]
  subprocess.run([*command, str(_SOURCE), "-ldl"], check=True)
  os.environ |= {"LD_PRELOAD": library, _VARIABLE: folder}
  os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def is_complete() -> bool:
  """Returns whether native code is counted too."""
  return hasattr(ctypes.CDLL(None), "faults_arm")


def arm(
  root: str, *, limit: int = -1, step: str = "", listing: str | None = None
) -> None:
  """Counts the storage operations below a folder from now on.

  Args:
    root: the folder.
    limit: the operation, from 0, before which this process is killed.
    step: counts only operations of this kind (see `steps`).
    listing: file to write a line to for each operation.
  """
  call, _, place = step.partition(" ")
  if place:
    unfinished = place.endswith("(unfinished)")
    folder = place.removeprefix("remote ")
    place = _UNFINISHED if unfinished else f"/{folder}/"
  file = -1
  if listing is not None:
    file = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  prefix = root.rstrip("/") + "/"
  if is_complete():
    ctypes.CDLL(None).faults_arm(
      prefix.encode(), ctypes.c_long(limit), file, call.encode(), place.encode()
    )
    return
  done = iter(range(sys.maxsize))

  def hook(event, arguments):
    if event == "open":
      path, _, flags = arguments
      what = "open" if isinstance(flags, int) and flags & _WRITING else ""
    else:
      what = _EVENTS.get(event, "")
      path = arguments[1 if event == "os.rename" else 0] if what else ""
    if not what or not isinstance(path, str) or not path.startswith(prefix):
      return
    meant = not step or (what == call and place in path)
    last = meant and next(done) == limit
    if file >= 0:
      line = f"{'!' * last}{what} {path.removeprefix(prefix)}\n"
      os.write(file, line.encode())
    if last:
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def steps(listing: str) -> list[str]:
  """Returns what each operation of a list was: the call, and to what.

  Args:
    listing: file written by `arm`.
  """
  return [_step(*line.lstrip("!").split(" ", 1)) for line in open(listing)]


def killed(listing: str) -> str:
  """Returns before which operation of a list its process was killed.

  Other threads may have listed theirs after it.

  Args:
    listing: file written by `arm`; its last operation if none was.
  """
  with open(listing) as lines:
    marked = [line.startswith("!") for line in lines]
  return steps(listing)[marked.index(True) if any(marked) else -1]


def _step(call: str, key: str) -> str:
  repository, _, inside = key.strip().partition("/")
  place = inside.partition("/")[0]
  if re.search(rf"{re.escape(_UNFINISHED)}(/|$)", inside):
    place += " (unfinished)"
  if repository.endswith("-remote"):
    place = f"remote {place}"
  return f"{call} {place}"
