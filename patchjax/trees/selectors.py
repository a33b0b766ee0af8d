"""Which leaves: regexes on text names, callables, or prefix trees of bools.

A selector never misses in silence. One that matches nothing is an error, and
`expect=` states how many leaves it should hit, so that a layer that was
renamed upstream is noticed here and not in the results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from patchjax.trees.errors import SelectionError
from patchjax.trees.names import Name, flatten, split
from patchjax.trees.suggest import did_you_mean, list_names

Selector = str | list[str] | tuple[str, ...] | Callable[[str, Any], bool] | Any
"""A regex, several, a callable, a prefix tree of bools, or None for all."""


def select(
  tree: Any, only: Selector = None, *, expect: int | None = None
) -> tuple[str, ...]:
  """Returns the text names of the leaves of a pytree that a selector picks.

  Args:
    tree: any pytree.
    only: which leaves: a regex that must match the whole text name
      (`re.fullmatch`), a list of regexes (a leaf is picked if any matches;
      each must match one), a callable `(name, leaf) -> bool`, a prefix pytree
      of bools (in any container: it is compared by name), or None for all.
    expect: the number of leaves that should be picked, if known.

  Returns:
    Text names, in tree order.

  Raises:
    SelectionError: if nothing is picked (unless `expect=0`), if the count is
      not `expect`, or if `only` is no selector for this tree.
    StructureError: if the tree is ambiguous.

  Example:
    >>> params = {"dense": {"kernel": 1.0, "bias": 2.0}, "out": {"kernel": 3.0}}
    >>> select(params, r".*/kernel", expect=2)
    ('dense/kernel', 'out/kernel')
    >>> select(params, {"dense": True, "out": False})
    ('dense/bias', 'dense/kernel')
    >>> select(params, lambda name, leaf: leaf > 1)
    ('dense/bias', 'out/kernel')
  """
  return select_named(flatten(tree)[0], only, expect=expect)


def select_named(
  named: Mapping[str, Any],
  only: Selector = None,
  *,
  expect: int | None = None,
) -> tuple[str, ...]:
  """Returns what `select` does, for leaves that are already named.

  Args:
    named: `{text name: leaf}`, as `named_leaves` gives it.
    only: see `select`.
    expect: see `select`.

  Raises:
    SelectionError: see `select`.

  Example:
    >>> select_named({"a/w": 1.0, "b/w": 2.0}, "a/.*")
    ('a/w',)
  """
  if only is None:
    picked = tuple(named)
  elif isinstance(only, str):
    picked = _by_regex(named, [only])
  elif isinstance(only, list | tuple) and only and isinstance(only[0], str):
    picked = _by_regex(named, only)
  elif callable(only) and not _is_tree_of_bools(only):
    picked = tuple(name for name, leaf in named.items() if only(name, leaf))
  else:
    picked = _by_prefix(named, only)
  wrong = len(picked) != expect if expect is not None else not picked
  if wrong and (named or expect):
    wanted = "at least 1" if expect is None else expect
    raise SelectionError(
      f"the selector {_show(only)} picks {describe(named, picked)}; "
      f"expected {wanted}\n  picked: {list_names(picked)}\n  left: "
      f"{list_names(name for name in named if name not in set(picked))}"
    )
  return picked


def describe(named: Mapping[str, Any], picked: tuple[str, ...]) -> str:
  """Returns what a selection amounts to, in words.

  Args:
    named: `{text name: leaf}`.
    picked: names in it.

  Example:
    >>> describe({"w": np.ones((2, 3)), "b": np.ones(3)}, ("w",))
    '1 of 2 leaves (6 of 9 parameters)'
  """
  size = {name: math.prod(np.shape(leaf)) for name, leaf in named.items()}
  return (
    f"{len(picked):,} of {len(named):,} leaves "
    f"({sum(size[name] for name in picked):,} of "
    f"{sum(size.values()):,} parameters)"
  )


def compile_regex(pattern: Any) -> re.Pattern[str]:
  """Returns a compiled regex, or a clear error.

  Args:
    pattern: a regex for text names.

  Raises:
    SelectionError: if it is no regex.

  Example:
    >>> bool(compile_regex("a.*").fullmatch("a/b"))
    True
  """
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as error:
    raise SelectionError(
      f"{pattern!r} is not a regex for leaf names ({error}); "
      "escape special characters with re.escape"
    ) from error


def unmatched(pattern: str, names: Mapping[str, Any] | list[str]) -> str:
  """Returns why a regex may have matched no name, and what would.

  Args:
    pattern: the regex that matched nothing.
    names: the names it was tried on.

  Example:
    >>> unmatched("kernel", ["dense/kernel"])
    "'kernel' matches no whole name; it occurs inside 1: try '.*kernel.*'"
  """
  inside = sum(bool(re.search(pattern, name)) for name in names)
  hint = (
    f"it occurs inside {inside}: try '.*{pattern}.*'"
    if inside
    else did_you_mean(pattern, names) or f"names are {list_names(names)}"
  )
  return f"{pattern!r} matches no whole name; {hint}"


def _by_regex(
  named: Mapping[str, Any], patterns: list[str] | tuple[str, ...]
) -> tuple[str, ...]:
  compiled = [compile_regex(pattern) for pattern in patterns]
  hits = {name: [r.fullmatch(name) for r in compiled] for name in named}
  idle = [
    unmatched(pattern, named)
    for i, pattern in enumerate(patterns)
    if not any(found[i] for found in hits.values())
  ]
  if idle:
    raise SelectionError("nothing to select: " + "\n  ".join(idle))
  return tuple(name for name, found in hits.items() if any(found))


def _is_tree_of_bools(only: Any) -> bool:
  # An equinox module of bools may be callable and is still a prefix tree.
  leaves = flatten(only)[0].values()
  return all(isinstance(leaf, bool | np.bool_) for leaf in leaves)


def _by_prefix(named: Mapping[str, Any], only: Any) -> tuple[str, ...]:
  mask: dict[Name, Any] = {
    split(name): flag for name, flag in flatten(only)[0].items()
  }
  if isinstance(only, bool | np.bool_):
    mask = {(): only}  # a prefix of every name
  if not mask or not _is_tree_of_bools(only):
    raise SelectionError(
      f"{_show(only)} is not a selector; give a regex, a list of regexes, "
      "a callable (name, leaf) -> bool, or a prefix tree of bools"
    )
  picked, open_, used = [], [], set()
  for text in named:
    name = split(text)
    heads = [head for n in range(len(name) + 1) if (head := name[:n]) in mask]
    used.update(heads)
    if not heads:
      open_.append(text)
    elif mask[heads[-1]]:
      picked.append(text)
  idle = ["/".join(head) for head in mask if head not in used]
  if open_ or idle:
    raise SelectionError(
      "the prefix tree of bools does not fit the tree\n"
      f"  leaves it does not reach: {list_names(open_)}\n"
      f"  entries that reach no leaf: {list_names(idle)}"
    )
  return tuple(picked)


def _show(only: Any) -> str:
  text = getattr(only, "__name__", None) or repr(only)
  return text if len(text) <= 60 else text[:57] + "..."
