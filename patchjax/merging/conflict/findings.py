"""What keeps contributors from being merged at all, as findings.

Level one of `conflicts`: leaves that a contributor inserts, deletes, renames,
reshapes or casts, leaves without a mean that differ, numbers that are not
finite. `merge` raises for the first it meets; here all are listed, with what
would mend them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.merging import inputs
from patchjax.patches import checks, laws
from patchjax.patches.deltas import Delta, Rename
from patchjax.patches.patch import Patch, Structure, result_of
from patchjax.trees.digest import Entry
from patchjax.trees.dtypes import host, is_array, is_wide
from patchjax.trees.errors import StructureError
from patchjax.trees.names import named_leaves


@dataclasses.dataclass(frozen=True)
class Finding:
  """One leaf that cannot be merged as it is.

  Attributes:
    leaf: text name in the base (of an inserted leaf: in the contributor).
    kind: "inserted", "deleted", "renamed", "reshaped", "cast"; "no mean": a
      leaf that is not floating point and differs; "no array": a leaf that is
      no array and differs; "wide": 64 bits while JAX narrows them;
      "not finite".
    contributors: positions of those who do it.
    others: positions of those who change the same leaf in another way.
    detail: what was found.
    merge: what `pj.merge` does with it.
    fix: what to do about it.
  """

  leaf: str
  kind: str
  contributors: tuple[int, ...]
  others: tuple[int, ...]
  detail: str
  merge: str
  fix: str

  @property
  def blocks(self) -> bool:
    """Whether `merge` raises."""
    return self.merge.startswith("raises")


_RAISES = "raises MismatchError"
_PATCHED = "raises StructureError"
_FIXES = {
  "inserted": "add the leaf to the base and to the others, or drop it here",
  "deleted": "give it the base's leaf, or delete it in the base and the others",
  "renamed": "pj.rename the base and the others alike, or rename it back",
  "reshaped": "grow the base and the others alike, or cut it back",
  "cast": "cast the leaf back to the base's dtype",
}


def check_contributors(contributors: Sequence[Any]) -> None:
  """Refuses what is no list of contributors.

  Args:
    contributors: pytrees or patches.

  Raises:
    StructureError: if there are none.
    TypeError: if it is no list or tuple.
  """
  if not isinstance(contributors, list | tuple):
    raise TypeError(
      "contributors must be a list of pytrees or patches, got "
      f"{type(contributors).__name__}"
    )
  if not contributors:
    raise StructureError("there is nothing to compare: contributors is empty")


def examine(
  base: Mapping[str, Any], contributors: Sequence[Any], only: Any
) -> tuple[list[Finding], list[dict[str, Any]], dict[str, Any]]:
  """Returns findings, and what of the contributors can be compared.

  Args:
    base: named leaves of the base.
    contributors: pytrees or patches, fitting or not.
    only: selector of the leaves to compare, or None.

  Returns:
    `(findings, sources, floats)`: for each contributor its leaf or delta by
    name where that can be compared with the base's; the base's leaves that
    are compared.

  Raises:
    StructureError: if the base holds no arrays.
    SelectionError: if `only` picks nothing.
  """
  arrays = {name: leaf for name, leaf in base.items() if is_array(leaf)}
  if not arrays:
    raise StructureError("the base holds no arrays: nothing can be compared")
  found, sources = [], []
  for i, contributor in enumerate(contributors):
    look = _of_patch if isinstance(contributor, Patch) else _of_tree
    source, some = look(i, base, arrays, contributor)
    sources.append(source)
    found += some
  floats = inputs.floats_of(base, only)
  if only is None:
    rest = [name for name in arrays if name not in floats]
    found += _no_mean(arrays, sources, rest)
  wide = [name for name, leaf in floats.items() if is_wide(leaf)]
  found += [_wide(name, arrays[name], sources) for name in wide]
  floats = {name: x for name, x in floats.items() if name not in wide}
  return _joined(found), sources, floats


def _of_tree(i, base, arrays, tree):
  """Sources and findings of a contributor that is a pytree."""
  named = named_leaves(tree)
  given = {name: leaf for name, leaf in named.items() if is_array(leaf)}
  found = _differences(
    i,
    Structure.of(arrays).leaves,
    Structure.of(given).leaves,
    _renamed(arrays, given),
    _RAISES,
  )
  found += [
    Finding(
      name,
      "no array",
      (i,),
      (),
      f"{leaf!r} became {named[name]!r}",
      _RAISES,
      "make them equal",
    )
    for name, leaf in base.items()
    if name not in arrays and name in named and leaf != named[name]
  ]
  sources = {}
  for name, leaf in arrays.items():
    other = given.get(name)
    if other is None or other is leaf or other.shape != leaf.shape:
      continue
    if inputs.is_float(leaf) != inputs.is_float(other):
      continue
    if inputs.is_float(leaf) and other.dtype != leaf.dtype:
      other = other.astype(leaf.dtype)  # as if the finding were mended
    sources[name] = other
  return sources, found


def _of_patch(i, base, arrays, patch):
  """Sources and findings of a contributor that is a patch."""
  del base
  here = Structure.of(arrays)
  was = here if patch.structure is None else patch.structure
  renamed = {
    name: delta.to
    for name, delta in patch.deltas.items()
    if isinstance(delta, Rename)
  }
  made = dict(result_of(patch, was).leaves)
  for name, delta in patch.deltas.items():
    if isinstance(delta, Delta) and name not in made:
      made[name] = Entry("", "float32", tuple(delta.code.shape))
  raises = _PATCHED if patch.structural else _RAISES
  found = _differences(i, here.leaves, made, renamed, raises)
  sources = {}
  for name, delta in patch.deltas.items():
    if name not in arrays or not isinstance(delta, Delta):
      continue
    why = checks.misfit(delta, here.leaves[name])
    if why is None:
      sources[name] = delta
    elif not any(f.leaf == name for f in found):
      found.append(
        Finding(name, "reshaped", (i,), (), why, _RAISES, _FIXES["reshaped"])
      )
  return sources, found


def _renamed(arrays, given):
  """Guesses which leaf got which name: the only two of a shape and dtype."""
  gone = {name: x for name, x in arrays.items() if name not in given}
  new = {name: x for name, x in given.items() if name not in arrays}

  def by_kind(leaves):
    kinds: dict[Entry, list[str]] = {}
    for name, leaf in leaves.items():
      kinds.setdefault(checks.entry_of(leaf), []).append(name)
    return kinds

  after = by_kind(new)
  return {
    names[0]: after[kind][0]
    for kind, names in by_kind(gone).items()
    if len(names) == 1 == len(after.get(kind, ()))
  }


def _differences(i, old, new, renamed, raises):
  """Findings of one contributor, from two tables of leaves."""
  found = []

  def add(name, kind, detail):
    found.append(Finding(name, kind, (i,), (), detail, raises, _FIXES[kind]))

  for name, entry in old.items():
    if name in renamed:
      add(name, "renamed", f"now {renamed[name]}")
    elif name not in new:
      add(name, "deleted", _spell(entry))
    elif new[name].shape != entry.shape:
      add(name, "reshaped", f"{_spell(entry)} became {_spell(new[name])}")
    elif new[name].dtype != entry.dtype:
      add(name, "cast", f"{entry.dtype} became {new[name].dtype}")
  for name in new:
    if name not in old and name not in renamed.values():
      add(name, "inserted", _spell(new[name]))
  return found


def _spell(entry: Entry) -> str:
  return f"{entry.dtype}[{','.join(map(str, entry.shape))}]"


def _no_mean(arrays, sources, names):
  """Findings of leaves on which `inputs.agreed` would raise."""
  found = []
  for name in names:
    given = [source.get(name) for source in sources]
    if all(g is None for g in given):
      continue
    own = host(arrays[name])[0]
    bits = [
      own
      if g is None
      else host(laws.act(arrays[name], g) if isinstance(g, Delta) else g)[0]
      for g in given
    ]
    if all(np.array_equal(bits[0], other) for other in bits[1:]):
      continue
    who = [i for i, b in enumerate(bits) if not np.array_equal(b, own)]
    entry = checks.entry_of(arrays[name])
    found.append(
      Finding(
        name,
        "no mean",
        tuple(who),
        (),
        f"{_spell(entry)} differs among contributors",
        _RAISES,
        "make them equal, or leave the leaf out with only=",
      )
    )
  return found


def _wide(name, leaf, sources):
  return Finding(
    name,
    "wide",
    tuple(i for i, source in enumerate(sources) if name in source),
    (),
    f"{leaf.dtype} while JAX narrows to 32 bits",
    "raises DtypeError",
    "jax.config.update('jax_enable_x64', True), or cast, or only=",
  )


def not_finite(name: str, counts: Mapping[int, int]) -> Finding:
  """Returns the finding of a leaf with NaN or Inf in some contributors.

  Args:
    name: of the leaf.
    counts: entries that are not finite, by position of the contributor.
  """
  listed = ", ".join(f"{n:,} of contributor {i}" for i, n in counts.items())
  return Finding(
    name,
    "not finite",
    tuple(counts),
    (),
    f"NaN or Inf: {listed}",
    "raises NonFiniteError",
    "mend them, or leave the leaf out with only=",
  )


def _joined(found: Sequence[Finding]) -> list[Finding]:
  """Puts together what several contributors do to a leaf in the same way."""
  groups: dict[Any, list[Finding]] = {}
  for one in found:
    key = dataclasses.replace(one, contributors=())
    groups.setdefault(key, []).append(one)
  return [
    dataclasses.replace(
      key, contributors=tuple(i for f in group for i in f.contributors)
    )
    for key, group in groups.items()
  ]


def with_others(
  found: Sequence[Finding], changing: Mapping[str, Sequence[int]]
) -> tuple[Finding, ...]:
  """Returns findings that tell who else works on the same leaf.

  Args:
    found: the findings.
    changing: positions of those who change the numbers of a leaf, by name.
  """
  doing: dict[str, set[int]] = {}
  for one in found:
    doing.setdefault(one.leaf, set()).update(one.contributors)
  return tuple(
    dataclasses.replace(
      one,
      others=tuple(
        sorted(
          (doing[one.leaf] | set(changing.get(one.leaf, ())))
          - set(one.contributors)
        )
      ),
    )
    for one in found
  )
