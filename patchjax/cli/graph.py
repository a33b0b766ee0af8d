"""Verbs on the graph: blame, merge-base, replay, revert, picks, rebase."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from patchjax.cli.common import AS_JSON, AUTHOR, emit, open_repo, waiting
from patchjax.cli.methods import SET, assignment, merge_method

if TYPE_CHECKING:
  from patchjax.history import Commit, Repo

_BRANCH = click.option(
  "-b", "--branch", default="main", help="The branch to commit to."
)
_MAINLINE = click.option(
  "--mainline",
  type=int,
  metavar="N",
  help="The parent (from 1) that a merge is seen as a change of.",
)


def _asking(command: Callable[..., Any]) -> Callable[..., Any]:
  """Adds --method and --set, and gives the method as `method`."""

  @click.option(
    "--method",
    metavar="NAME",
    help="How entries that both changed are merged: task_arithmetic adds both "
    "changes. Without it they are a conflict.",
  )
  @SET
  @functools.wraps(command)
  def wrapped(method: str | None, more: tuple[str, ...], **others: Any) -> Any:
    given = dict(assignment(text) for text in more)
    made = None if method is None else merge_method(method, given)
    return command(method=made, **others)

  return wrapped


@click.command()
@click.argument("ref", default="main")
@click.option(
  "--only",
  multiple=True,
  metavar="REGEX",
  help="Only leaves whose whole name matches; may be repeated.",
)
@AS_JSON
def blame(ref: str, only: tuple[str, ...], as_json: bool) -> None:
  """Show, for each leaf of REF, the commit that last changed it."""
  found = open_repo().blame(ref, only=list(only) or None)

  def text() -> str:
    from patchjax.trees.report import table

    rows = [
      (
        name,
        commit.id[:12],
        commit.author,
        commit.when.astimezone().strftime("%Y-%m-%d %H:%M"),
        commit.title,
      )
      for name, commit in found.items()
    ]
    return table(["leaf", "commit", "author", "date", "title"], rows)

  value = [{"leaf": name, **_brief(commit)} for name, commit in found.items()]
  emit(as_json, value, text)


def _brief(commit: Commit) -> dict[str, str]:
  return {
    "commit": commit.id,
    "author": commit.author,
    "time": commit.time,
    "title": commit.title,
  }


@click.command("merge-base")
@click.argument("refs", nargs=-1, required=True)
@click.option(
  "--all", "every", is_flag=True, help="Print all if there are many."
)
@AS_JSON
def merge_base(refs: tuple[str, ...], every: bool, as_json: bool) -> None:
  """Print the best common ancestor of REFS."""
  from patchjax.history.commits import graph

  repo = open_repo()
  if every:
    tips = [repo.resolve(ref) for ref in refs]
    found = graph.merge_bases(tips, repo.objects)
  else:
    found = [repo.merge_base(*refs)]
  emit(as_json, {"commits": found}, "\n".join(found))
  if not found:
    sys.exit(1)


@click.command()
@click.argument("ref", default="main")
@AS_JSON
def replay(ref: str, as_json: bool) -> None:
  """Compute the merge REF again; exit with 1 if its value is another now."""
  with waiting(f"replaying {ref}"):
    found = open_repo().replay(ref)
  emit(as_json, found.to_json(), lambda: str(found))
  if not found.same:
    sys.exit(1)


@click.command()
@click.argument("ref", default="main")
@_BRANCH
@_MAINLINE
@click.option("-m", "--message", help="By default says what was reverted.")
@AUTHOR
@AS_JSON
@_asking
def revert(
  ref: str,
  branch: str,
  mainline: int | None,
  method: Any,
  message: str | None,
  author: str | None,
  as_json: bool,
) -> None:
  """Undo the commit REF with a new commit.

  The value is that of the history without REF: later patches are applied
  again, later merges computed again.
  """
  repo = open_repo()
  with waiting(f"reverting {ref}"):
    made = repo.revert(
      ref,
      branch=branch,
      mainline=mainline,
      method=method,
      message=message,
      author=author,
    )
  emit(as_json, _made(repo, branch, made), _said(repo, branch, made))


@click.command("cherry-pick")
@click.argument("refs", nargs=-1, required=True)
@_BRANCH
@_MAINLINE
@AS_JSON
@_asking
def cherry_pick(
  refs: tuple[str, ...],
  branch: str,
  mainline: int | None,
  method: Any,
  as_json: bool,
) -> None:
  """Do what the commits REFS did to the tip of a branch, one after another."""
  repo = open_repo()
  done = []
  for ref in [repo.resolve(ref) for ref in refs]:
    with waiting(f"picking {ref[:12]}"):
      made = repo.cherry_pick(
        ref, branch=branch, mainline=mainline, method=method
      )
    done.append(_made(repo, branch, made))
    if not as_json:  # as it happens: a later one may be a conflict
      emit(False, None, _said(repo, branch, made))
  if as_json:
    emit(True, done, "")


@click.command()
@click.argument("onto")
@click.argument("branch")
@AUTHOR
@AS_JSON
@_asking
def rebase(
  onto: str, branch: str, method: Any, author: str | None, as_json: bool
) -> None:
  """Put the commits of BRANCH on top of ONTO.

  A conflict leaves BRANCH where it was. BRANCH@{1} is what it was.
  """
  repo = open_repo()
  old = repo.resolve(f"heads/{branch}")
  with waiting(f"rebasing {branch}"):
    made = repo.rebase(branch, onto, method=method, author=author)
  value = {"branch": branch, "commit": made, "old": old}
  done = f"{branch} is now at {made[:12]}, on top of {onto}"
  emit(as_json, value, f"{branch} is up to date" if made == old else done)


def _made(repo: Repo, branch: str, commit: str) -> dict[str, str]:
  return {"commit": commit, "branch": branch, "tree": repo.show(commit).tree}


def _said(repo: Repo, branch: str, commit: str) -> str:
  return f"[{branch} {commit[:12]}] {repo.show(commit).title}"


VERBS = (blame, merge_base, replay, revert, cherry_pick, rebase)
