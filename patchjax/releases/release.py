"""Releasing a commit: version, evidence, tag."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from patchjax.releases import versions
from patchjax.releases.versions import Decision, Interface
from patchjax.trees.errors import (
  FormatError,
  RefNotFoundError,
  ReleaseRefusedError,
  VetError,
)

if TYPE_CHECKING:
  from patchjax.history import Repo
  from patchjax.vetting import Outcomes, Policy, Suite, Verdict

KIND = "release"
"""The kind of annotation that holds a release."""

_SCHEMA = "patchjax/release/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
  """A commit with a version that its evidence has earned.

  Attributes:
    version: semantic version, without the `v` of the tag.
    commit: id of the commit.
    tree: id of its value.
    level: "first", "patch", "minor" or "major".
    previous: version of the release it was compared with, "" for a first one.
    retained: share of the previous entries that survive.
    changed: share of these whose bits differ.
    reasons: why this level.
    suite: label of the suite that it was tested with, or "".
    suite_digest: its digest.
    verdict: the verdict as JSON values; None for a first release, or where an
      override replaced it.
    override: the maintainer's reason, or "".
    interface: inputs, outputs and tokenizer as JSON values, if declared.
  """

  version: str
  commit: str
  tree: str
  level: str
  previous: str = ""
  retained: float = 1.0
  changed: float = 0.0
  reasons: tuple[str, ...] = ()
  suite: str = ""
  suite_digest: str = ""
  verdict: dict[str, Any] | None = None
  override: str = ""
  interface: dict[str, Any] | None = None

  @property
  def tag(self) -> str:
    """Name of its tag."""
    return versions.tag_of(self.version)

  def __str__(self) -> str:
    after = f" after {self.previous}" if self.previous else ""
    lines = [f"released {self.version} ({self.level}{after}): {self.commit}"]
    return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])

  def to_json(self) -> dict[str, Any]:
    """Returns the release as JSON values."""
    value = dataclasses.asdict(self)
    return {"schema": _SCHEMA, **value, "reasons": list(self.reasons)}

  @classmethod
  def from_json(cls, value: Mapping[str, Any] | str) -> Release:
    """Reads what `to_json` returned, as values or as text.

    Raises:
      FormatError: if it is no release of this version.
    """
    from patchjax.vetting.policy import read_json

    fields = read_json(value, _SCHEMA, "release")
    try:
      return cls(**{**fields, "reasons": tuple(fields["reasons"])})
    except (KeyError, TypeError) as error:
      raise FormatError(f"not a release: {error}") from error


def release(
  repo: Repo,
  ref: str = "main",
  *,
  suite: Suite | None = None,
  verdict: Verdict | None = None,
  policy: Policy | None = None,
  claims: Iterable[str] | Mapping[str, float] = (),
  override: str | None = None,
  interface: Interface | None = None,
  carried: Mapping[str, str] | None = None,
  like: Any = None,
  progress: bool = False,
) -> Release:
  """Releases a commit under the version that its evidence has earned.

  The first release of a history is 1.0.0. A later one is compared with the
  highest release among its ancestors; see `patchjax.releases.classify` for the
  rules. The evidence is, in this order: `verdict`, one of the verdicts stored
  with the commit that compares these very values, or a run of `suite` on both.
  The commit is tagged `v<version>`, and everything that led to it is stored
  with it.

  Args:
    repo: the repository.
    ref: what to release.
    suite: tests to run if there is no verdict yet. With a first release it is
      only recorded as the suite that the release comes with.
    verdict: result of a gate; its values must be those of the commit and of
      the previous release.
    policy: what any verdict must have been given under; by default a verdict's
      own policy is taken as it is, and `Policy()` for a new run.
    claims: gains to be shown, if the suite is run.
    override: a maintainer's reason to release, as MAJOR, what the gate did not
      accept.
    interface: inputs, outputs and tokenizer; default those of the previous
      release.
    carried: old name -> new name of leaves that moved or grew.
    like: passed to `repo.checkout` for the tests to run on; default nested
      dicts.
    progress: whether to show progress bars.

  Returns:
    The `Release`.

  Raises:
    ReleaseRefusedError: if the candidate failed, is undecided or untested, if
      it is released already, or if the version is taken by another commit.
    VetError: if the verdict is not about these values or not under `policy`.

  Example:
    >>> import numpy as np
    >>> import patchjax as pj
    >>> from patchjax.vetting import Suite, Test
    >>> positive = Test("positive", lambda p: np.resize(p["w"] > 0, 400))
    >>> suite = Suite("signs", "1", [positive])
    >>> with pj.Repo.temporary() as repo:
    ...   base = repo.commit({"w": np.float32([1, 2, 3])}, message="base")
    ...   print(pj.release(repo, suite=suite).version)
    ...   tuned = repo.commit({"w": np.float32([1, 2, 4])}, message="tuned")
    ...   print(pj.release(repo, suite=suite).version)
    1.0.0
    1.0.1
  """
  commit = repo.show(ref)
  before = _previous(repo, ref)
  if before is None:
    if verdict is not None:
      suite_label, suite_digest = verdict.suite, verdict.digest
    else:
      suite_label = suite.label if suite else ""
      suite_digest = suite.digest if suite else ""
    return _store(
      repo,
      Release(
        version=versions.FIRST,
        commit=commit.id,
        tree=commit.tree,
        level="first",
        reasons=("the first release of this history",),
        suite=suite_label,
        suite_digest=suite_digest,
        interface=versions.interface_json(interface),
      ),
    )

  if before.tree == commit.tree:
    raise ReleaseRefusedError(
      f"{ref} has the very values of release {before.version} (tree "
      f"{commit.tree[:12]}): there is nothing to release; use {before.tag}"
    )
  if verdict is None:
    verdict = _stored_verdict(repo, commit, before, suite, policy, claims)
  if verdict is not None:
    _check_verdict(verdict, before, commit, policy)
  elif suite is not None:
    verdict = _run(
      repo, before, commit, suite, policy, claims, like=like, progress=progress
    )
  decision = _classify(
    repo, before, commit, verdict, policy, carried, interface, override
  )
  if decision.refused:
    reasons = "".join(f"\n- {reason}" for reason in decision.reasons)
    raise ReleaseRefusedError(
      f"{ref} ({commit.id[:12]}) cannot be released after {before.version}:"
      f"{reasons}\nmend the candidate, add evidence, or override in writing "
      "into a MAJOR version"
    )
  interface_values = versions.interface_json(interface) or before.interface
  return _store(
    repo,
    Release(
      version=str(versions.bump(before.version, decision.level)),
      commit=commit.id,
      tree=commit.tree,
      level=decision.level,
      previous=before.version,
      retained=decision.retained,
      changed=decision.changed,
      reasons=decision.reasons,
      suite=verdict.suite if verdict else "",
      suite_digest=verdict.digest if verdict else "",
      verdict=verdict.to_json() if verdict else None,
      override=(override or "").strip(),
      interface=interface_values,
    ),
  )


def releases(repo: Repo, ref: str = "main") -> list[Release]:
  """The releases that a commit descends from, highest version first.

  Args:
    repo: the repository.
    ref: a commit; a release itself is listed too.
  """
  tagged: dict[str, set[str]] = {}
  for tag, commit_id in repo.tags().items():
    tagged.setdefault(commit_id, set()).add(tag)
  notes = [
    note
    for commit in repo.log(ref)
    if commit.id in tagged
    for note in repo.annotations(commit.id, KIND)
  ]
  # A note without its tag is of a release that was interrupted; by tag, since
  # a release that was interrupted and made again has two notes.
  found = {
    made.tag: made
    for made in (Release.from_json(note["payload"]) for note in notes)
    if made.tag in tagged[made.commit]
  }
  return sorted(
    found.values(), key=lambda r: versions.parse(r.version), reverse=True
  )


def _previous(repo: Repo, ref: str) -> Release | None:
  found = releases(repo, ref)
  return found[0] if found else None


def _stored_verdict(
  repo: Repo,
  commit: Any,
  before: Release,
  suite: Suite | None,
  policy: Policy | None,
  claims: Iterable[str] | Mapping[str, float],
) -> Verdict | None:
  """The latest stored verdict that answers exactly what is asked."""
  from patchjax.vetting.ledger import verdicts

  wanted = {claims} if isinstance(claims, str) else set(claims)
  for verdict in reversed(verdicts(repo, commit.id)):
    shown = {row.name for row in verdict.rows if row.role == "claim"}
    if (
      (verdict.old, verdict.new) == (before.tree, commit.tree)
      and (suite is None or verdict.digest == suite.digest)
      and (policy is None or verdict.policy == policy)
      and wanted <= shown
    ):
      return verdict
  return None


def _check_verdict(
  verdict: Verdict, before: Release, commit: Any, policy: Policy | None
) -> None:
  if policy is not None and verdict.policy != policy:
    raise VetError(
      "the verdict was given under another policy than the one asked for; "
      "run the gate again with this policy, or leave policy= out"
    )
  for which, found, expected, what in (
    ("old", verdict.old, before.tree, f"release {before.version}"),
    ("new", verdict.new, commit.tree, f"commit {commit.id[:12]}"),
  ):
    if found != expected:
      raise VetError(
        f"the verdict is not about {what}: its {which} values are of tree "
        f"{found[:12] or 'unknown'}, expected {expected[:12]}; run the gate on "
        "the released and the committed values, or give subject= where the "
        "suite is run on something else"
      )


def _run(
  repo: Repo,
  before: Release,
  commit: Any,
  suite: Suite,
  policy: Policy | None,
  claims: Any,
  *,
  like: Any,
  progress: bool,
) -> Verdict:
  """Runs the suite on both values and stores the verdict with the commit."""
  from patchjax.vetting import gate, record, uses

  def outcomes(of: str, tree: str) -> Outcomes:
    params = repo.checkout(of, like=like)
    return suite.run(params, subject=tree, progress=progress)

  verdict = gate(
    outcomes(before.commit, before.tree),
    outcomes(commit.id, commit.tree),
    suite,
    policy,
    claims=claims,
    used=uses(repo, suite),
  )
  # Refused ones too: the ledger counts every look at the examples.
  record(repo, commit.id, verdict)
  return verdict


def _classify(
  repo: Repo,
  before: Release,
  commit: Any,
  verdict: Verdict | None,
  policy: Policy | None,
  carried: Mapping[str, str] | None,
  interface: Interface | None,
  override: str | None,
) -> Decision:
  leaves = repo.diff(before.commit, commit.id).leaves
  old_interface = None
  if before.interface is not None:
    old_interface = Interface(**before.interface)
  return versions.classify(
    repo.tree(before.commit),
    repo.tree(commit.id),
    verdict,
    policy,
    changed={x.name: x.count for x in leaves if x.kind == "changed"},
    carried=carried,
    old_interface=old_interface,
    new_interface=interface,
    override=override,
  )


def _store(repo: Repo, made: Release) -> Release:
  """Writes the note, then the tag that makes it count."""
  try:
    holder = repo.resolve(made.tag)
  except RefNotFoundError:
    holder = None
  if holder is not None:
    what = "this very commit" if holder == made.commit else holder[:12]
    raise ReleaseRefusedError(
      f"version {made.version} is taken: {made.tag} names {what}, which is no "
      "earlier release of this history; merge that commit first, or remove "
      "the tag if it names no release"
    )
  repo.annotate(made.commit, KIND, made.to_json())
  repo.tag(made.tag, made.commit)
  return made
