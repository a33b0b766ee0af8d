"""Verbs that read and write parameters: commit, checkout, apply."""

from __future__ import annotations

import click

from patchjax.cli.common import (
  AS_JSON,
  AUTHOR,
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
@click.option("--on", help="The version a patch was made for, if not the tip.")
@AUTHOR
@AS_JSON
def commit(
  file: str,
  message: str,
  branch: str,
  on: str | None,
  author: str | None,
  as_json: bool,
) -> None:
  """Store FILE as a new version of a branch.

  FILE is a .safetensors or .npz file, the directory of an Orbax checkpoint,
  or a patch file, which is applied to the tip of the branch.
  """
  from patchjax.interop import load_params

  repo = open_repo()
  with waiting(f"committing {file}"):
    made = repo.commit(
      file if is_patch(file) else load_params(file),
      message=message,
      branch=branch,
      author=author,
      on=on,
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
  from patchjax.interop import save_params

  repo = open_repo()
  with waiting(f"checking out {ref}"):
    params = repo.checkout(ref, only=list(only) or None)
    save_params(output, params, overwrite=force)
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
  from patchjax.interop import save_params

  params = read_value(base)
  with waiting(f"applying {patch}"):
    result = patched(params, patch, any_base=any_base)
    save_params(output, result, overwrite=force)
  emit(as_json, {"path": output}, f"wrote {output}")


VERBS = (commit, checkout, apply)
