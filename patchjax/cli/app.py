"""The group of all verbs: `-C`, `--debug`, and what errors look like."""

from __future__ import annotations

import contextlib
import errno
import warnings
from typing import Any

import click

from patchjax.cli import (
  bisecting,
  candidates,
  conflicting,
  files,
  graph,
  inspection,
  refs,
  remotes,
  repack,
  upkeep,
)
from patchjax.trees.errors import PatchjaxError, ReleaseRefusedError


class Problem(click.ClickException):
  """An error as the user sees it: one message on stderr, exit code 2."""

  exit_code = 2

  def show(self, file=None) -> None:
    """Prints the message to stderr."""
    click.echo(f"patchjax: {self.format_message()}", file=file, err=True)


class Refusal(Problem):
  """A lawful no: the command worked, and the answer is exit code 1."""

  exit_code = 1


class _Verbs(click.Group):
  """A group that turns what may go wrong into messages."""

  def invoke(self, ctx: click.Context):
    try:
      with warnings.catch_warnings():
        # Of a damaged ref, say: shown as a message, and the verb goes on.
        warnings.filterwarnings("always", module=r"patchjax\.")
        warnings.showwarning = _show_warning
        return super().invoke(ctx)
    except (PatchjaxError, OSError) as error:
      if ctx.params["debug"] or getattr(error, "errno", 0) == errno.EPIPE:
        raise
      kind = Refusal if isinstance(error, ReleaseRefusedError) else Problem
      raise kind(_message(error)) from error


def _show_warning(
  message: Warning | str, category: type[Warning], *args: Any
) -> None:
  del category, args
  click.echo(f"patchjax: warning: {message}", err=True)


def _message(error: PatchjaxError | OSError) -> str:
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f"{error.filename}: {error.strerror}"
  return str(error) or type(error).__name__


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
  if wanted:
    from importlib import metadata

    click.echo(f"patchjax {metadata.version('patchjax')}")
    ctx.exit()


@click.group(
  cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
  "-C",
  "directory",
  multiple=True,
  metavar="DIR",
  help="Run as if started in DIR.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.option(
  "--version",
  is_flag=True,
  is_eager=True,
  expose_value=False,
  callback=_version,
  help="Show the version and exit.",
)
@click.pass_context
def patchjax(
  ctx: click.Context, directory: tuple[str, ...], debug: bool
) -> None:
  """Git for model weights: patches, histories, merges, gates, releases.

  Where a verb takes a REF, it may be a branch, a tag, a commit id or a unique
  start of one, followed by ~n or ^n as in git. Exit codes: 0 done, 1 a lawful
  no (not accepted, problems found), 2 an error.
  """
  del debug  # read by the group
  for place in directory:
    ctx.with_resource(contextlib.chdir(place))


for _module in (
  refs,
  files,
  inspection,
  candidates,
  conflicting,
  graph,
  bisecting,
  remotes,
  repack,
  upkeep,
):
  for _verb in _module.VERBS:
    patchjax.add_command(_verb)
