"""Verbs that make and judge versions: merge, vet, release, demo."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click

from patchjax.cli import out_of_core
from patchjax.cli.common import (
  AS_JSON,
  AUTHOR,
  emit,
  is_patch,
  is_path,
  load_object,
  open_repo,
  patched,
  read_text,
  read_value,
  waiting,
)
from patchjax.cli.methods import SET, assignment, merge_method

if TYPE_CHECKING:
  from patchjax.vetting import Policy, Suite, Verdict

_SUITE = click.option(
  "--suite",
  metavar="MODULE:NAME",
  help="Where to import the suite from: a Suite, or a function that makes one.",
)
_POLICY = click.option(
  "--policy",
  metavar="FILE|MODULE:NAME",
  help="Margins and caps: a JSON file, or where to import them from.",
)
_CLAIMS = click.option(
  "--claim",
  "claims",
  multiple=True,
  metavar="TEST[=GAIN]",
  help="A test on which the candidate must be better; may be repeated.",
)


@click.command()
@click.argument("refs", nargs=-1)
@click.option("--into", help="The branch that is merged into; by default main.")
@click.option("--method", help="linear, slerp, dare_ties, ...; default ties.")
@click.option("--density", type=float, help="Share of the entries kept (ties).")
@click.option("--scale", type=float, help="Factor of the merged task vector.")
@click.option(
  "--weights", metavar="W,W,...", help="One a contributor: INTO, then REFS."
)
@SET
@click.option("--base", help="What contributions are measured from.")
@click.option("-m", "--message", help="By default says what was merged.")
@click.option(
  "--dry-run", is_flag=True, help="Show the conflicts; commit nothing."
)
@click.option(
  "--no-ff", is_flag=True, help="Commit even where the branch could move on."
)
@click.option(
  "--whole",
  is_flag=True,
  help="Run the method on leaves that one side changed too.",
)
@out_of_core.options
@AUTHOR
@AS_JSON
def merge(
  refs: tuple[str, ...],
  into: str | None,
  method: str | None,
  density: float | None,
  scale: float | None,
  weights: str | None,
  more: tuple[str, ...],
  base: str | None,
  message: str | None,
  dry_run: bool,
  no_ff: bool,
  whole: bool,
  author: str | None,
  as_json: bool,
  **files: Any,
) -> None:
  """Merge the versions REFS into a branch; or, with --out, models into files.

  What each version contributes is measured from their merge base. A leaf that
  one version changed is taken from it as it is.

  With --out nothing is committed: REFS and --base are then safetensors files,
  folders of shards, patch files, versions (REF, or REPOSITORY@REF), merged
  leaf by leaf in little memory; killed, the same command goes on. Without
  --base the method must need none.
  """
  from patchjax import merging
  from patchjax.history.commits.merges import contributing

  given = {"density": density, "scale": scale, "weights": _numbers(weights)}
  given = {name: value for name, value in given.items() if value is not None}
  given |= dict(assignment(text) for text in more)
  if out_of_core.wanted(files):
    for option, value in (
      ("--into", into),
      ("--message", message),
      ("--dry-run", dry_run),
      ("--no-ff", no_ff),
      ("--whole", whole),
      ("--author", author),
    ):
      if (
        value
        and click.get_current_context().get_parameter_source(
          option[2:].replace("-", "_")
        )
        is click.core.ParameterSource.COMMANDLINE
      ):
        raise click.UsageError(f"{option} is for merges into a branch")
    out_of_core.merge(refs, base, method, given, as_json=as_json, **files)
    return
  if not refs:
    raise click.UsageError("which versions? name one or more REFS")
  into = into or "main"
  chain = merge_method(method or "ties", given)
  repo = open_repo()
  tip = repo.resolve(f"heads/{into}")
  parents = contributing(repo, tip, refs)
  if len(parents) == 1:
    value = {"commit": tip, "branch": into, "merged": False}
    emit(as_json, value, f"{into} has it all already: nothing to merge")
    return
  if dry_run:
    with waiting("comparing the contributors"):
      start = repo.merge_base(*parents) if base is None else base
      # As in a merge: what equals the base contributes nothing.
      sides = [
        ref for ref in parents if repo.show(ref).tree != repo.show(start).tree
      ]
      if len(sides) < 2:
        text = "one side changed: it is taken as it is, without a conflict"
        emit(as_json, {"contributors": sides, "leaves": []}, text)
        return
      report = merging.conflicts(
        repo.checkout(start),
        [repo.checkout(ref) for ref in sides],
        method=chain,
        labels=[ref[:12] for ref in sides],
      )
    emit(as_json, report.to_json(), lambda: str(report))
    return
  with waiting("merging"):
    made = repo.merge(
      into,
      refs,
      method=chain,
      base=base,
      message=message,
      author=author,
      fast_forward=not no_ff,
      one_sided="method" if whole else "take",
    )
  stored = repo.show(made)
  value = {
    "commit": made,
    "branch": into,
    "parents": list(stored.parents),
    "merged": True,
  }
  how = "fast-forward to " if made in parents else ""
  emit(as_json, value, f"[{into} {made[:12]}] {how}{stored.title}")


@click.command()
@click.argument("new")
@click.option(
  "--against", required=True, metavar="OLD", help="What NEW would replace."
)
@_SUITE
@_POLICY
@_CLAIMS
@AS_JSON
def vet(
  new: str,
  against: str,
  suite: str | None,
  policy: str | None,
  claims: tuple[str, ...],
  as_json: bool,
) -> None:
  """Decide whether NEW may replace OLD; exit with 1 if it may not.

  NEW and OLD are refs or files; NEW may be a patch file on OLD. In a
  repository, the verdict is stored with the commit NEW (of a file: with OLD).
  """
  if suite is None:
    raise click.UsageError("vet needs --suite MODULE:NAME")
  verdict = _vet(
    new, against, _suite(suite), policy_of(policy), _claimed(claims)
  )
  emit(as_json, verdict.to_json(), lambda: str(verdict))
  if not verdict.accepted:
    sys.exit(1)


def _vet(
  new: str, old: str, suite: Suite, policy: Policy | None, claims: Any
) -> Verdict:
  from patchjax.vetting import gate, record, uses

  before = read_value(old)
  proposed = is_path(new) and is_patch(new)
  after = patched(before, new) if proposed else read_value(new)
  # Two files are compared without a repository, and nobody counts.
  refs = [text for text in (new, old) if not is_path(text)]
  repo = open_repo() if refs else None
  verdict = gate(
    before,
    after,
    suite,
    policy,
    claims=claims,
    used=uses(repo, suite) if repo else None,
    progress=sys.stderr.isatty(),
  )
  if repo:
    record(repo, refs[0], verdict)
  return verdict


@click.command()
@click.argument("ref", default="main")
@_SUITE
@_POLICY
@_CLAIMS
@click.option(
  "--verdict", metavar="FILE", help="What `vet --json` printed, as evidence."
)
@click.option(
  "--override",
  metavar="REASON",
  help="Release as MAJOR what the gate did not accept, in writing.",
)
@AS_JSON
def release(
  ref: str,
  suite: str | None,
  policy: str | None,
  claims: tuple[str, ...],
  verdict: str | None,
  override: str | None,
  as_json: bool,
) -> None:
  """Release REF under the version that its evidence has earned.

  The evidence is --verdict, one stored with the commit by `vet`, or a run of
  --suite. What it does not allow is refused with exit code 1.
  """
  from patchjax.releases import release as make
  from patchjax.vetting import Verdict

  made = make(
    open_repo(),
    ref,
    suite=_suite(suite) if suite else None,
    verdict=None if verdict is None else Verdict.from_json(read_text(verdict)),
    policy=policy_of(policy),
    claims=_claimed(claims),
    override=override,
    progress=sys.stderr.isatty(),
  )
  emit(as_json, made.to_json(), lambda: str(made))


@click.command()
@click.argument("directory", default="clamp-demo")
@click.option(
  "--force", is_flag=True, help="Replace the repository at DIRECTORY."
)
def demo(directory: str, force: bool) -> None:
  """Release, patch, merge, vet and release again a real model.

  Writes the repository DIRECTORY, on which the other verbs then work. If it
  exists it is kept, and DIRECTORY-2, -3, ... is written. Exits with 1 if the
  data did not lead to both releases and a rejection.
  """
  from patchjax.demo import run

  try:
    report = run(directory, force=force)
  except ImportError as error:
    raise click.UsageError(str(error)) from error
  if report.problems:
    sys.exit(1)


def _numbers(text: str | None) -> list[float] | None:
  if text is None:
    return None
  try:
    return [float(part) for part in text.split(",")]
  except ValueError as error:
    raise click.BadParameter(
      f"expected numbers such as 1,0.5; found {text!r}", param_hint="--weights"
    ) from error


def _suite(text: str) -> Suite:
  from patchjax.vetting import Suite

  return load_object(text, Suite)


def policy_of(text: str | None) -> Policy | None:
  """Returns the policy of an option.

  Args:
    text: a JSON file, or where to import it from; None for the default.
  """
  from patchjax.vetting import Policy

  if text is None:
    return None
  if pathlib.Path(text).is_file():
    return Policy.from_json(read_text(text))
  return load_object(text, Policy)


def _claimed(claims: tuple[str, ...]) -> dict[str, float]:
  wanted = {}
  for claim in claims:
    test, _, gain = claim.partition("=")
    try:
      wanted[test] = float(gain or 0)
    except ValueError as error:
      raise click.BadParameter(
        f"expected TEST or TEST=GAIN, found {claim!r}", param_hint="--claim"
      ) from error
  return wanted


VERBS = (merge, vet, release, demo)
