"""bisect: the first bad version, by a command or a suite."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from patchjax.cli.common import AS_JSON, emit, open_repo

if TYPE_CHECKING:
  from patchjax.history import Commit, Repo

_SKIP = 125  # git's: this version cannot be tested
_ABORT = 127  # the largest status that means bad
_PARAMS = "PATCHJAX_PARAMS"
_COMMIT = "PATCHJAX_COMMIT"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("good")
@click.argument("bad")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
  "--also-good", multiple=True, metavar="REF", help="Another good version."
)
@click.option(
  "--export",
  "export_",
  metavar="OUT",
  help="Write each version there first (.safetensors, .npz, or a directory).",
)
@click.option(
  "--suite",
  metavar="MODULE:NAME",
  help="Good is what the gate accepts in place of GOOD, instead of a COMMAND.",
)
@click.option(
  "--policy", metavar="FILE|MODULE:NAME", help="Margins and caps of the gate."
)
@AS_JSON
def bisect(
  good: str,
  bad: str,
  command: tuple[str, ...],
  also_good: tuple[str, ...],
  export_: str | None,
  suite: str | None,
  policy: str | None,
  as_json: bool,
) -> None:
  """Find the commit that made GOOD bad: bisect GOOD BAD -- COMMAND...

  As for `git bisect run`, COMMAND exits with 0 if a version is good, with 125
  if it cannot be tested, and with 1 to 127 if it is bad; more stops the
  search. It gets the commit's id in $PATCHJAX_COMMIT, and with --export the
  path of the version in $PATCHJAX_PARAMS.

  With --suite, a version is good if it is accepted in place of GOOD, bad if
  it is refused, and skipped if the suite cannot tell.
  """
  from patchjax.history.commits import bisecting

  if bool(command) == bool(suite):
    raise click.UsageError("bisect needs -- COMMAND..., or --suite MODULE:NAME")
  repo = open_repo()
  out = None if export_ is None else pathlib.Path(export_).absolute()
  if out is not None and out.exists():
    raise click.UsageError(f"{export_} exists; name a new path")
  try:
    if suite is None:
      ask = _by_command(repo, command, out)
    else:
      ask = _by_suite(repo, good, suite, policy)
    found = bisecting.search(repo, [good, *also_good], bad, ask, progress=_tell)
  finally:
    if out is not None:
      _remove(out)
  emit(as_json, found.to_json(), lambda: str(found))
  if found.first is None:
    sys.exit(1)


def _tell(made: int, left: int, commit: Commit) -> None:
  click.echo(
    f"[{made + 1}, about {left} more] {commit.id[:12]} {commit.title}", err=True
  )


def _by_command(
  repo: Repo, command: tuple[str, ...], out: pathlib.Path | None
) -> Callable[[Commit], Any]:
  """Asks a program, by its status; what it prints goes to stderr."""

  def ask(commit: Commit) -> str:
    environment = {**os.environ, _COMMIT: commit.id}
    if out is not None:
      from patchjax.interop import export

      _remove(out)
      export(repo, commit.id, out)
      environment[_PARAMS] = str(out)
    done = subprocess.run(command, env=environment, stdout=2, check=False)
    if 0 <= done.returncode <= _ABORT:
      return {0: "good", _SKIP: "skip"}.get(done.returncode, "bad")
    raise click.ClickException(
      f"{command[0]} stopped with status {done.returncode} at "
      f"{commit.id[:12]}, and the search with it"
    )

  return ask


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _by_suite(
  repo: Repo, good: str, suite: str, policy: str | None
) -> Callable[[Commit], Any]:
  """Asks the gate whether a version may take the place of the good one."""
  from patchjax.cli.candidates import policy_of
  from patchjax.cli.common import load_object
  from patchjax.vetting import Suite, gate

  tests = load_object(suite, Suite)
  rules = policy_of(policy)

  def outcomes(commit: Commit) -> Any:
    return tests.run(repo.checkout(commit.id), subject=commit.tree)

  before = outcomes(repo.show(good))

  def ask(commit: Commit) -> str:
    verdict = gate(before, outcomes(commit), tests, rules)
    return {"accepted": "good", "refused": "bad"}.get(verdict.outcome, "skip")

  return ask


VERBS = (bisect,)
