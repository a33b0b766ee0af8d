"""Semantic versions of models: computed from structure and evidence.

A program's author says whether a change is compatible. Of a model it can be
computed: which leaves survive, how many of their bits changed, and whether the
protected tests still pass. `classify` does; the rules are in its docstring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import semver

from patchjax.trees.errors import FormatError
from patchjax.trees.suggest import list_names

if TYPE_CHECKING:
  from patchjax.trees.digest import Entry
  from patchjax.vetting.policy import Policy
  from patchjax.vetting.verdict import Verdict

FIRST = "1.0.0"
"""The version of a first release."""

PATCH, MINOR, MAJOR, REFUSED = "patch", "minor", "major", "refused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interface:
  """What a model takes and gives, as far as its users depend on it.

  Attributes:
    inputs: a description by input name, such as `{"tokens": "i32[b,t]"}`.
    outputs: the same for outputs.
    tokenizer: digest of the tokenizer, or "" without one.

  Example:
    >>> old = Interface(inputs={"rgb": "f32[h,w,3]", "depth": "f32[h,w]"})
    >>> new = Interface(inputs={"rgb": "f32[h,w,3]"})
    >>> old.broken_by(new), old.widened_by(new)
    (["input 'depth' is removed"], [])
  """

  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tokenizer: str = ""

  def broken_by(self, new: Interface) -> list[str]:
    """What no longer works with a new interface, as sentences."""
    found = []
    for kind in ("input", "output"):
      before, after = getattr(self, f"{kind}s"), getattr(new, f"{kind}s")
      for name, form in before.items():
        if name not in after:
          found.append(f"{kind} {name!r} is removed")
        elif after[name] != form:
          found.append(f"{kind} {name!r} is {after[name]}, was {form}")
    if self.tokenizer and self.tokenizer != new.tokenizer:
      found.append("the tokenizer is another")
    return found

  def widened_by(self, new: Interface) -> list[str]:
    """What a new interface adds, as sentences."""
    return [
      f"{kind} {name!r} is new"
      for kind in ("input", "output")
      for name in getattr(new, f"{kind}s")
      if name not in getattr(self, f"{kind}s")
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """The kind of release that a candidate has earned.

  Attributes:
    level: "patch", "minor", "major" or "refused".
    structural: the level that structure alone would give.
    retained: share of the old entries that survive by name or declared map.
    changed: share of the retained entries whose bits differ.
    reasons: why, as sentences.
  """

  level: str
  structural: str
  retained: float
  changed: float
  reasons: tuple[str, ...]

  @property
  def refused(self) -> bool:
    """Whether nothing may be released."""
    return self.level == REFUSED


def parse(text: str) -> semver.Version:
  """Reads a semantic version, with or without the `v` of a tag.

  Args:
    text: such as `1.0.1`, `v1.0.1` or `1.1.0-rc.1+int8`.

  Returns:
    The version: it orders and prints by semver.org 2.0.0.

  Raises:
    FormatError: if it is none.

  Example:
    >>> parse("v1.0.0") < parse("1.0.1"), parse("1.0.0-rc.1") < parse("1.0.0")
    (True, True)
  """
  try:
    return semver.Version.parse(text.removeprefix("v"))
  except (TypeError, ValueError) as error:
    raise FormatError(
      f"{text!r} is not a semantic version; write it as MAJOR.MINOR.PATCH, "
      "such as 1.0.1"
    ) from error


def tag_of(version: semver.Version | str) -> str:
  """The name of the tag of a version.

  Example:
    >>> tag_of("1.0.1")
    'v1.0.1'
  """
  return f"v{version}"


def bump(version: semver.Version | str, level: str) -> semver.Version:
  """The next version of a level.

  Args:
    version: the previous one.
    level: "patch", "minor" or "major".

  Raises:
    ValueError: for another level.

  Example:
    >>> [str(bump("1.2.3", level)) for level in ("patch", "minor", "major")]
    ['1.2.4', '1.3.0', '2.0.0']
  """
  if level not in (PATCH, MINOR, MAJOR):
    raise ValueError(f"level must be patch, minor or major, got {level!r}")
  return parse(str(version)).next_version(level)


def classify(
  old: Mapping[str, Entry],
  new: Mapping[str, Entry],
  verdict: Verdict | None,
  policy: Policy | None = None,
  *,
  changed: Mapping[str, int] | None = None,
  carried: Mapping[str, str] | None = None,
  old_interface: Interface | None = None,
  new_interface: Interface | None = None,
  override: str | None = None,
) -> Decision:
  """Computes the kind of release from structure and evidence.

  An old leaf is *retained* if the new tree has one of its name and shape, or
  if `carried` maps it onto one (a renaming, or a declared growth, in which
  case shapes may differ). All shares are by number of entries.

  - MAJOR: an input or output is removed or described otherwise, the tokenizer
    changed, or less than half of the old entries are retained.
  - MINOR: leaves, names, shapes or dtypes differ otherwise, an input or output
    is added, or more than `policy.changed` of the entries changed.
  - PATCH: the same names, shapes and dtypes, and not more than that changed.

  Whatever the level, the verdict must be "accepted"; else the candidate is
  refused, unless a maintainer overrides that in writing, into a MAJOR.

  Args:
    old: entries of the previous release by leaf name.
    new: entries of the candidate.
    verdict: result of the gate, candidate against previous release; None if it
      was not tested.
    policy: default that of the verdict, or `Policy()`.
    changed: number of entries whose bits differ, by leaf name, of leaves that
      both have; a leaf of other digest that is not listed counts as changed
      altogether.
    carried: old name -> new name of leaves that moved or grew.
    old_interface: interface of the previous release.
    new_interface: interface of the candidate; without both it is not compared.
    override: a maintainer's reason to release in spite of the verdict.

  Returns:
    A `Decision`.

  Raises:
    ValueError: if `carried` names leaves that do not exist, `changed` has
      impossible numbers, or `override` is blank.

  Example:
    >>> from patchjax.trees.digest import Entry
    >>> base = {"w": Entry(digest="aa", dtype="float32", shape=(4, 4))}
    >>> tuned = {"w": Entry(digest="bb", dtype="float32", shape=(4, 4))}
    >>> classify(base, tuned, None, changed={"w": 2}).structural
    'patch'
    >>> classify(base, tuned, None, changed={"w": 2}).level
    'refused'
  """
  if override is not None and not override.strip():
    raise ValueError("an override needs a reason in writing, got a blank one")
  if policy is None:
    from patchjax.vetting.policy import Policy

    policy = verdict.policy if verdict is not None else Policy()
  pairs = _pairs(old, new, dict(carried or {}))
  entries = sum(entry.size for entry in old.values())
  kept = sum(old[name].size for name in pairs)
  retained = kept / entries if entries else 1.0
  count = _changed(old, new, pairs, dict(changed or {}))
  share = count / kept if kept else 0.0
  structural, reasons = _structure(
    old, new, pairs, retained, share, policy, old_interface, new_interface
  )
  level, more = _evidence(structural, verdict, override)
  return Decision(
    level=level,
    structural=structural,
    retained=retained,
    changed=share,
    reasons=(*reasons, *more),
  )


def _pairs(
  old: Mapping[str, Entry], new: Mapping[str, Entry], carried: dict[str, str]
) -> dict[str, str]:
  """Old name -> new name of the retained leaves."""
  unknown = [f"{a} -> {b}" for a, b in carried.items() if a not in old]
  unknown += [f"{a} -> {b}" for a, b in carried.items() if b not in new]
  if unknown:
    raise ValueError(
      f"carried names leaves that do not exist: {list_names(unknown)}; it maps "
      "leaves of the old tree to leaves of the new one"
    )
  if len(set(carried.values())) < len(carried):
    raise ValueError("carried maps two leaves onto one")
  pairs = dict(carried)
  taken = set(carried.values())
  for name, entry in old.items():
    if name in carried or name in taken or name not in new:
      continue
    if tuple(new[name].shape) == tuple(entry.shape):
      pairs[name] = name
  return pairs


def _changed(
  old: Mapping[str, Entry],
  new: Mapping[str, Entry],
  pairs: Mapping[str, str],
  counts: Mapping[str, int],
) -> int:
  """The number of retained entries whose bits differ."""
  total = 0
  for before, after in pairs.items():
    a, b = old[before], new[after]
    if a.digest == b.digest:
      continue
    comparable = a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)
    count = counts.get(after, a.size) if comparable else a.size
    if not 0 <= count <= a.size:
      raise ValueError(
        f"changed[{after!r}] is {count}, but the leaf has {a.size} entries"
      )
    total += count
  return total


def _structure(
  old: Mapping[str, Entry],
  new: Mapping[str, Entry],
  pairs: Mapping[str, str],
  retained: float,
  changed: float,
  policy: Policy,
  old_interface: Interface | None,
  new_interface: Interface | None,
) -> tuple[str, list[str]]:
  """The level that names, shapes, dtypes and interface give, and why."""
  widened: list[str] = []
  if old_interface is not None and new_interface is not None:
    broken = old_interface.broken_by(new_interface)
    if broken:
      return MAJOR, broken
    widened = old_interface.widened_by(new_interface)
  if retained < 0.5:
    return MAJOR, [f"only {retained:.1%} of the old parameters are retained"]

  reasons = list(widened)
  added = [name for name in new if name not in pairs.values()]
  gone = [name for name in old if name not in pairs]
  moved = [f"{a} -> {b}" for a, b in pairs.items() if a != b]
  grown = [
    a for a, b in pairs.items() if tuple(old[a].shape) != tuple(new[b].shape)
  ]
  recast = [
    f"{b} ({old[a].dtype} -> {new[b].dtype})"
    for a, b in pairs.items()
    if old[a].dtype != new[b].dtype
  ]
  for what, names in (
    ("added", added),
    ("gone or of another shape", gone),
    ("carried to another name", moved),
    ("grown", grown),
    ("of another dtype", recast),
  ):
    if names:
      reasons.append(f"{len(names)} leaves {what}: {list_names(names)}")
  if reasons:
    return MINOR, reasons
  if changed > policy.changed:
    return MINOR, [
      f"{changed:.1%} of the entries changed, a PATCH allows "
      f"{policy.changed:.1%}"
    ]
  return PATCH, [f"same structure, {changed:.2%} of the entries changed"]


def _evidence(
  structural: str, verdict: Verdict | None, override: str | None
) -> tuple[str, list[str]]:
  """What the verdict makes of the structural level, and why."""
  if verdict is not None and verdict.accepted:
    return structural, [f"suite {verdict.suite}: accepted"]
  if verdict is None:
    reasons = ["not tested: run a gate against the previous release"]
  else:
    reasons = [f"suite {verdict.suite}: {verdict.outcome}", *verdict.reasons]
  if override is None:
    return REFUSED, reasons
  return MAJOR, [*reasons, f"overridden by a maintainer: {override.strip()}"]


def interface_json(interface: Interface | None) -> dict[str, Any] | None:
  """The interface as JSON values, to be stored with a release."""
  return None if interface is None else dataclasses.asdict(interface)
