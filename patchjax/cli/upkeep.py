"""Verbs that keep a repository small and sound: gc, fsck."""

from __future__ import annotations

import re
import sys

import click

from patchjax.cli.common import AS_JSON, counting, emit, open_repo

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class _Age(click.ParamType):
  """A length of time: a number and one of s, m, h, d, w; or 0."""

  name = "age"

  def convert(self, value, param, ctx):
    match = _AGE.fullmatch(str(value))
    if match:
      return float(match[1]) * _SECONDS[match[2]]
    if value in (0, "0"):
      return 0.0
    self.fail(
      f"{value!r}: expected a number and one of s, m, h, d, w (such as 14d), "
      "or 0",
      param,
      ctx,
    )


@click.command()
@click.option(
  "--grace",
  type=_Age(),
  default="14d",
  show_default=True,
  help="What was written or used by a commit within this time stays. Longer "
  "than the longest commit; 0 only while nobody writes.",
)
@click.option(
  "--expire",
  type=_Age(),
  default="90d",
  show_default=True,
  help="Reflog entries older than this hold nothing any more, and go.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@AS_JSON
def gc(grace: float, expire: float, dry_run: bool, as_json: bool) -> None:
  """Remove what no branch, tag or reflog entry reaches."""
  repo = open_repo()
  with counting() as progress:
    report = repo.gc(
      grace=grace, expire=expire, dry_run=dry_run, progress=progress
    )
  emit(as_json, report.to_json(), lambda: str(report))


@click.command()
@click.option(
  "--quick", is_flag=True, help="Do not read the leaves themselves."
)
@AS_JSON
def fsck(quick: bool, as_json: bool) -> None:
  """Verify every object, ref, payload and leaf; exit with 1 on problems."""
  with counting() as progress:
    report = open_repo().fsck(quick=quick, progress=progress)
  emit(as_json, report.to_json(), lambda: str(report))
  if not report.ok:
    sys.exit(1)


VERBS = (gc, fsck)
