"""The `patchjax` command: a thin skin over the API, with git's habits.

Nothing here imports jax before a verb needs it: a history is listed as fast
as git lists one.
"""


def main() -> None:
  """Runs the command line and exits: the console script `patchjax`.

  Exit codes: 0 done; 1 a lawful no (a candidate that was not accepted, a
  release that was refused, a repository with problems); 2 an error.

  Example:
    >>> import subprocess, sys
    >>> command = [sys.executable, "-m", "patchjax.cli", "--version"]
    >>> subprocess.run(command, capture_output=True, text=True).stdout
    'patchjax ...
  """
  from patchjax.cli.app import patchjax

  patchjax(prog_name="patchjax")
