"""The verb that stores a history anew: repack."""

from __future__ import annotations

import click

from patchjax.cli.common import AS_JSON, counting, emit, open_repo


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@AS_JSON
def repack(dry_run: bool, as_json: bool) -> None:
  """Hold every leaf in fewer bytes where hindsight allows; ids stay.

  What it replaces goes with the next `gc`.
  """
  with counting() as progress:
    report = open_repo().repack(progress=progress, dry_run=dry_run)
  emit(as_json, report.to_json(), lambda: str(report))


VERBS = (repack,)
