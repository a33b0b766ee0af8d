"""The verb conflicts: where contributors disagree, as a table or a picture."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from patchjax.cli.common import (
  AS_JSON,
  emit,
  is_patch,
  is_path,
  open_repo,
  read_value,
  waiting,
)


@click.command()
@click.argument("sides", nargs=-1, required=True, metavar="REF|FILE...")
@click.option(
  "--base",
  metavar="REF|FILE",
  help="What the changes are measured from; by default the merge base.",
)
@click.option("--only", metavar="REGEX", help="Compare only these leaves.")
@click.option(
  "--heat-map",
  "picture",
  metavar="FILE",
  type=click.Path(dir_okay=False),
  help="Draw leaves x pairs into a .png, .svg or .pdf (extra `viz`).",
)
@click.option(
  "--of",
  "what",
  type=click.Choice(["cosine", "sign", "overlap"]),
  default="cosine",
  show_default=True,
  help="What the heat map shows.",
)
@AS_JSON
def conflicts(
  sides: tuple[str, ...],
  base: str | None,
  only: str | None,
  picture: str | None,
  what: str,
  as_json: bool,
) -> None:
  """Compare what versions change: overlap, signs, cosines, misfits.

  Takes refs, files of parameters and patch files. Says which leaves keep
  them from being merged, with the fix, and whether the changes are disjoint:
  then their sum is exact and free of order.
  """
  from patchjax import merging

  if base is None:
    paths = [side for side in sides if is_path(side)]
    if paths:
      raise click.UsageError(
        f"{paths[0]} is a file: say with --base what it is to be compared with"
      )
    base = open_repo().merge_base(*sides)
  with waiting("comparing the contributors"):
    report = merging.conflicts(
      read_value(base),
      [_side(side) for side in sides],
      only=only,
      labels=sides,
    )
  if picture is not None:
    _draw(report, what, picture)
  emit(as_json, report.to_json(), lambda: str(report))


def _side(text: str) -> Any:
  from patchjax.patches import Patch

  return Patch.load(text) if is_patch(text) else read_value(text)


def _draw(report: Any, what: Any, path: str) -> None:
  from patchjax import views

  kinds = (".png", ".svg", ".pdf")
  if pathlib.Path(path).suffix.lower() not in kinds:
    raise click.BadParameter(
      f"expected a name that ends with {', '.join(kinds)}; found {path!r}",
      param_hint="--heat-map",
    )
  try:
    figure = views.heat_map(report, what)
  except (ImportError, ValueError) as error:
    raise click.UsageError(str(error)) from error
  figure.savefig(path)


VERBS = (conflicts,)
