"""Verbs on commits and their names: init, log, show, branch, tag, reset."""

from __future__ import annotations

import collections
import itertools
import textwrap
from typing import TYPE_CHECKING, Any

import click

from patchjax.cli.common import AS_JSON, AUTHOR, emit, open_repo

if TYPE_CHECKING:
  from patchjax.history import Commit, Repo
  from patchjax.history.commits.listing import Listing


@click.command()
@click.argument("directory", default=".")
@AS_JSON
def init(directory: str, as_json: bool) -> None:
  """Create a repository in DIRECTORY (here by default)."""
  from patchjax.history import Repo

  repo = Repo.init(directory)
  emit(as_json, {"path": repo.path}, f"patchjax repository in {repo.path}")


@click.command()
@click.argument("refs", nargs=-1)
@click.option("-n", "limit", type=click.IntRange(0), help="At most so many.")
@click.option("--oneline", is_flag=True, help="A line a commit.")
@click.option("--graph", is_flag=True, help="Draw branches and merges beside.")
@click.option(
  "--all", "every", is_flag=True, help="From all branches and tags."
)
@click.option(
  "--name",
  metavar="REGEX",
  help="Only commits that changed a leaf whose whole name matches.",
)
@AS_JSON
def log(
  refs: tuple[str, ...],
  limit: int | None,
  oneline: bool,
  graph: bool,
  every: bool,
  name: str | None,
  as_json: bool,
) -> None:
  """List the commits that lead to REFS (main), the latest first.

  A..B stands for what leads to B and not to A, ^A leaves out what leads to A.
  """
  from patchjax.history.commits.listing import Listing

  repo = open_repo()
  names = _names(repo)
  tips = [*names] if every else []
  listing = Listing(repo, [*refs, *tips] or ["main"], name)
  commits = itertools.islice(listing, limit)
  if not as_json:
    for commit in repo.objects.shallow:
      names[commit].append("history cut here: fetch --complete")
  if as_json:
    emit(True, [_commit_json(commit, names) for commit in commits], "")
  elif graph:
    _draw(listing, limit, names, oneline)
  elif oneline:
    for commit in commits:
      click.echo(_line(commit, names))
  else:
    for i, commit in enumerate(commits):
      click.echo("\n" * bool(i) + _text(commit, names))


def _draw(
  listing: Listing,
  limit: int | None,
  names: dict[str, list[str]],
  oneline: bool,
) -> None:
  """Prints the drawing of a history; lazily, unless commits are passed over."""
  from patchjax.history.commits.drawing import Drawing

  drawing = Drawing()
  shown = list(listing) if listing.filtered else listing
  for commit in itertools.islice(shown, limit):
    text = [_line(commit, names)]
    if not oneline:
      text = [*_text(commit, names).split("\n"), ""]
    for row in drawing.rows(commit.id, listing.parents(commit), text):
      click.echo(row)


@click.command()
@click.argument("ref", default="main")
@AS_JSON
def show(ref: str, as_json: bool) -> None:
  """Show a commit: its leaves, provenance, verdicts and releases."""
  from patchjax.trees.dtypes import KINDS
  from patchjax.trees.report import size_text

  repo = open_repo()
  commit = repo.show(ref)
  tree = repo.tree(commit.id)
  notes = repo.annotations(commit.id)
  kinds = [(e, KINDS[e.dtype]) for e in tree.values() if e.dtype in KINDS]
  facts: dict[str, Any] = {
    "leaves": len(tree),
    "parameters": sum(e.size for e, kind in kinds if kind.floating),
    "bytes": sum(e.size * k.words * k.word.itemsize for e, k in kinds),
  }
  changed = None
  if commit.parents:
    parent = repo.tree(commit.parents[0])
    changed = [n for n in {**parent, **tree} if parent.get(n) != tree.get(n)]
    facts["changed"] = changed
  value = {**_commit_json(commit, _names(repo)), **facts, "notes": notes}

  def text() -> str:
    lines = [
      _text(commit, _names(repo)),
      "",
      f"{facts['leaves']:,} leaves, {facts['parameters']:,} parameters, "
      f"{size_text(facts['bytes'])}",
    ]
    if changed is not None:
      lines.append(
        f"{len(changed):,} leaves differ from {commit.parents[0][:12]}"
        + (": " if changed else "")
        + textwrap.shorten(", ".join(changed), 60, placeholder=" ...")
      )
    if commit.patch:
      lines.append(f"made by the patch file {commit.patch[:12]}")
    if commit.recipe:
      lines.append(f"recipe: {_brief(commit.recipe)}")
    lines += [
      f"{note['kind']} {note['id'][:12]}: {_brief(note['payload'])}"
      for note in notes
    ]
    return "\n".join(lines)

  emit(as_json, value, text)


@click.command()
@click.argument("name", required=False)
@click.argument("at", metavar="[AT]", default="main")
@click.option("-d", "--delete", is_flag=True, help="Delete it, if merged.")
@click.option("-D", "force", is_flag=True, help="Delete it, merged or not.")
@click.option("-m", "--move", is_flag=True, help="Rename NAME to AT.")
@AS_JSON
def branch(
  name: str | None,
  at: str,
  delete: bool,
  force: bool,
  move: bool,
  as_json: bool,
) -> None:
  """List branches, or create NAME at AT (main).

  A deleted branch NAME comes back with `branch NAME NAME@{1}`.
  """
  repo = open_repo()
  if name is None:
    _list(repo, repo.branches(), as_json)
  elif move:
    made = repo.branch(name, rename=at)
    _named(as_json, at, made, f"branch {name} is now {at}")
  elif delete or force:
    made = repo.branch(name, delete=True, force=force)
    _named(as_json, name, made, f"deleted branch {name} (was {made[:12]})")
  else:
    made = repo.branch(name, at)
    _named(as_json, name, made, f"branch {name} at {made[:12]}")


