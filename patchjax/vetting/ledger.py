"""The ledger: how often the examples of a suite have been looked at.

Each verdict tells a little about the examples; after enough candidates the
survivors fit the suite rather than the task (Dwork et al. 2015; Blum and Hardt
2015, arXiv:1502.04585). The count is derived from the verdicts stored with
commits, so that it cannot be forgotten or set back by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchjax.vetting.verdict import Verdict

if TYPE_CHECKING:
  from patchjax.history import Repo
  from patchjax.vetting.suite import Suite

KIND = "verdict"
"""The kind of annotation that holds a verdict."""


def record(repo: Repo, ref: str, verdict: Verdict) -> str:
  """Stores a verdict with a commit.

  Args:
    repo: the repository.
    ref: the candidate's commit; for one that never became a commit, such as a
      refused patch file, the commit that it was compared with.
    verdict: what to store.

  Returns:
    The id of the annotation.
  """
  return repo.annotate(ref, KIND, verdict.to_json())


def verdicts(repo: Repo, ref: str) -> list[Verdict]:
  """The verdicts stored with a commit, oldest first.

  Args:
    repo: the repository.
    ref: a commit.
  """
  return [
    Verdict.from_json(note["payload"]) for note in repo.annotations(ref, KIND)
  ]


def uses(repo: Repo, suite: Suite) -> int:
  """How many different comparisons a suite was used for in a repository.

  Args:
    repo: the repository; all that its branches and tags lead to is searched.
    suite: the suite, by digest: another version is another set of examples.

  Returns:
    The number of distinct verdicts.
  """
  commits = {
    commit.id
    for ref in (*repo.branches(), *repo.tags())
    for commit in repo.log(ref)
  }
  digest = suite.digest
  return len(
    {
      verdict.id
      for commit in commits
      for verdict in verdicts(repo, commit)
      if verdict.digest == digest
    }
  )
