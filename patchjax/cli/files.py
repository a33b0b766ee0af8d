"""Verbs that read and write parameters: commit, checkout, apply, import."""

from __future__ import annotations

from typing import Any

import click

from patchjax.cli.common import (
  AS_JSON,
  AUTHOR,
  counting,
  emit,
  is_patch,
  open_repo,
  patched,
  read_value,
  waiting,
)

_OUTPUT = click.option(
  "-o",
  "--output",
  required=True,
  metavar="OUT",
  help="What to write: a .safetensors or .npz file, or without a suffix a "
  "new plain Orbax checkpoint.",
)
_FORCE = click.option(
  "-f", "--force", is_flag=True, help="Replace the file if it exists."
)


@click.command()
@click.argument("file")
@click.option("-m", "--message", required=True, help="What was done, and why.")
@click.option("-b", "--branch", default="main", help="The branch to move.")
@click.option("--on", help="The version FILE was made from, if not the tip.")
@click.option(
  "--retry",
  is_flag=True,
  help="If the branch moved on from there, put both changes together: they "
  "must have changed different leaves.",
)
@click.option(
  "--any-base",
  is_flag=True,
  help="Commit a patch on another value of the same structure than its base.",
)
@AUTHOR
@AS_JSON
def commit(
  file: str,
  message: str,
  branch: str,
  on: str | None,
  retry: bool,
  any_base: bool,
  author: str | None,
  as_json: bool,
) -> None:
  """Store FILE as a new version of a branch.

  FILE is what `import` reads, or a patch file, which is applied to the tip
  of the branch.
  """
  from patchjax.interop import read

  repo = open_repo()
  with waiting(f"committing {file}"):
    made = repo.commit(
      file if is_patch(file) else read(file),
      message=message,
      branch=branch,
      author=author,
      on=on,
      retry=retry,
      any_base=any_base,
    )
  stored = repo.show(made)
  value = {"commit": made, "branch": branch, "tree": stored.tree}
  emit(as_json, value, f"[{branch} {made[:12]}] {stored.title}")


@click.command()
@click.argument("ref")
@click.option(
  "--only",
  multiple=True,
  metavar="REGEX",
  help="Only leaves whose whole name matches; may be repeated.",
)
@_OUTPUT
@_FORCE
@AS_JSON
def checkout(
  ref: str, only: tuple[str, ...], output: str, force: bool, as_json: bool
) -> None:
  """Write the parameters of version REF to a file."""
  from patchjax.interop import write

  repo = open_repo()
  with waiting(f"checking out {ref}"):
    params = repo.checkout(ref, only=list(only) or None)
    write(output, params, overwrite=force)
  made = repo.resolve(ref)
  value = {"commit": made, "path": output}
  emit(as_json, value, f"wrote {output} ({ref}, {made[:12]})")


@click.command()
@click.argument("base")
@click.argument("patch")
@click.option(
  "--any-base",
  is_flag=True,
  help="Apply to another value of the same structure than the patch's base.",
)
@_OUTPUT
@_FORCE
@AS_JSON
def apply(
  base: str,
  patch: str,
  any_base: bool,
  output: str,
  force: bool,
  as_json: bool,
) -> None:
  """Apply the file PATCH to BASE, a file or a ref, and write the result.

  The result is to the bit what `commit` would store.
  """
  from patchjax.interop import write

  params = read_value(base)
  with waiting(f"applying {patch}"):
    result = patched(params, patch, any_base=any_base)
    write(output, result, overwrite=force)
  emit(as_json, {"path": output}, f"wrote {output}")


@click.command("import")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("-m", "--message", help="What it is; default: import PATH.")
@click.option(
  "-b",
  "--branch",
  default="main",
  help="The branch to commit to; a new one starts a history of its own.",
)
@AUTHOR
@AS_JSON
def import_(
  paths: tuple[str, ...],
  message: str | None,
  branch: str,
  author: str | None,
  as_json: bool,
) -> None:
  """Commit what other libraries wrote: a version for each PATH, in order.

  PATH is safetensors (one file, or the index of shards or its folder), .npz,
  flax's msgpack, the directory of an Orbax checkpoint, or a directory of the
  steps of a training run as Orbax keeps them. All steps of a run become
  versions with their time; those that the branch has are passed over, so that
  the command can be run again.
  """
  from patchjax.interop import import_

  repo = open_repo()
  made: list[str] = []
  with counting() as progress:
    for path in paths:
      made += import_(
        repo,
        path,
        message=message,
        branch=branch,
        author=author,
        progress=progress,
      )
  commits = [repo.show(commit) for commit in made]
  lines = [f"[{branch} {commit.id[:12]}] {commit.title}" for commit in commits]
  emit(
    as_json,
    {"branch": branch, "commits": made},
    "\n".join(lines) or f"{branch} has all of it already",
  )


@click.command()
@click.argument("ref")
@click.argument("path")
@click.option(
  "--format",
  "kind",
  type=click.Choice(["safetensors", "npz", "orbax"]),
  help="The format, where the suffix of PATH does not say it.",
)
@click.option(
  "--only",
  multiple=True,
  metavar="REGEX",
  help="Only leaves whose whole name matches; may be repeated.",
)
@_FORCE
@AS_JSON
def export(
  ref: str,
  path: str,
  kind: Any,
  only: tuple[str, ...],
  force: bool,
  as_json: bool,
) -> None:
  """Write version REF for other libraries, leaf by leaf.

  The suffix of PATH is the format: .safetensors (in shards with an index if
  it is large), .npz, or none for a plain Orbax checkpoint.
  """
  from patchjax.interop import export

  repo = open_repo()
  with waiting(f"exporting {ref}"):
    written = export(
      repo,
      ref,
      path,
      format=kind,
      only=list(only) or None,
      overwrite=force,
    )
  value = {"commit": repo.resolve(ref), "paths": [str(p) for p in written]}
  emit(as_json, value, "\n".join(f"wrote {p}" for p in written))


VERBS = (commit, checkout, apply, import_, export)
