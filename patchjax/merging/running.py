"""merge and combine: contributors and a method give a value, or a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
  method: Transform | Mapping[Any, Transform],
  *,
  state: Any = None,
  only: Any = None,
  donate: bool = False,
) -> Any:
  """Returns the base with the contributors' changes merged into it.

  Most methods see a contributor as its task vector `f32(x) - f32(base)`, and
  add what they make of them to the base; some (`Transform.space`) see its
  parameters `f32(x)`, and need no base. Either way there is one rounding, to
  the leaf's dtype. The result has the same bits eagerly, inside `jit` (where
  the method may be an argument), on any mesh, and from files (`merge_files`),
  but for methods that sum floats over a leaf: there the last bits may differ.
  With a Python density under `jit`, which sees float32, this holds for
  densities of up to six decimals. Differentiable in base, contributors,
  weights, scale; `vmap` over numbers of the method.

  Floating point leaves are merged. In all others the contributors must agree;
  inside `jit`, where that cannot be seen, the base's are kept. A leaf that no
  contributor changes is the same object, unless the method may change what
  all have in common. Every contributor given is counted.

  Args:
    base: pytree of arrays; None for a method that needs none: structure and
      leaves that are not merged are then those of the first contributor.
    contributors: pytrees with the leaves of the base, or patches on it.
    method: a transform with a reducing step, e.g. `pj.merging.ties()`; or a
      mapping of selectors of leaves to transforms. The first selector that
      picks a leaf decides; what is counted over the tree is counted over the
      leaves of one selector; leaves that none picks stay the base's.
    state: of each of its steps, as `method.init(base)` makes it, to learn or
      replace the numbers; by default the method's own. For a mapping, a
      mapping with the same keys.
    only: selector of the leaves to merge; the others stay the base's.
    donate: whether the merged leaves of `base` (without one, of the first
      contributor) may be overwritten: the fast path outside `jit` (inside,
      donate at the outer `jit`).

  Returns:
    A pytree of the structure, shapes, dtypes and shardings of `base`.

  Raises:
    MismatchError: if a contributor does not fit, or contributors disagree in
      a leaf that is not floating point; lists every leaf.
    NonFiniteError: outside `jit`, if NaN or Inf is found; names the leaves.
    DtypeError: for 64-bit leaves while JAX narrows them.
    StructureError: if there is no base, and something needs it.
    ValueError: if the method has no reducing step.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x, 1])} for x in (0, 1, 3))
    >>> pj.merge(base, [a, b], pj.merging.linear())["w"].tolist()
    [2.0, 1.0]
    >>> pj.merge(None, [a, b], pj.merging.linear())["w"].tolist()
    [2.0, 1.0]
    >>> methods = {"w": pj.merging.task_arithmetic()}
    >>> pj.merge(base, [a, b], methods)["w"].tolist()
    [4.0, 1.0]
  """
  methods = method if isinstance(method, Mapping) else {None: method}
  states = state if isinstance(method, Mapping) else {None: state}
  for one in methods.values():
    check_reducing(one, len(contributors))
  if base is None:
    check_baseless(contributors, methods)
    named, treedef = flatten(contributors[0])
    sources = inputs.sources_of(named, contributors, same=True)
    own = sources
  else:
    named, treedef = flatten(base)
    sources = inputs.sources_of(named, contributors, same=True)
    own = inputs.changed_of(named, sources)
  floats = inputs.floats_of(named, only)
  changed = dict(named)
  if only is None:
    rest = [n for n in named if n not in floats and inputs.is_array(named[n])]
    changed |= inputs.agreed(named, own, rest)
  for key, leaves in inputs.grouped(floats, methods):
    one = methods[key]
    changed |= run_leaves(
      leaves,
      # What is the base's own object is no change, unless the method may
      # change what all contributors have in common.
      sources if one.space == "params" else own,
      one,
      None if states is None else states[key],
      as_params=True,
      donate=donate,
      baseless=base is None,
    )
  return jax.tree.unflatten(treedef, changed.values())


def check_baseless(
  contributors: Sequence[Any], methods: Mapping[Any, Transform]
) -> None:
  """Refuses a merge without a base that something needs.

  Args:
    contributors: as given to `merge`.
    methods: the methods by selector.

  Raises:
    StructureError: if something needs a base, or there is no contributor.
  """
  for method in methods.values():
    if method.space == "deltas" or method.needs_base:
      raise StructureError(
        f"{method} needs the base that task vectors are measured from, or "
        "reads it: merge(base, contributors, method)"
      )
  if not contributors:
    raise StructureError("there is nothing to merge: contributors is empty")
  if any(isinstance(c, Patch) for c in contributors):
    raise StructureError(
      "a patch is a change of its base: merge(base, contributors, method)"
    )


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
    base: the base; needed for laws other than `add`, and by methods that
      work on parameters.
    state: see `merge`.
    only: selector of the leaves to merge; the others are left out.

  Returns:
    A patch of law `add`, float32; `apply(base, ...)` of it is what `merge`
    gives. Compress it to make it small.

  Raises:
    BaseMismatchError: if the patches say that their bases differ.
    MismatchError: if they do not fit each other.
    StructureError: if a base is needed: by a law, or by a method that works
      on parameters.

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
  results = run_leaves(
    floats, sources, method, state, as_params=False, shapes=shapes
  )
  return Patch(
    {name: Delta(Dense(out[0]), "add") for name, out in results.items()},
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


def run_leaves(
  floats: Mapping[str, Any],
  sources: Sequence[Mapping[str, Any]],
  method: Transform,
  state: Any,
  *,
  as_params: bool,
  donate: bool = False,
  baseless: bool = False,
  shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
  """Returns the results of the leaves that some contributor holds."""
  inputs.check_narrow({n: x for n, x in floats.items() if x is not None})
  touched = [n for n in floats if any(n in source for source in sources)]
  traced = engine.is_traced(floats, sources, method, state)
  params = engine.in_params(method, as_params)
  leaves = {}
  for name in touched:
    leaf = floats[name]
    given = [source.get(name) for source in sources]
    reads = not baseless and engine.reads_base(method, given, as_params)
    if not traced:
      if reads or (donate and not baseless):
        leaf = inputs.on_device(leaf)
      given = [
        leafwise.held_dense(leaf, one, params=params)
        if isinstance(one, Delta)
        else one
        if one is None
        else inputs.on_device(one, leaf)
        for one in given
      ]
    like = given[0] if baseless else leaf
    work = leafwise.Work(leaf if reads else None, tuple(given), like)
    leaves[name] = lambda work=work: work
  if not leaves:
    return {}
  if shapes is None:
    shapes = {name: tuple(leaf.shape) for name, leaf in floats.items()}
  return dict(
    engine.run(
      method,
      state,
      leaves,
      shapes,
      contributors=len(sources),
      as_params=as_params,
      donate=donate,
      traced=traced,
    )
  )
