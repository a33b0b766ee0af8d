"""The API page runs as it stands, in a process of its own."""

import os
import pathlib
import subprocess
import sys

PAGE = pathlib.Path(__file__).with_name("api_page.py")


def test_runs_and_names_what_is_not_built():
  done = subprocess.run(
    [sys.executable, str(PAGE)],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "Not built yet:" in done.stdout and "pj.lift" in done.stdout
