"""Do two trees fit: every bad leaf at once, with what would mend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from patchjax.trees.digest import Entry
from patchjax.trees.dtypes import KINDS, dtype_name, is_array
from patchjax.trees.errors import MismatchError
from patchjax.trees.names import flatten
from patchjax.trees.suggest import did_you_mean


def check_compatible(
  expected: Any,
  found: Any,
  *,
  missing: Literal["error", "keep"] = "error",
  extra: Literal["error", "ignore"] = "error",
  dtype: bool = True,
  shape: bool = True,
  what: str = "the tree",
) -> tuple[str, ...]:
  """Checks that one pytree has the leaves that another has.

  Containers may differ: leaves are compared by name. Leaves that are no
  arrays (functions, Python numbers) are left out.

  Args:
    expected: the pytree that sets names, shapes and dtypes: arrays or
      `ShapeDtypeStruct`s.
    found: the pytree to check.
    missing: what to do with leaves that only `expected` has: refuse them, or
      "keep" those of `expected`.
    extra: what to do with leaves that only `found` has.
    dtype: whether dtypes must agree.
    shape: whether shapes must agree.
    what: what `found` is, for the message.

  Returns:
    The names that both have, in the order of `expected`.

  Raises:
    MismatchError: with every bad leaf on a line: ` - ` is what was expected,
      ` + ` what was found.
    StructureError: if one of the trees is ambiguous.

  Example:
    >>> x = np.zeros((2, 3), np.float32)
    >>> check_compatible({"w": x, "b": x}, {"w": x}, missing="keep")
    ('w',)
    >>> check_compatible({"kernel": x}, {"kernle": x})
    Traceback (most recent call last):
    ...
    patchjax.trees.errors.MismatchError: the tree does not fit: of 1 ...
     - kernel: float32[2,3]
     + kernle: float32[2,3]  did you mean 'kernel'?
    ...
  """
  return check_named(
    flatten(expected)[0],
    flatten(found)[0],
    missing=missing,
    extra=extra,
    dtype=dtype,
    shape=shape,
    what=what,
  )


def check_named(
  expected: Mapping[str, Any],
  found: Mapping[str, Any],
  *,
  missing: Literal["error", "keep"] = "error",
  extra: Literal["error", "ignore"] = "error",
  dtype: bool = True,
  shape: bool = True,
  what: str = "the tree",
) -> tuple[str, ...]:
  """Checks what `check_compatible` does, for leaves already named.

  Args:
    expected: `{text name: leaf}`; leaves are arrays, `ShapeDtypeStruct`s or
      tree entries.
    found: the same.
    missing: see `check_compatible`.
    extra: see `check_compatible`.
    dtype: see `check_compatible`.
    shape: see `check_compatible`.
    what: see `check_compatible`.

  Raises:
    MismatchError: see `check_compatible`.

  Example:
    >>> check_named({"w": Entry("", "int8", (3,))}, {"w": np.zeros(3, np.int8)})
    ('w',)
  """
  for option, given, allowed in (
    ("missing", missing, ("error", "keep")),
    ("extra", extra, ("error", "ignore")),
  ):
    if given not in allowed:
      raise ValueError(f"{option}={given!r}: expected one of {allowed}")
  expected, found = _arrays(expected), _arrays(found)
  absent = [name for name in expected if name not in found]
  surplus = [name for name in found if name not in expected]
  both = tuple(name for name in expected if name in found)
  lines, counts = [], {}
  if absent and missing == "error":
    counts["missing"] = len(absent)
    lines += [(name, "-", _spell(expected[name]), "") for name in absent]
  if surplus and extra == "error":
    counts["extra"] = len(surplus)
    lines += [
      (name, "+", _spell(found[name]), did_you_mean(name, absent or expected))
      for name in surplus
    ]
  for name in both:
    if _alike(expected[name], found[name]):
      continue
    old, new = _facts(expected[name]), _facts(found[name])
    wrong = [
      kind
      for kind, asked, i in (("dtype", dtype, 0), ("shape", shape, 1))
      if asked and old[i] != new[i]
    ]
    for kind in wrong:
      counts[f"of another {kind}"] = counts.get(f"of another {kind}", 0) + 1
    if wrong:
      lines.append((name, "-", _spell(expected[name]), ""))
      note = f"another {' and '.join(wrong)}"
      lines.append((name, "+", _spell(found[name]), note))
  if lines:
    raise MismatchError(_message(what, expected, found, lines, counts))
  return both


def _arrays(named: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: leaf
    for name, leaf in named.items()
    if isinstance(leaf, Entry) or is_array(leaf)
  }


def _alike(old: Any, new: Any) -> bool:
  """Whether two leaves have one plain dtype and one shape, found out fast."""
  dtype = getattr(old, "dtype", None)
  return (
    isinstance(dtype, np.dtype)
    and dtype in _PLAIN
    and dtype == getattr(new, "dtype", None)
    and old.shape == new.shape
  )


_PLAIN = {kind.dtype for kind in KINDS.values()}


def _facts(leaf: Any) -> tuple[str, tuple[int, ...]]:
  if isinstance(leaf, Entry):
    return leaf.dtype, leaf.shape
  return dtype_name(leaf), tuple(np.shape(leaf))


def _spell(leaf: Any) -> str:
  dtype, shape = _facts(leaf)
  return f"{dtype}[{','.join(map(str, shape))}]"


def _message(
  what: str,
  expected: Mapping[str, Any],
  found: Mapping[str, Any],
  lines: list[tuple[str, str, str, str]],
  counts: Mapping[str, int],
) -> str:
  fixes = []
  if "missing" in counts and "extra" in counts:
    fixes.append("rename leaves with patchjax.trees.rename")
  if "missing" in counts:
    fixes.append('leave leaves as they are with missing="keep"')
  if "extra" in counts:
    fixes.append('drop leaves with extra="ignore"')
  if any(count.startswith("of another") for count in counts):
    fixes.append("convert or reshape the leaves before the call")
  # Stable by name, so that a leaf's two lines and close names stand together.
  lines = sorted(lines, key=lambda line: line[0])
  return (
    f"{what} does not fit: of {len(expected):,} leaves expected and "
    f"{len(found):,} found, "
    + ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    + "\n"
    + "\n".join(
      f" {sign} {name}: {spelled}  {note}".rstrip()
      for name, sign, spelled, note in lines
    )
    + "\nto mend it: "
    + "; or ".join(fixes)
  )
