"""Recipes: how a merge was computed, and computing it again.

The value of a merge commit is stored; its recipe is provenance: the method's
spec, its numbers (PRNG keys among them, large statistics by digest), the base
and the contributors, the backend and the versions of what computed it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.trees.errors import FormatError, RepositoryError

if TYPE_CHECKING:
  from patchjax.history.repo import Repo

_VERSIONED = ("patchjax", "jax", "jaxlib", "numpy", "orbax-checkpoint")
_SPELLED = 1024  # entries of arrays that are written out


@dataclasses.dataclass(frozen=True)
class Replay:
  """What came of computing a merge again.

  Attributes:
    commit: id of the merge commit.
    tree: id of its value.
    found: id of the value computed now.
    differing: names of the leaves in which they differ.
    changed: `{what: (then, now)}` of the backend and the versions that differ.
  """

  commit: str
  tree: str
  found: str
  differing: tuple[str, ...]
  changed: dict[str, tuple[str | None, str | None]]

  @property
  def same(self) -> bool:
    """Whether the value is the same, to the bit."""
    return self.tree == self.found

  def to_json(self) -> dict[str, Any]:
    """Returns the findings as a JSON-able dict."""
    return {**dataclasses.asdict(self), "same": self.same}

  def __str__(self) -> str:
    lines = [
      f"merge {self.commit[:12]}: "
      + (
        f"gives the same value again, {self.tree[:12]}"
        if self.same
        else f"expected the value {self.tree[:12]}, found {self.found[:12]}"
      )
    ]
    if self.differing:
      lines.append(
        f"  {len(self.differing)} leaves differ: {', '.join(self.differing)}"
      )
    lines += [
      f"  {name}: {then} then, {now} now"
      for name, (then, now) in self.changed.items()
    ]
    return "\n".join(lines)


def of_merge(
  method: Any, base: str, contributors: Sequence[str], one_sided: str
) -> dict[str, Any]:
  """Returns the account of a merge; enough to compute it again.

  Args:
    method: the merge method.
    base: id of the base.
    contributors: ids of the versions that contributed.
    one_sided: see `Repo.merge`.
  """
  return {
    "kind": "merge",
    **of_method(method),
    "base": base,
    "contributors": list(contributors),
    "one_sided": one_sided,
    **_surroundings(),
  }


def of_method(method: Any) -> dict[str, Any]:
  """Returns a merge method as JSON: its spec and its numbers.

  Args:
    method: the merge method.
  """
  return {"spec": _plain(method.spec), "numbers": _plain(method.numbers)}


def method_of(recipe: Mapping[str, Any], method: Any = None) -> Any:
  """Returns the merge method of a recipe.

  Args:
    recipe: recipe of a merge commit.
    method: the method, if some of its statistics are known by digest only.

  Raises:
    RepositoryError: if the recipe is that of no merge, or lacks statistics.
    FormatError: if `method` is not the one of the recipe, or the recipe
      names a step that is not known here.

  Example:
    >>> import patchjax as pj
    >>> method = pj.merging.ties(density=0.3)
    >>> recipe = of_merge(method, "", [], "take")
    >>> method_of(recipe).spec == method.spec
    True
  """
  from patchjax import merging  # its steps are known from here on
  from patchjax.patches import from_spec

  del merging
  if recipe.get("kind") != "merge":
    raise RepositoryError(
      f"expected the recipe of a merge, found one of {recipe.get('kind')!r}"
    )
  if method is not None:
    for what, found in of_method(method).items():
      expected = recipe[what]
      if expected != found:
        raise FormatError(
          f"the method has another {what} than the recipe: expected "
          f"{expected}, found {found}"
        )
    return method
  return from_spec(recipe["spec"], _restored(recipe["numbers"]))


def replay(repo: Repo, ref: str = "main", *, method: Any = None) -> Replay:
  """Computes a merge commit again from its recipe.

  On the same backend and versions the value is the same to the bit; whether
  it is, and what has changed since, is what this answers. Nothing is stored.

  Args:
    repo: the repository.
    ref: the merge commit.
    method: the method, if its statistics are larger than a recipe holds: of
      these the recipe has the digests, and they are compared.

  Raises:
    RepositoryError: if the commit has no recipe of a merge.
    FormatError: if `method` is not the one of the recipe.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> from patchjax.history import Repo
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit({"w": np.float32([0])}, message="start")
    ...   for i, name in enumerate("xy"):
    ...     commit = repo.branch(name)
    ...     tuned = {"w": np.float32([i + 1])}
    ...     commit = repo.commit(tuned, message=name, branch=name)
    ...   commit = repo.merge("main", ["x", "y"], method=pj.merging.ties())
    ...   repo.replay().same
    True
  """
  from patchjax.history.arrays.values import Values
  from patchjax.history.commits.merges import merged
  from patchjax.trees.digest import tree_objects

  commit = repo.show(ref)
  recipe = commit.recipe
  if recipe is None:
    raise RepositoryError(
      f"commit {commit.id[:12]} has no recipe: only merges can be replayed"
    )
  found = merged(
    Values(repo),
    repo.tree(recipe["base"]),
    {side: repo.tree(side) for side in recipe["contributors"]},
    method_of(recipe, method),
    recipe.get("one_sided", "take"),
  )
  expected = repo.objects.tree(commit.tree)
  now = _surroundings()
  then = {"backend": recipe.get("backend"), **recipe.get("versions", {})}
  today = {"backend": now["backend"], **now["versions"]}
  return Replay(
    commit=commit.id,
    tree=commit.tree,
    found=tree_objects(found)[0],
    differing=tuple(
      name
      for name in sorted({*expected, *found})
      if expected.get(name) != found.get(name)
    ),
    changed={
      name: (then.get(name), today.get(name))
      for name in {**then, **today}
      if then.get(name) != today.get(name)
    },
  )


def _surroundings() -> dict[str, Any]:
  import jax

  versions = {name: _version(name) for name in _VERSIONED}
  return {
    "backend": jax.default_backend(),
    "versions": {name: v for name, v in versions.items() if v is not None},
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None  # run from a source tree


def _plain(value: Any) -> Any:
  """Returns a spec or numbers as JSON.

  Python numbers stay what they are; an array says its dtype, and a large one
  (a Fisher diagonal) only its digest.
  """
  from patchjax.trees import dtypes
  from patchjax.trees.digest import entry

  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if dataclasses.is_dataclass(value):
    return _summary(value)
  if not dtypes.is_array(value):
    return value
  found = entry(value)
  spelled = {"dtype": found.dtype, "shape": list(found.shape)}
  if found.size > _SPELLED:
    return {**spelled, "digest": found.digest}
  return {**spelled, "words": dtypes.host(value)[0].reshape(-1).tolist()}


def _summary(value: Any) -> dict[str, Any]:
  """Returns numbers by leaf (`PerLeaf`), and statistics in them, by digest."""
  import hashlib

  import jax

  from patchjax.trees.digest import canonical_json

  leaves, treedef = jax.tree_util.tree_flatten_with_path(value)
  table = [[jax.tree_util.keystr(path), _plain(x)] for path, x in leaves]
  spelled = canonical_json([str(treedef), table])
  return {
    "dtype": type(value).__name__,
    "shape": [len(leaves)],
    "digest": hashlib.sha256(spelled).hexdigest(),
  }


def _restored(value: Any) -> Any:
  """Returns numbers as they were; inverse of `_plain`."""
  import jax.numpy as jnp
  import numpy as np

  from patchjax.trees import dtypes

  if isinstance(value, list):
    return [_restored(item) for item in value]
  if not isinstance(value, Mapping):
    return value
  if "dtype" not in value:
    return {key: _restored(item) for key, item in value.items()}
  if "digest" in value:
    raise RepositoryError(
      f"the recipe has an array {value['dtype']}{value['shape']} by its "
      f"digest {value['digest'][:12]} only: give the method with its "
      "statistics (method=)"
    )
  kind = dtypes.KINDS.get(value["dtype"])
  word = np.dtype(np.uint32) if kind is None else kind.word
  flat = np.asarray(value["words"], word)
  many = 1 if kind is None else kind.words
  shape = tuple(value["shape"])
  if kind is None or many > 1:
    shape = (*shape, flat.size // max(1, int(np.prod(shape))))
  x = dtypes.device(flat.reshape(shape), value["dtype"])
  return x if kind is None or dtypes.is_wide(x) else jnp.asarray(x)