@click.command()
@click.argument("name", required=False)
@click.argument("ref", metavar="[REF]", default="main")
@click.option("-d", "--delete", is_flag=True, help="Delete it.")
@AS_JSON
def tag(name: str | None, ref: str, delete: bool, as_json: bool) -> None:
  """List tags, or create tag NAME at REF (main)."""
  repo = open_repo()
  if name is None:
    _list(repo, repo.tags(), as_json)
  elif delete:
    made = repo.tag(name, delete=True)
    _named(as_json, name, made, f"deleted tag {name} (was {made[:12]})")
  else:
    made = repo.tag(name, ref)
    _named(as_json, name, made, f"tag {name} at {made[:12]}")


def _named(as_json: bool, name: str, commit: str, text: str) -> None:
  emit(as_json, {"name": name, "commit": commit}, text)


def _list(repo: Repo, found: dict[str, str], as_json: bool) -> None:
  commits = {name: repo.show(at) for name, at in found.items()}
  width = max(map(len, found), default=0)
  emit(
    as_json,
    [
      {"name": name, "commit": commit.id, "title": commit.title}
      for name, commit in commits.items()
    ],
    "\n".join(
      f"{name:{width}}  {commit.id[:12]}  {_cut(commit.title)}"
      for name, commit in commits.items()
    ),
  )


@click.command()
@click.argument("ref")
@click.option("-b", "--branch", default="main", help="The branch to move.")
@AUTHOR
@AS_JSON
def reset(ref: str, branch: str, author: str | None, as_json: bool) -> None:
  """Move a branch to the version REF.

  Nothing is lost: BRANCH@{1} is what it was.
  """
  repo = open_repo()
  old = repo.reset(ref, branch=branch, author=author)
  commit = repo.show(branch)
  value = {"branch": branch, "commit": commit.id, "old": old}
  text = f"{branch} is now at {commit.id[:12]} {_cut(commit.title)}"
  emit(as_json, value, text)


@click.command()
@click.argument("name", default="main")
@click.option("-n", "limit", type=click.IntRange(0), help="At most so many.")
@AS_JSON
def reflog(name: str, limit: int | None, as_json: bool) -> None:
  """List where a branch or tag has been, the latest first.

  NAME@{n} names what it was before its last n moves.
  """
  moves = open_repo().reflog(name, limit=limit)

  def text() -> str:
    lines, number = [], 0
    for move in moves:
      at = "-" * 12 if move.new is None else move.new[:12]
      where = f"{name}@{{{number}}}" if move.done else "(never happened)"
      number += move.done
      lines.append(f"{at} {where}: {_cut(move.why)}")
    return "\n".join(lines)

  emit(as_json, [move.to_json() for move in moves], text)


def _names(repo: Repo) -> dict[str, list[str]]:
  """Branches and tags by the commit they name, as git decorates a log."""
  from patchjax.history.storage.refs import REMOTES

  names = collections.defaultdict(list)
  for branch, commit in repo.branches().items():
    names[commit].append(branch)
  for tag, commit in repo.tags().items():
    names[commit].append(f"tag: {tag}")
  for branch, commit in repo.refs.readable(REMOTES)[0].items():
    names[commit].append(branch)
  return names


def _commit_json(commit: Commit, names: dict[str, list[str]]) -> dict[str, Any]:
  return {**commit.to_json(), "refs": names.get(commit.id, [])}


def _decoration(commit: Commit, names: dict[str, list[str]]) -> str:
  return f" ({', '.join(names[commit.id])})" if commit.id in names else ""


def _line(commit: Commit, names: dict[str, list[str]]) -> str:
  return f"{commit.id[:12]}{_decoration(commit, names)} {_cut(commit.title)}"


def _text(commit: Commit, names: dict[str, list[str]]) -> str:
  lines = [f"commit {commit.id}{_decoration(commit, names)}"]
  if len(commit.parents) > 1:
    lines.append(f"Merge:  {' '.join(p[:12] for p in commit.parents)}")
  when = commit.when.astimezone().strftime("%a %b %d %H:%M:%S %Y %z")
  lines += [
    f"Author: {commit.author}",
    f"Date:   {when}",
    "",
    textwrap.indent(commit.message.rstrip(), "    "),
  ]
  return "\n".join(lines)


def _cut(title: str) -> str:
  return textwrap.shorten(title, 72, placeholder="...") or "(no message)"


def _brief(value: Any) -> str:
  """The plain facts of a JSON object in a line; `--json` has the rest."""
  if not isinstance(value, dict):
    return textwrap.shorten(str(value), 80, placeholder=" ...")
  plain = {
    key: item
    for key, item in value.items()
    if isinstance(item, str | int | float) and item != ""
  }
  text = ", ".join(f"{key} {item}" for key, item in plain.items())
  return textwrap.shorten(text, 80, placeholder=" ...")


VERBS = (init, log, show, branch, tag, reset, reflog)
