"""A verb that looks closely: diff."""

from __future__ import annotations

import sys

import click

from patchjax.cli.common import (
  AS_JSON,
  emit,
  is_path,
  open_repo,
  read_value,
  waiting,
)


@click.command()
@click.argument("old")
@click.argument("new", default="main")
@click.option(
  "--exit-code", is_flag=True, help="Exit with 1 if there are differences."
)
@AS_JSON
def diff(old: str, new: str, exit_code: bool, as_json: bool) -> None:
  """Compare two versions, leaf by leaf; OLD and NEW are refs or files."""
  with waiting(f"comparing {old} and {new}"):
    if is_path(old) or is_path(new):
      from patchjax.interop.comparison import compare_params

      found = compare_params(read_value(old), read_value(new))
    else:
      found = open_repo().diff(old, new)
  emit(as_json, found.to_json(), lambda: str(found))
  if exit_code and found:
    sys.exit(1)


VERBS = (diff,)
