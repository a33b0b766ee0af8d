"""merge and combine: contributors and a method give a value, or a patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from patchjax.merging import inputs
from patchjax.patches import engine, leafwise
from patchjax.patches.codes import Dense
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform
from patchjax.trees.errors import BaseMismatchError, StructureError
from patchjax.trees.names import flatten


def merge(
  base: Any,
  contributors: Sequence[Any],
  method: Transform,
  *,
  state: Any = None,
  only: Any = None,
  donate: bool = False,
) -> Any:
  """Returns the base with the contributors' changes merged into it.

  Each contributor counts through its task vector `f32(x) - f32(base)`; the
  sum is rounded once, to the leaf's dtype. The result has the same bits
  eagerly, inside `jit` (where the method may be an argument), on any mesh,
  and from files (`merge_files`). With a Python density under `jit`, which
  sees float32, this holds for densities of up to six decimals. Differentiable
  in base, contributors, weights, scale; `vmap` over numbers of the method.

  Floating point leaves are merged. In all others the contributors must agree;
  inside `jit`, where that cannot be seen, the base's are kept. A leaf that no
  contributor changes is the same object. Every contributor given is counted.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    method: a transform with a reducing step, e.g. `pj.merging.ties()`.
    state: of each of its steps, as `method.init(base)` makes it, to learn or
      replace the numbers; by default the method's own.
    only: selector of the leaves to merge; the others stay the base's.
    donate: whether the merged leaves of `base` may be overwritten: the fast
      path outside `jit` (inside, donate at the outer `jit`).

  Returns:
    A pytree of the structure, shapes, dtypes and shardings of `base`.

  Raises:
    MismatchError: if a contributor does not fit, or contributors disagree in
      a leaf that is not floating point; lists every leaf.
    NonFiniteError: outside `jit`, if NaN or Inf is found; names the leaves.
    DtypeError: for 64-bit leaves while JAX narrows them.
    ValueError: if the method has no reducing step.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x, 1])} for x in (0, 1, 3))
    >>> pj.merge(base, [a, b], pj.merging.linear())["w"].tolist()
    [2.0, 1.0]
  """
  check_reducing(method, len(contributors))
  named, treedef = flatten(base)
  sources = inputs.sources_of(named, contributors)
  floats = inputs.floats_of(named, only)
  changed = dict(named)
  if only is None:
    rest = [n for n in named if n not in floats and inputs.is_array(named[n])]
    changed |= inputs.agreed(named, sources, rest)
  changed |= dict(_run(floats, sources, method, state, True, donate))
  return jax.tree.unflatten(treedef, changed.values())


def combine(
  patches: Sequence[Patch],
  method: Transform,
  *,
  base: Any = None,
  state: Any = None,
  only: Any = None,
) -> Patch:
  """Returns the one patch that patches on the same base merge to.

  Args:
    patches: patches on one base.
    method: a transform with a reducing step.
    base: the base; needed only for laws other than `add`.
    state: see `merge`.
    only: selector of the leaves to merge; the others are left out.

  Returns:
    A patch of law `add`, float32; `apply(base, ...)` of it is what `merge`
    gives. Compress it to make it small.

  Raises:
    BaseMismatchError: if the patches say that their bases differ.
    MismatchError: if they do not fit each other.
    StructureError: if a base is needed.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (0, 1, 3))
    >>> both = [pj.diff(base, a), pj.diff(base, b)]
    >>> mean = pj.merging.combine(both, pj.merging.linear())
    >>> mean.deltas["w"].code.values.tolist()
    [2.0]
  """
  check_reducing(method, len(patches))
  digests = {patch.base for patch in patches} - {None}
  if len(digests) > 1:
    raise BaseMismatchError(
      "the patches were made for different bases: "
      + ", ".join(sorted(str(d)[:12] for d in digests))
      + "; merge patches of one base, or rebase them first"
    )
  if base is None:
    named = _shapes_of(patches)
  else:
    named = flatten(base)[0]
  sources = inputs.sources_of(named, patches)
  floats = inputs.floats_of(named, only)
  exact = [
    name
    for name in named
    if name not in floats and any(name in source for source in sources)
  ]
  if exact and only is None:
    raise StructureError(
      "patches of leaves that are not floating point cannot be combined: "
      f"{', '.join(exact)}; leave them out with only=, or use merge"
    )
  if base is None:
    floats = dict.fromkeys(floats)
    shapes = {name: tuple(named[name].shape) for name in floats}
  else:
    shapes = None
  results = _run(floats, sources, method, state, False, False, shapes)
  return Patch(
    {name: Delta(Dense(out[0]), "add") for name, out in results},
    next((p.structure for p in patches if p.structure is not None), None),
    base=next(iter(digests), None),
  )


def _shapes_of(patches: Sequence[Patch]) -> dict[str, Any]:
  """Abstract leaves of the base of patches that sum."""
  shapes: dict[str, Any] = {}
  for patch in patches:
    if patch.structure is not None:
      for name, entry in patch.structure.leaves.items():
        shapes[name] = inputs.abstract(entry)
    for name, delta in patch.deltas.items():
      if not isinstance(delta, Delta) or delta.law != "add":
        raise StructureError(
          f"the change of {name} is no sum, so the base is needed: "
          "combine(..., base=params)"
        )
      shapes.setdefault(
        name, jax.ShapeDtypeStruct(delta.code.shape, jax.numpy.float32)
      )
  return shapes


def check_reducing(method: Transform, k: int) -> None:
  """Raises ValueError unless the method makes one delta of k."""
  if not method.reducing and k != 1:
    raise ValueError(
      f"the method turns {k} contributors into {k}: {method} has no "
      "reducing step; end it with mean(), weighted_sum() or disjoint_mean()"
    )


def _run(
  floats: dict[str, Any],
  sources: Sequence[dict[str, Any]],
  method: Transform,
  state: Any,
  as_params: bool,
  donate: bool,
  shapes: dict[str, Any] | None = None,
):
  """Yields the results of the leaves that some contributor changes."""
  inputs.check_narrow({n: x for n, x in floats.items() if x is not None})
  touched = [n for n in floats if any(n in source for source in sources)]
  traced = engine.is_traced(floats, sources, method, state)
  leaves = {}
  for name in touched:
    base = floats[name] if traced else inputs.on_device(floats[name])
    given = []
    for source in sources:
      one = source.get(name)
      if isinstance(one, Delta):
        one = one if traced else leafwise.held_dense(base, one)
      elif one is not None and not traced:
        one = inputs.on_device(one, base)
      given.append(one)
    work = leafwise.Work(base, tuple(given))
    leaves[name] = lambda work=work: work
  if not leaves:
    return
  if shapes is None:
    shapes = {name: tuple(leaf.shape) for name, leaf in floats.items()}
  yield from engine.run(
    method,
    state,
    leaves,
    shapes,
    contributors=len(sources),
    as_params=as_params,
    donate=donate,
    traced=traced,
  )
