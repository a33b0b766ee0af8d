"""The maintainers' desk: proposals come in, are scored, and leave a trace."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

import patchjax as pj
from patchjax.demo import evidence, report
from patchjax.demo.config import Config
from patchjax.demo.scoring import Scorer
from patchjax.history import Repo
from patchjax.vetting import (
  Outcomes,
  Policy,
  Suite,
  Verdict,
  gate,
  record,
  uses,
)

MAINTAINERS = "CLAMP"

_RECENT = 6  # versions in memory, of 90 MB each

NOTE = "demo"
"""Kind of the annotation from which `patchjax.demo.suite` finds its parts."""

_SHORT = {"accepted": "accepted", "refused": "refused", "undecided": "open"}


class Desk:
  """A repository, a suite, and what has been scored so far.

  Attributes:
    repo: the repository.
    scorer: the pretrained model and the tasks.
    config: every number.
    patches: the stored task patches, from event 1 on.
    suite: the suite, from event 1 on.
    lines: rows of the final table.
    releases: versions released.
    rejected: branches that the gate did not let pass.
    problems: what did not go as the essay tells.
    facts: measured numbers by name.
  """

  def __init__(
    self,
    repo: Repo,
    scorer: Scorer,
    config: Config,
    echo: Callable[[str], object] = print,
  ):
    self.repo = repo
    self.scorer = scorer
    self.config = config
    self.echo = echo
    self.patches: evidence.TaskPatches
    self.suite: Suite
    self.lines: list[report.Line] = []
    self.releases: list[str] = []
    self.rejected: list[str] = []
    self.problems: list[str] = []
    self.facts: dict[str, Any] = {}
    self._known: dict[str, Outcomes] = {}
    self._recent: dict[str, Any] = {}
    self._parts: dict[tuple[str, str], np.ndarray] = {}
    self.folder = tempfile.TemporaryDirectory(prefix="patchjax-demo-")

  @contextlib.contextmanager
  def event(self, title: str) -> Iterator[None]:
    """Announces an event, and says afterwards what it took."""
    self.echo(f"\n{title}\n{'-' * len(title)}")
    with report.Cost() as cost:
      yield
    self.facts[f"event {title[0]}, CPU-s"] = cost.cpu
    self.echo(f"(took {cost})")

  def submit(
    self, branch: str, patch: pj.Patch, on: str, author: str
  ) -> pj.Patch:
    """Writes a patch file, as a contributor would, and commits the file."""
    path = pathlib.Path(self.folder.name, branch.replace("/", "-"))
    path = path.with_suffix(".safetensors")
    patch = patch.replace(base=self.repo.show(on).tree)
    patch.save(path)
    self.repo.branch(branch, at=on)
    self.repo.commit(
      path, message=f"Patch of {author}", branch=branch, author=author
    )
    nbytes = path.stat().st_size
    whole = sum(
      leaf.nbytes for leaf in pj.trees.named_leaves(self.scorer.base).values()
    )
    self.facts[f"{branch}, bytes"] = nbytes
    self.echo(
      f"{branch}: a patch file of {nbytes:,} bytes,"
      f" {100 * nbytes / whole:.2f} % of the checkpoint"
    )
    return patch

  def outcomes(self, ref: str) -> Outcomes:
    """Scores a version once."""
    tree = self.repo.show(ref).tree
    if tree not in self._known:
      params = self.checkout(ref)
      values = {}
      for test in tqdm(self.suite.tests, desc=f"scoring {ref}", leave=False):
        # A merge has been scored on its parents' claims already.
        done = self._parts.get((tree, test.name))
        values[test.name] = test.evaluate(params) if done is None else done
      self._known[tree] = self.suite.outcomes(values, subject=tree)
    return self._known[tree]

  def gate(
    self,
    old: str,
    new: str,
    *,
    claims: tuple[str, ...] = (),
    policy: Policy | None = None,
  ) -> Verdict:
    """Compares two versions, shows the verdict and stores it with the new."""
    verdict = gate(
      self.outcomes(old),
      self.outcomes(new),
      self.suite,
      policy or evidence.contribution_policy(self.config),
      claims=claims,
      used=uses(self.repo, self.suite),
    )
    record(self.repo, new, verdict)
    self.echo(f"{new} against {old}\n{verdict}")
    return verdict

  def checkout(self, ref: str) -> Any:
    """A version; the last few stay in memory, for they are wanted again."""
    tree = self.repo.show(ref).tree
    if tree not in self._recent:
      self._recent[tree] = self.repo.checkout(ref)
      for old in list(self._recent)[:-_RECENT]:
        del self._recent[old]
    return self._recent[tree]

  def outcome(self, ref: str, task: str) -> np.ndarray:
    """Zero-shot outcomes of a version on one test: no more than is asked."""
    tree = self.repo.show(ref).tree
    if tree in self._known:
      return self._known[tree].values[task]
    if (tree, task) not in self._parts:
      params = self.checkout(ref)
      self._parts[tree, task] = self.scorer.outcomes(params, task)
    return self._parts[tree, task]

  def validation(self, ref: str, task: str) -> float:
    """Mean score of a version on validation texts."""
    params = self.checkout(ref)
    return float(self.scorer.outcomes(params, task, "validation").mean())

  def keep(self, outcomes: Outcomes) -> None:
    """Takes outcomes that were computed elsewhere, in the place of others."""
    self._known[outcomes.subject] = outcomes

  def add_verdict(
    self,
    branch: str,
    author: str,
    kind: str,
    verdict: Verdict,
    *,
    version: str | None = None,
  ) -> None:
    """Adds a version that has been through the gate to the final table."""
    if not verdict.accepted:
      self.rejected.append(branch)
    self.add_line(
      version or branch,
      author,
      kind,
      self.facts[f"{branch}, bytes"],
      self.outcomes(branch).values,
      "released" if version else _SHORT[verdict.outcome],
    )

  def add_line(
    self,
    version: str,
    author: str,
    kind: str,
    nbytes: int | None,
    scores: Mapping[str, np.ndarray],
    verdict: str,
  ) -> None:
    """Adds a row to the final table."""
    self.lines.append(
      report.Line(
        version=version,
        author=author,
        kind=kind,
        nbytes=nbytes,
        scores=scores,
        verdict=verdict,
      )
    )
