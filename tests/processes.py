"""Two processes of `jax.distributed` on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 300


def run_pair(module, *args):
  """Runs a module as two processes; returns what each printed.

  Args:
    module: its name; it is given a port, its number, and `args`.
    *args: more texts.
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  pair = [
    subprocess.Popen(
      [sys.executable, "-m", module, str(port), str(process), *args],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  try:
    said = [process.communicate(timeout=TIMEOUT) for process in pair]
  finally:
    for process in pair:
      process.kill()
  for process, (_, stderr) in zip(pair, said):
    assert process.returncode == 0, stderr[-6000:]
  return [stdout for stdout, _ in said]
