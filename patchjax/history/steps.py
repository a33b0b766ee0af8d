"""Steps of training runs, as a repository holds them: a tag and a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.history.storage.refs import TAGS
from patchjax.trees.errors import RefNotFoundError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo
  from patchjax.history.storage.objects import Commit

_KIND = "training step"


def tag_of(branch: str, step: int) -> str:
  """Returns the name of the tag of a step.

  Args:
    branch: the branch of its run.
    step: its number.

  Example:
    >>> tag_of("main", 100)
    'steps/main/100'
  """
  return f"steps/{branch}/{step}"


def all_of(repo: Repo, branch: str) -> list[int]:
  """Returns the steps of a run, in order.

  Args:
    repo: the repository.
    branch: the branch of the run.
  """
  prefix = tag_of(branch, 0)[:-1]
  rest = (
    name[len(prefix) :]
    for name in repo.refs.names(TAGS)
    if name.startswith(prefix)
  )
  return sorted(int(x) for x in rest if re.fullmatch(r"0|[1-9]\d*", x))


def commit_of(repo: Repo, branch: str, step: int) -> str:
  """Returns the id of the commit of a step.

  Args:
    repo: the repository.
    branch: the branch of its run.
    step: its number.

  Raises:
    RefNotFoundError: if it is not kept; says which are.
  """
  found = repo.refs.get(TAGS, tag_of(branch, step))
  if found is None:
    kept = ", ".join(map(str, all_of(repo, branch))) or "none"
    raise RefNotFoundError(
      f"step {step} of branch {branch!r} is not kept; kept are: {kept}"
    )
  return found


def number_of(commit: Commit, branch: str) -> int | None:
  """Returns which step of a run a commit is; None if it is none.

  Args:
    commit: any commit.
    branch: the branch of the run.
  """
  recipe = commit.recipe or {}
  ours = recipe.get("kind") == _KIND and recipe.get("branch") == branch
  return recipe["step"] if ours else None


def metrics_of(commit: Commit) -> dict[str, float]:
  """Returns the metrics of a step.

  Args:
    commit: its commit.
  """
  found = (commit.recipe or {}).get("metrics", {})
  return {name: float(value) for name, value in found.items()}


def describe(
  branch: str, step: int, metrics: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
  """Returns message and recipe of the commit of a step.

  Args:
    branch: the branch of its run.
    step: its number.
    metrics: numbers by name.

  Raises:
    RepositoryError: if a metric is no number.

  Example:
    >>> describe("main", 3, {"loss": 0.5})[0]
    'step 3: loss 0.5'
  """
  spelled = {name: _spell(name, value) for name, value in metrics.items()}
  listed = ", ".join(f"{k} {float(v):.6g}" for k, v in spelled.items())
  message = f"step {step}" + (f": {listed}" if listed else "")
  recipe = {"branch": branch, "step": step, "metrics": spelled}
  return message, {"kind": _KIND, **recipe}


def _spell(name: str, value: Any) -> float | str:
  """Returns a metric as JSON holds it: what is not finite is a text."""
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise RepositoryError(
      f"metric {name!r}: expected a number, found {value!r:.60}"
    ) from error
  return number if math.isfinite(number) else str(number)
