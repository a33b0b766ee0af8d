"""Verbs between repositories: clone, fetch, pull, push, remote."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import click

from patchjax.cli.common import AS_JSON, AUTHOR, emit, open_repo

if TYPE_CHECKING:
  from patchjax.history.remotes.transfer import Counts

_ONLY = click.option(
  "--only",
  multiple=True,
  metavar="REGEX",
  help="Copy only leaves whose whole name matches; may be repeated.",
)
_DEPTH = click.option(
  "--depth",
  type=click.IntRange(1),
  help="Copy at most so many commits back from each branch.",
)
_VERIFY = click.option(
  "--verify", is_flag=True, help="Verify the digest of each leaf at once."
)
_PROGRESS = click.option(
  "--progress/--no-progress",
  default=None,
  help="Show a progress bar; by default on a terminal.",
)


@click.command()
@click.argument("url")
@click.argument("directory", required=False)
@_ONLY
@_DEPTH
@_VERIFY
@_PROGRESS
@AS_JSON
def clone(
  url: str,
  directory: str | None,
  only: tuple[str, ...],
  depth: int | None,
  verify: bool,
  progress: bool | None,
  as_json: bool,
) -> None:
  """Copy the repository at URL into a new DIRECTORY.

  URL is a folder, gs://BUCKET/PATH or s3://BUCKET/PATH. An interrupted clone
  is finished by the same command.

  For S3 it reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws, and
  AWS_REGION, AWS_ENDPOINT_URL; for gs:// GOOGLE_APPLICATION_CREDENTIALS, or
  what `gcloud auth application-default login` left.
  """
  from patchjax.history import Repo

  directory = directory or url.rstrip("/").rpartition("/")[2]
  with _bar(progress) as moved:
    repo = Repo.clone(
      url,
      directory,
      only=only or None,
      depth=depth,
      verify=verify,
      progress=moved,
    )
  value = {"path": repo.path, "branches": repo.branches()}
  emit(as_json, value, f"cloned {url} into {repo.path}")


@click.command()
@click.argument("remote", required=False)
@click.argument("branches", nargs=-1)
@_ONLY
@_DEPTH
@click.option(
  "--complete",
  is_flag=True,
  help="Fetch all that --only and --depth left out so far.",
)
@click.option(
  "--prune", is_flag=True, help="Forget branches the remote does not have."
)
@_VERIFY
@_PROGRESS
@AS_JSON
def fetch(
  remote: str | None,
  branches: tuple[str, ...],
  only: tuple[str, ...],
  depth: int | None,
  complete: bool,
  prune: bool,
  verify: bool,
  progress: bool | None,
  as_json: bool,
) -> None:
  """Copy what REMOTE (origin) has, without moving a branch."""
  repo = open_repo()
  with _bar(progress) as moved:
    fetched = repo.fetch(
      remote,
      branches or None,
      only=only or None,
      depth=depth,
      complete=complete,
      prune=prune,
      verify=verify,
      progress=moved,
    )

  def text() -> str:
    lines = _moves(fetched.branches)
    lines += [
      f"{name}: new tag at {at[:12]}" for name, at in fetched.tags.items()
    ]
    lines += [
      f"{name}: kept as it is here; the remote's tag is at {at[:12]}"
      for name, at in fetched.clashes.items()
    ]
    if fetched.lacking:
      lines.append(
        f"{len(fetched.lacking)} leaves are still lacking, such as "
        f"{fetched.lacking[0]}: of versions the remote does not have any more"
      )
    return "\n".join([f"from {fetched.url}", *lines, _counts(fetched.copied)])

  emit(as_json, fetched.to_json(), text)


@click.command()
@click.argument("remote", required=False)
@click.argument("branch", default="main")
@click.option(
  "--method", help="How to merge if both went on: ties, linear, ..."
)
@click.option(
  "--set",
  "more",
  multiple=True,
  metavar="NAME=JSON",
  help="An argument of the method; may be repeated.",
)
@click.option("-m", "--message", help="By default says what was merged.")
@_PROGRESS
@AUTHOR
@AS_JSON
def pull(
  remote: str | None,
  branch: str,
  method: str | None,
  more: tuple[str, ...],
  message: str | None,
  progress: bool | None,
  author: str | None,
  as_json: bool,
) -> None:
  """Fetch BRANCH (main) and bring the local one up to it."""
  chain = None
  if method is not None:
    from patchjax.cli.candidates import assignment, merge_method

    chain = merge_method(method, dict(assignment(text) for text in more))
  repo = open_repo()
  before = repo.branches().get(branch)
  with _bar(progress) as moved:
    made = repo.pull(
      remote,
      branch,
      method=chain,
      message=message,
      author=author,
      progress=moved,
    )
  value = {"branch": branch, "old": before, "commit": made}
  emit(as_json, value, "\n".join(_moves({branch: (before, made)})))


@click.command()
@click.argument("remote", required=False)
@click.argument("branches", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Push every branch.")
@click.option("--tags", is_flag=True, help="Push every tag, too.")
@click.option(
  "--force",
  is_flag=True,
  help="Drop what the branch has there, if it is as it was last fetched.",
)
@_VERIFY
@_PROGRESS
@AS_JSON
def push(
  remote: str | None,
  branches: tuple[str, ...],
  every: bool,
  tags: bool,
  force: bool,
  verify: bool,
  progress: bool | None,
  as_json: bool,
) -> None:
  """Copy BRANCHES (main), or tags, to REMOTE (origin, or a URL)."""
  repo = open_repo()
  names = list(repo.branches()) if every else list(branches) or ["main"]
  with _bar(progress) as moved:
    pushed = repo.push(
      remote, names, tags=tags, force=force, verify=verify, progress=moved
    )

  def text() -> str:
    lines = _moves(pushed.branches)
    lines += [
      f"{name}: new tag at {at[:12]}" for name, at in pushed.tags.items()
    ]
    return "\n".join([f"to {pushed.url}", *lines, _counts(pushed.copied)])

  emit(as_json, pushed.to_json(), text)


@click.group(invoke_without_command=True)
@AS_JSON
@click.pass_context
def remote(ctx: click.Context, as_json: bool) -> None:
  """List the remotes, or add or remove one."""
  if ctx.invoked_subcommand is None:
    _list(as_json)


@remote.command("list")
@AS_JSON
def remote_list(as_json: bool) -> None:
  """List the remotes."""
  _list(as_json)


@remote.command("add")
@click.argument("name")
@click.argument("url")
@AS_JSON
def remote_add(name: str, url: str, as_json: bool) -> None:
  """Call the repository at URL by a NAME."""
  added = open_repo().add_remote(name, url)
  emit(as_json, added.to_json(), f"remote {name}: {added.url}")


@remote.command("remove")
@click.argument("name")
@AS_JSON
def remote_remove(name: str, as_json: bool) -> None:
  """Forget a remote, and where its branches were."""
  open_repo().remove_remote(name)
  emit(as_json, {"name": name}, f"forgot the remote {name}")


def _list(as_json: bool) -> None:
  found = open_repo().remotes()
  width = max(map(len, found), default=0)
  lines = [
    f"{name:{width}}  {each.url}"
    + (f"  (only {' '.join(each.only)})" if each.only else "")
    for name, each in found.items()
  ]
  emit(as_json, [each.to_json() for each in found.values()], "\n".join(lines))


def _moves(branches: Mapping[str, tuple[str | None, str]]) -> list[str]:
  lines = []
  for name, (old, new) in branches.items():
    if old is None:
      lines.append(f"{name}: new at {new[:12]}")
    elif old == new:
      lines.append(f"{name}: up to date at {new[:12]}")
    else:
      lines.append(f"{name}: {old[:12]} -> {new[:12]}")
  return lines


def _counts(copied: Counts) -> str:
  from patchjax.trees.report import size_text

  return (
    f"copied {copied.commits:,} commits, {copied.packs:,} payloads and blobs, "
    f"{copied.files:,} files, {size_text(copied.bytes)}"
  )


@contextlib.contextmanager
def _bar(wanted: bool | None) -> Iterator[Callable[[str, int, int], None]]:
  """Gives a callback that moves a bar of bytes, with their rate, on stderr."""
  from tqdm import tqdm

  # None: on a terminal only.
  with tqdm(
    unit="B",
    unit_scale=True,
    unit_divisor=1024,
    leave=False,
    disable=None if wanted is None else not wanted,
  ) as bar:

    def moved(what: str, done: int, total: int) -> None:
      if what == "bytes":
        bar.total = total or None
        bar.update(done - bar.n)
      else:
        bar.set_description(f"{done:,} {what}", refresh=False)
        bar.update(0)

    yield moved


VERBS = (clone, fetch, pull, push, remote)
