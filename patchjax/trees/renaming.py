"""Other names for the same leaves: regex -> template rules.

For weights that come from other code: a `params/` prefix more or less,
`layers_0` against `layers/0`, a checkpoint older than its model.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from patchjax.trees.errors import SelectionError, StructureError
from patchjax.trees.names import nested, split
from patchjax.trees.selectors import compile_regex, unmatched

Rules = Mapping[str, str]
"""`{regex: template}`; the regex must match the whole text name."""


def rename(named: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
  r"""Returns the same leaves under new names.

  Args:
    named: `{text name: leaf}`, as `named_leaves` gives it, or the deltas of a
      patch.
    rules: `{regex: template}`. A name takes the first rule whose regex
      matches all of it; the template may refer to groups as in `re.sub`
      (`\1`, `\g<layer>`). Names that no rule matches stay.

  Returns:
    `{new name: leaf}` in the same order.

  Raises:
    SelectionError: if a rule matches no name, or is no regex or template.
    StructureError: if two leaves would get the same name, or one a name below
      another leaf. Nothing is dropped.

  Example:
    >>> rename({"params/layer_0/w": 1}, {r"params/layer_(\d+)/(.*)": r"\1/\2"})
    {'0/w': 1}
  """
  new = rename_map(named, rules)
  return {new[name]: leaf for name, leaf in named.items()}


def rename_map(names: Iterable[str], rules: Rules) -> dict[str, str]:
  """Returns `{old name: new name}`: what `rename` would do.

  Args:
    names: text names.
    rules: see `rename`.

  Raises:
    SelectionError: see `rename`.
    StructureError: see `rename`.

  Example:
    >>> rename_map(["a/w", "b"], {"a/(.*)": r"x/\\1"})
    {'a/w': 'x/w', 'b': 'b'}
  """
  names = list(names)
  compiled = {rule: compile_regex(rule) for rule in rules}
  # A rule that an earlier one shadows everywhere is as idle as one that
  # matches nothing.
  new, used = {}, set()
  for name in names:
    new[name] = name
    for rule, regex in compiled.items():
      if match := regex.fullmatch(name):
        new[name] = _expand(match, rule, rules[rule])
        used.add(rule)
        break
  idle = [rule for rule in rules if rule not in used]
  if idle:
    raise SelectionError(
      f"{len(idle)} of {len(rules)} renaming rules rename nothing:\n"
      + "\n".join(f"  {_idle(rule, names)}" for rule in idle)
    )
  counts = collections.Counter(new.values())
  if len(counts) != len(new):
    raise StructureError(
      "the renaming gives several leaves one name:\n"
      + "\n".join(
        f"  {old} -> {to}" for old, to in new.items() if counts[to] > 1
      )
      + "\nmake the templates tell them apart"
    )
  # Refuses a leaf that would also be the parent of others.
  nested(dict.fromkeys(counts))
  return new


def _idle(rule: str, names: list[str]) -> str:
  if any(re.fullmatch(rule, name) for name in names):
    return f"{rule!r} comes after rules that match all it does; move it up"
  return unmatched(rule, names)


def _expand(match: re.Match[str], rule: str, template: str) -> str:
  try:
    text = match.expand(template)
  except (re.error, IndexError) as error:
    raise SelectionError(
      f"the template {template!r} does not fit the regex {rule!r}: {error}"
    ) from error
  split(text)  # must be a name
  return text
