"""Merge methods by name, with arguments as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

SET = click.option(
  "--set",
  "more",
  multiple=True,
  metavar="NAME=JSON",
  help="Any other argument of the method; may be repeated.",
)


def merge_method(name: str, arguments: Mapping[str, Any]) -> Any:
  """Returns the merge method of a name, with the arguments that it takes.

  Args:
    name: name of one of `patchjax.merging.methods.METHODS`.
    arguments: arguments by name.
  """
  import inspect

  from patchjax.merging.methods import BY_NAME
  from patchjax.trees.suggest import did_you_mean, list_names

  if name not in BY_NAME:
    raise click.BadParameter(
      f"{name!r} is none of {list_names(BY_NAME)}. "
      f"{did_you_mean(name, BY_NAME)}",
      param_hint="--method",
    )
  takes = inspect.signature(BY_NAME[name]).parameters
  for key in arguments:
    if key not in takes:
      raise click.BadParameter(
        f"{name} has no argument {key!r}; it takes {list_names(takes)}"
      )
  try:
    return BY_NAME[name](**arguments)
  except (TypeError, ValueError) as error:
    raise click.BadParameter(f"{name}: {error}") from error


def assignment(text: str) -> tuple[str, Any]:
  """Returns the two sides of an assignment.

  Args:
    text: NAME=JSON; what is no JSON is a word.
  """
  name, sign, value = text.partition("=")
  if not sign:
    raise click.BadParameter(f"expected NAME=JSON, found {text!r}")
  try:
    return name, json.loads(value)
  except ValueError:
    return name, value
