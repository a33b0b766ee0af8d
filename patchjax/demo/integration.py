"""Merging contributions that were made in parallel, as a maintainer would.

Several merges are computed; validation texts say which to try first, the
gate says whether one may be released.
"""

from collections.abc import Mapping

import numpy as np

import patchjax as pj
from patchjax.demo import evidence, reuse
from patchjax.demo.desk import MAINTAINERS, Desk
from patchjax.patches import Transform
from patchjax.vetting import gate, record

_OTHER_MASK = {"ducksville": "control"}
"""The same work on another mask, to be tried where masks are in conflict."""


def integrate(desk: Desk, claims: Mapping[str, str]) -> bool:
  """Merges the contributors and releases the first merge that passes.

  Args:
    desk: the desk.
    claims: task that each contributor (a branch) claims to have improved.

  Returns:
    Whether there was one.
  """
  base = desk.checkout("v1.0.0")
  merges = {}
  others = [_OTHER_MASK.get(branch, branch) for branch in claims]
  for parents in (list(claims), others):
    found = pj.merging.conflicts(
      base, [desk.checkout(branch) for branch in parents]
    ).total
    desk.echo(
      f"{' and '.join(parents)} change {found.changed:.3%} of the model's"
      f" entries, {found.overlap:.1%} of them both; opposite signs:"
      f" {found.sign:.1%} of the magnitude; cosine {found.cosine:+.3f}"
    )
    desk.facts[f"overlap of {' and '.join(parents)}"] = found.overlap
    for name, method in _methods().items():
      suffix = "" if parents == list(claims) else f"-{parents[0]}"
      merges[f"{name}{suffix}"] = parents, method
  for branch in _ranked(desk, merges, claims):
    if _try(desk, branch, dict(zip(merges[branch][0], claims.values()))):
      return True
  return False


def _methods() -> dict[str, Transform]:
  return {
    # Sparse patches are trimmed already: TIES elects signs and averages.
    "ties": pj.merging.ties(density=1.0),
    "sum": pj.merging.task_arithmetic(),
  }


def _ranked(
  desk: Desk,
  merges: Mapping[str, tuple[list[str], Transform]],
  claims: Mapping[str, str],
) -> list[str]:
  """Makes the merges; the one that costs the parents least comes first."""
  losses = {}
  for branch, (parents, method) in merges.items():
    desk.repo.branch(branch, at=parents[0])
    desk.repo.merge(
      branch,
      parents[1:],
      method=method,
      message=f"Merge {' and '.join(parents)} by {branch.split('-')[0]}",
      author=MAINTAINERS,
    )
    losses[branch] = max(
      desk.validation(parent, task) - desk.validation(branch, task)
      for parent, task in zip(parents, claims.values())
    )
  order = sorted(losses, key=lambda branch: losses[branch])
  shown = ", ".join(f"{name} {100 * losses[name]:+.1f}" for name in order)
  desk.echo(f"points that a parent loses at most, in validation: {shown}")
  return order


def _try(desk: Desk, branch: str, claims: Mapping[str, str]) -> bool:
  """Gates a merge against its parents and the release, and releases it."""
  passed = True
  for parent, task in claims.items():
    suite = evidence.part_of(desk.suite, (task,))
    old, new = (
      suite.outcomes(
        {task: desk.outcome(ref, task)}, subject=desk.repo.show(ref).tree
      )
      for ref in (parent, branch)
    )
    verdict = gate(old, new, suite, evidence.parent_policy(desk.config))
    record(desk.repo, branch, verdict)
    row = verdict.rows[0]
    desk.echo(
      f"{branch} against {parent} on {task}: {100 * row.difference:+.1f} points"
      f" ({row.lost} lost, {row.gained} gained of {row.n}): {row.result}"
    )
    passed = passed and verdict.accepted
  if not passed:
    scores = {task: desk.outcome(branch, task) for task in claims.values()}
    nbytes = _patch_bytes(desk, branch)
    desk.add_line(branch, MAINTAINERS, "merge", nbytes, scores, "refused")
    return False
  wanted = tuple(claims.values())
  verdict = desk.gate("v1.0.0", branch, claims=wanted)
  if not verdict.accepted:
    verdict = reuse.climb(desk, branch, verdict, wanted)
  desk.facts[f"{branch}, bytes"] = _patch_bytes(desk, branch)
  if not verdict.accepted:
    desk.add_verdict(branch, MAINTAINERS, "merge", verdict)
    return False
  desk.echo(_take(desk, branch))
  made = pj.release(desk.repo, "main", verdict=verdict)
  desk.releases.append(made.version)
  desk.echo(str(made))
  desk.add_verdict(branch, MAINTAINERS, "merge", verdict, version=made.version)
  return True


def _take(desk: Desk, branch: str) -> str:
  """Moves main on to the merge."""
  main, tip = (desk.repo.show(ref).id for ref in ("main", branch))
  if main in {commit.id for commit in desk.repo.log(branch)}:
    desk.repo.merge("main", [branch], method=pj.merging.linear())
    return f"main moves on to {branch} ({tip[:12]})"
  # Main holds the proposal that this merge does without: its value replaces
  # main's, and the history of both is kept.
  desk.repo.commit(
    desk.checkout(branch),
    message=f"Take {branch}",
    parents=[main, tip],
    author=MAINTAINERS,
  )
  return f"main takes the value of {branch} ({tip[:12]})"


def _patch_bytes(desk: Desk, branch: str) -> int:
  """What the merge's difference to the release takes as a patch."""
  both = [desk.checkout(ref) for ref in ("v1.0.0", branch)]
  patch = pj.compress(pj.diff(*both, only="layers/.*"))
  return int(np.int64(patch.nbytes))
