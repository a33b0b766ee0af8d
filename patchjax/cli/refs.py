"""Verbs on commits and their names: init, log, show, branch, tag."""

from __future__ import annotations

import collections
import textwrap
from typing import TYPE_CHECKING, Any

import click

from patchjax.cli.common import AS_JSON, emit, open_repo

if TYPE_CHECKING:
  from patchjax.history import Commit, Repo


@click.command()
@click.argument("directory", default=".")
@AS_JSON
def init(directory: str, as_json: bool) -> None:
  """Create a repository in DIRECTORY (here by default)."""
  from patchjax.history import Repo

  repo = Repo.init(directory)
  emit(as_json, {"path": repo.path}, f"patchjax repository in {repo.path}")


@click.command()
@click.argument("ref", default="main")
@click.option("-n", "limit", type=click.IntRange(1), help="At most so many.")
@click.option("--oneline", is_flag=True, help="A line a commit.")
@AS_JSON
def log(ref: str, limit: int | None, oneline: bool, as_json: bool) -> None:
  """List the commits that lead to REF, newest first."""
  repo = open_repo()
  commits = repo.log(ref, limit=limit)
  names = _names(repo)
  if as_json:
    emit(True, [_commit_json(commit, names) for commit in commits], "")
  elif oneline:
    emit(False, None, "\n".join(_line(commit, names) for commit in commits))
  else:
    emit(False, None, "\n\n".join(_text(commit, names) for commit in commits))


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


def _ref_verb(noun: str, plural: str, start: str) -> click.Command:
  """The verbs `branch` and `tag`: list them, or create one."""

  @click.command(noun, help=f"List {plural}, or create {noun} NAME at {start}.")
  @click.argument("name", required=False)
  @click.argument("ref", metavar=f"[{start}]", default="main")
  @AS_JSON
  def command(name: str | None, ref: str, as_json: bool) -> None:
    repo = open_repo()
    if name is not None:
      made = getattr(repo, noun)(name, ref)
      value = {"name": name, "commit": made}
      emit(as_json, value, f"{noun} {name} at {made[:12]}")
      return
    found = getattr(repo, plural)()
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

  return command


def _names(repo: Repo) -> dict[str, list[str]]:
  """Branches and tags by the commit they name, as git decorates a log."""
  names = collections.defaultdict(list)
  for branch, commit in repo.branches().items():
    names[commit].append(branch)
  for tag, commit in repo.tags().items():
    names[commit].append(f"tag: {tag}")
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


VERBS = (
  init,
  log,
  show,
  _ref_verb("branch", "branches", "AT"),
  _ref_verb("tag", "tags", "REF"),
)
