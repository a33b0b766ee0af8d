"""Canonical leaf names: one identity for a leaf, whatever holds it.

A name is a tuple of strings, one part a level. Its text form joins the parts
with `/`, escaped as in JSON Pointer (RFC 6901): `~` is `~0`, a `/` inside a
part is `~1`; an empty part is `~2`. A `.value` *attribute* (the box of a flax
variable) is dropped where it is its parent's only child, so that a flax
Module, its State and the pure dict of the same model share their names.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from patchjax.trees.errors import StructureError

# jax is imported by the functions that need it: a history can be listed, and
# its names read, without.

Leaf = Any
Name = tuple[str, ...]


def join(parts: Iterable[str]) -> str:
  """Returns the text form of a name.

  Args:
    parts: the name, one string a level.

  Example:
    >>> join(("mlp/~/linear_0", "w"))
    'mlp~1~0~1linear_0/w'
  """
  return "/".join(
    part.replace("~", "~0").replace("/", "~1") if part else "~2"
    for part in parts
  )


def split(text: str) -> Name:
  """Returns the name whose text form is `text`; the inverse of `join`.

  Args:
    text: a text name.

  Raises:
    StructureError: if `text` holds an escape that `join` never writes.

  Example:
    >>> split("mlp~1~0~1linear_0/w")
    ('mlp/~/linear_0', 'w')
  """
  parts = tuple(
    "" if part == "~2" else part.replace("~1", "/").replace("~0", "~")
    for part in text.split("/")
  )
  if join(parts) != text:
    raise StructureError(
      f"{text!r} is not a leaf name: '~' must be written '~0', and a '/' "
      "inside a part '~1' (patchjax.trees.join does it)"
    )
  return parts


def part_of(key: Any) -> str:
  """Returns the part of a name that one entry of a JAX key path stands for.

  Args:
    key: `DictKey`, `SequenceKey`, `GetAttrKey` or `FlattenedIndexKey`.

  Example:
    >>> import jax
    >>> part_of(jax.tree_util.SequenceKey(3))
    '3'
  """
  import jax

  match key:
    case jax.tree_util.DictKey(key=part):
      return str(part)
    case jax.tree_util.SequenceKey(idx=part):
      return str(part)
    case jax.tree_util.GetAttrKey(name=part):
      return part
    case jax.tree_util.FlattenedIndexKey(key=part):
      return str(part)
  return str(key)


def _canonical(paths: Sequence[tuple[Any, ...]]) -> list[Name]:
  """Returns the name of each key path, boxes dropped."""
  import jax

  children = collections.defaultdict(set)
  for path in paths:
    for depth, key in enumerate(path):
      children[path[:depth]].add(key)
  box = jax.tree_util.GetAttrKey("value")
  # A bare array has no path: it goes by the empty part.
  return [
    tuple(
      part_of(key)
      for depth, key in enumerate(path)
      if not (key == box and depth and len(children[path[:depth]]) == 1)
    )
    or ("",)
    for path in paths
  ]


def flatten(tree: Any) -> tuple[dict[str, Leaf], Any]:
  """Returns the leaves of a pytree under their text names, and its treedef.

  Args:
    tree: any pytree.

  Returns:
    `({text name: leaf}, treedef)`, in the order of the treedef, so that
    `jax.tree.unflatten(treedef, named.values())` gives the tree back.

  Raises:
    StructureError: if two leaves would get the same name.

  Example:
    >>> import jax
    >>> named, treedef = flatten({"dense": {"kernel": 1, "bias": 2}})
    >>> named
    {'dense/bias': 2, 'dense/kernel': 1}
    >>> jax.tree.unflatten(treedef, named.values())
    {'dense': {'bias': 2, 'kernel': 1}}
  """
  import jax

  try:
    leaves, treedef = jax.tree.flatten(tree)
    known = _known(treedef)
    if known is not None:
      return dict(zip(known, leaves, strict=True)), treedef
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
  except ValueError as error:
    # JAX sorts the keys of a dict, and cannot compare 1 with "1".
    raise StructureError(
      f"the tree cannot be flattened: {str(error).splitlines()[0]} A dict must "
      "not mix integer and string keys; make them all strings"
    ) from error
  names = [join(name) for name in _canonical([path for path, _ in found])]
  named = dict(zip(names, (leaf for _, leaf in found), strict=True))
  if len(named) != len(names):
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    raise StructureError(
      "ambiguous tree: several leaves share a name\n"
      + "\n".join(
        f"  {name}: "
        + ", ".join(
          jax.tree_util.keystr(path)
          for (path, _), n in zip(found, names, strict=True)
          if n == name
        )
        for name in twice
      )
      + "\nkeys are compared as strings; rename one of each"
    )
  with contextlib.suppress(TypeError):
    if len(_NAMES) >= _MOST:
      _NAMES.clear()
    _NAMES[treedef] = names
  return named, treedef


# Making names takes longer than flattening, and models of one structure are
# named again and again.
_NAMES: dict[Any, list[str]] = {}
_MOST = 64


def _known(treedef: Any) -> list[str] | None:
  """Returns the names of the leaves of a structure seen before."""
  try:
    return _NAMES.get(treedef)
  except TypeError:  # a container whose static part has no hash
    return None


def named_leaves(tree: Any) -> dict[str, Leaf]:
  """Returns `{text name: leaf}` of a pytree, in tree order; see `flatten`.

  Args:
    tree: any pytree.

  Raises:
    StructureError: if two leaves would get the same name.

  Example:
    >>> named_leaves([{"w": 1.0}, {"w": 2.0}])
    {'0/w': 1.0, '1/w': 2.0}
  """
  return flatten(tree)[0]


def nested(named: Mapping[str, Leaf]) -> Any:
  """Returns nested dicts with these leaves; the inverse for trees of dicts.

  Args:
    named: `{text name: leaf}`.

  Raises:
    StructureError: if a name is both a leaf and the parent of another.

  Example:
    >>> nested({"dense/kernel": 1, "dense/bias": 2})
    {'dense': {'kernel': 1, 'bias': 2}}
  """
  root: dict[str, Any] = {}
  folders: dict[Name, dict[str, Any]] = {(): root}
  leaves = set()
  for text, leaf in named.items():
    *parents, last = split(text)
    folder = root
    for depth, part in enumerate(parents, 1):
      path = tuple(parents[:depth])
      if path not in folders:
        if path in leaves:
          raise StructureError(_both(join(path), text))
        folders[path] = folder[part] = {}
      folder = folders[path]
    path = (*parents, last)
    if path in folders:
      raise StructureError(_both(join(path), text))
    leaves.add(path)
    folder[last] = leaf
  return root


def _both(parent: str, text: str) -> str:
  return (
    f"{parent!r} is a leaf and also holds others ({text!r}); rename one of them"
  )
