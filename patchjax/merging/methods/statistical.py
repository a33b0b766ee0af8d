"""Merges weighed by what data says of the models: Fisher, RegMean, MaTS, TATR.

Statistics are taken from a model and some of its data with
`patchjax.statistics`, once for each contributor, and may be kept beside its
patch. They are numbers of the method: traced, never part of what is compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging import ranks, solving, steps
from patchjax.merging.methods import options
from patchjax.patches import ordering, selection, shares, transform
from patchjax.patches.counting import at_least, limbs
from patchjax.patches.meshes import on_leaf_mesh
from patchjax.patches.perleaf import PerLeaf
from patchjax.patches.rank_cuts import cuts
from patchjax.patches.transform import Transform
from patchjax.statistics import Fisher, Gram, KFac, shrink
from patchjax.trees.errors import SelectionError, StructureError

Array = Any


def fisher(
  *,
  fishers: Sequence[Fisher],
  weights: Any = 1.0,
  floor: Any = 1e-6,
  favor: Literal["first", "base"] | None = None,
  normalize: bool = True,
  shrinkage: Any = 0.0,
) -> Transform:
  """Returns the mean of parameters, each weighed by its Fisher information.

  Matena and Raffel 2022 (https://arxiv.org/abs/2111.09832, equation 4): the
  entry j of the result is `sum_i w_i F_ij x_ij / sum_i w_i F_ij`. As in their
  code, F is at least a floor, and the F of each contributor is divided by its
  norm over the whole model. Where all weights are 0 the result is the base's;
  leaves of which there is no Fisher get the weighted mean.

  Args:
    fishers: the diagonals, one a contributor (`statistics.fisher_diagonal`).
    weights: one a contributor, or one for all; traced, differentiable.
    floor: the least that an entry of F counts, before it is normalized;
      traced.
    favor: whom the floor is for, which decides where all F are below it.
      None: all, so that the result is their mean (the code's
      `favor_target_model=False`); "first": the first contributor, the target
      (the code's default); "base": nobody, and the base's entry stays.
    normalize: whether to divide by the norms.
    shrinkage: as if this many examples more had said the mean of each leaf's
      F, see `statistics.shrink`.

  Raises:
    SelectionError: in the merge, if none of its leaves has a Fisher.
    StructureError: if the Fishers are not of the same leaves,
      or, in the merge, not of the shapes of its leaves.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x, x])} for x in (0, 1, 3))
    >>> known = [[3, 1], [1, 1]]
    >>> fishers = [pj.statistics.Fisher({"w": np.float32(f)}, 9, "exact")
    ...            for f in known]
    >>> method = pj.merging.fisher(fishers=fishers, normalize=False)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [1.5, 2.0]
  """
  options.check("favor", str(favor), ("None", "first", "base"))
  fishers = [shrink(f, shrinkage) for f in fishers]
  numbers = {
    "curvatures": solving.of_statistics(fishers),
    "weights": options.numbers(weights),
    "floor": floor,
    "norms": jnp.stack([_norm(f) for f in fishers]) if normalize else None,
  }
  return Transform.of(_FISHER, numbers, favor=favor)


def _fitting(numbers, shapes, **options):
  del options
  solving.check_fit(numbers, shapes)
  return numbers


def _norm(fisher: Fisher) -> Array:
  """Returns the length of a diagonal over all leaves, 1 if it is 0."""
  squares = [jnp.sum(jnp.square(x)) for x in fisher.values.values()]
  square = functools.reduce(jnp.add, squares)
  return jnp.where(square > 0, jnp.sqrt(square), jnp.ones_like(square))


def _fisher(leaf, deltas, base, state, shared, *, favor):
  del leaf, base, shared
  weights = transform.per_contributor(state["weights"], len(deltas))
  if state["curvatures"] is None:
    return solving.weighted_mean(deltas, weights)
  _check_count(state["curvatures"], deltas)
  norms = state.get("norms")
  if norms is not None:
    weights = [jnp.asarray(w) / norms[i] for i, w in enumerate(weights)]

  def mean(deltas, fishers, weights, floor):
    dtype = deltas[0].dtype
    floor, zero = floor.astype(dtype), jnp.zeros_like(deltas[0])
    known = [c.diagonal.astype(dtype) for c in fishers]
    masses = []
    for i, (f, w) in enumerate(zip(known, weights, strict=True)):
      if favor is None or (favor == "first" and not i):
        f = jnp.maximum(f, floor)
      masses.append(transform.rounded(w.astype(dtype) * f))
    mass = functools.reduce(jnp.add, masses)
    total = functools.reduce(
      jnp.add,
      (transform.rounded(m * d) for m, d in zip(masses, deltas, strict=True)),
    )
    sure = mass > zero
    if favor == "base":
      sure &= functools.reduce(jnp.maximum, known) >= floor
    return jnp.where(sure, total / jnp.where(sure, mass, zero + 1), zero)

  weights = [jnp.asarray(w) for w in weights]
  floor = jnp.asarray(state["floor"])
  given = (tuple(deltas), state["curvatures"], weights, floor)
  return on_leaf_mesh(mean, deltas[0], *given)


_FISHER = transform.register_step(
  transform.Step(name="fisher", update=_fisher, init=_fitting, reducing=True)
)


def _check_count(curvatures, deltas):
  if len(curvatures) != len(deltas):
    raise SelectionError(
      f"expected one statistic a contributor, {len(deltas)}, got "
      f"{len(curvatures)}"
    )


def regmean(
  *,
  grams: Sequence[Gram],
  weights: Any = 1.0,
  off_diagonal: Any = 0.9,
  shrinkage: Any = 0.0,
) -> Transform:
  """Returns linear layers that answer inputs as the contributors' do.

  RegMean (Jin et al. 2023, https://arxiv.org/abs/2212.09849, equation 2): the
  least-squares solution `(sum_i w_i G_i)^-1 sum_i w_i G_i W_i`, G the Gram
  matrix of the inputs of a layer, the entries off its diagonal scaled down.
  All other leaves get the weighted mean, as in the paper's code. Where the
  sum is singular, which that code's inverse is not made for, directions that
  no data has keep the mean of the contributors.

  The code's Gram matrices are means over rows (tokens), as `Gram.values`; a
  weight for each contributor's number of rows pools the data.

  Args:
    grams: one a contributor (`statistics.gram`).
    weights: one a contributor, or one for all; traced, differentiable.
    off_diagonal: what entries off the diagonal are multiplied with (the
      paper's alpha: 0.9, or 0.1 for T5); traced.
    shrinkage: as if this many examples more had said the mean of the
      diagonal, the same for all inputs; see `statistics.shrink`.

  Raises:
    SelectionError: in the merge, if none of its leaves has a Gram matrix.
    StructureError: if the Gram matrices are not of the same layers,
      or, in the merge, not of the shapes of its leaves.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = ({"w": np.float32([[x], [x]])} for x in (1, 3))
    >>> def gram(x):
    ...   apply = lambda params, x: x @ params["w"]
    ...   return pj.statistics.gram(apply, a, np.float32(x))
    >>> grams = [gram([[1, 0]]), gram([[0, 1]])]  # each its own input
    >>> pj.merge(None, [a, b], pj.merging.regmean(grams=grams))["w"].tolist()
    [[1.0], [3.0]]
  """
  grams = [shrink(g, shrinkage) for g in grams]
  numbers = {
    "curvatures": solving.of_statistics(grams),
    "weights": options.numbers(weights),
    "off_diagonal": off_diagonal,
  }
  return Transform.of(_REGMEAN, numbers)


def _regmean(leaf, values, base, state, shared):
  del leaf, base, shared
  weights = transform.per_contributor(state["weights"], len(values))
  if state["curvatures"] is None:
    return solving.weighted_mean(values, weights)

  return _solved(solving.by_inputs, values, weights, state)


def _solved(solve, values, weights, state, *more):
  """Runs `(curvatures, values, mean, *more)` on whole leaves, wherever."""
  _check_count(state["curvatures"], values)
  dtype = values[0].dtype

  def whole(values, curvatures, weights, share, *more):
    known = [
      c.astype(dtype).damped(share).weighted(w)
      for c, w in zip(curvatures, weights, strict=True)
    ]
    mean = solving.weighted_mean(values, weights)
    return solve(known, values, mean, *more)

  weights = [jnp.asarray(w).astype(dtype) for w in weights]
  share = jnp.asarray(state["off_diagonal"]).astype(dtype)
  given = (tuple(values), state["curvatures"], weights, share, *more)
  return on_leaf_mesh(whole, values[0], *given)


_REGMEAN = transform.register_step(
  transform.Step(
    name="regmean",
    update=_regmean,
    init=_fitting,
    reducing=True,
    space=lambda: "either",
  )
)


def mats(
  *,
  statistics: Sequence[Fisher | Gram | KFac],
  weights: Any = 1.0,
  init: Any = None,
  iterations: int = 100,
  tolerance: Any = 1e-5,
  off_diagonal: Any = 1.0,
  shrinkage: Any = 0.0,
) -> Transform:
  """Returns the solution of `sum_i C_i x = sum_i C_i x_i` on each leaf.

  MaTS (Tam et al. 2024, https://arxiv.org/abs/2312.04339, section 4): merging
  as the search for the parameters that match all models in the subspaces
  that matter to their tasks, by conjugate gradients from the result of any
  other merge. C is what the statistics say: a diagonal Fisher information, a
  Gram matrix of inputs, or Kronecker factors (`W -> A W S`), as in the
  paper's code, which uses SciPy's solver and its tolerance. Leaves of which
  there is no statistic get the weighted mean. What no contributor's data
  sees stays at the start.

  Args:
    statistics: one a contributor: all `Fisher`, all `Gram` or all `KFac`.
    weights: one a contributor, or one for all; traced, differentiable.
    init: where the search begins: parameters with the leaves of the models,
      such as those of another merge; by default their mean.
    iterations: how many steps at most; static.
    tolerance: it ends where the residual is this share of the right side;
      traced.
    off_diagonal: what the entries off the diagonals of matrices are
      multiplied with; traced.
    shrinkage: see `statistics.shrink`.

  Raises:
    SelectionError: in the merge, if none of its leaves has a statistic, or
      none a leaf of `init`.
    StructureError: if the statistics are not of one kind and the same leaves,
      or, in the merge, not of the shapes of its leaves.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = ({"w": np.float32([[x], [x]])} for x in (1, 3))
    >>> def gram(x):
    ...   apply = lambda params, x: x @ params["w"]
    ...   return pj.statistics.gram(apply, a, np.float32(x))
    >>> grams = [gram([[1, 0]]), gram([[1, 0]])]  # nobody knows the second
    >>> method = pj.merging.mats(statistics=grams, init=a)
    >>> pj.merge(None, [a, b], method)["w"].tolist()
    [[2.0], [1.0]]
  """
  if iterations < 1:
    raise ValueError(f"iterations must be at least 1, got {iterations}")
  statistics = [shrink(s, shrinkage) for s in statistics]
  if init is not None:
    from patchjax.trees.names import named_leaves

    init = PerLeaf(named_leaves(init), optional=True)
  numbers = {
    "curvatures": solving.of_statistics(statistics),
    "weights": options.numbers(weights),
    "init": init,
    "tolerance": tolerance,
    "off_diagonal": off_diagonal,
  }
  return Transform.of(_MATS, numbers, iterations=iterations)


def _mats(leaf, values, base, state, shared, *, iterations):
  del leaf, base, shared
  weights = transform.per_contributor(state["weights"], len(values))
  if state["curvatures"] is None:
    return solving.weighted_mean(values, weights)

  def solve(curvatures, values, mean, start, tolerance):
    return solving.by_gradients(
      curvatures,
      values,
      mean if start is None else start.astype(mean.dtype),
      iterations=iterations,
      tolerance=tolerance,
    )

  start = state.get("init")
  start = None if start is None else jnp.asarray(start)
  tolerance = jnp.asarray(state["tolerance"])
  return _solved(solve, values, weights, state, start, tolerance)


_MATS = transform.register_step(
  transform.Step(
    name="mats",
    update=_mats,
    init=_fitting,
    reducing=True,
    space=lambda **_: "params",
  )
)


def trust_region(
  *,
  gradients: Sequence[Mapping[str, Array]] | None = None,
  quantile: Any = 0.99,
  scale: Any = 0.3,
) -> Transform:
  """Returns the base plus task vectors, but where they hurt other tasks.

  Task Arithmetic in the Trust Region (Sun et al. 2025,
  https://arxiv.org/abs/2501.15065): moving along task vector j changes the
  loss of task i by about its gradient times the vector, so an entry's
  conflict is `sum over i != j of |g_i| |tau_j|`; the entries of the largest
  conflict over the whole model are left out of all task vectors, whose sum is
  scaled and added. As in FusionBench's code, of n entries those stay whose
  conflict is below that of rank `floor(quantile n)` from the smallest, ranks
  counted from 0: none of a single contributor's, which conflict with nobody.

  Args:
    gradients: g, one a contributor: `{text name: array}`, means over examples
      of gradients' absolute values at the base
      (`statistics.absolute_gradients`); signs do not count. By default task
      vectors stand for them, which needs no data (the code's `zero_shot`).
    quantile: the share that stays, about, in [0, 1]; traced; it has no
      derivative.
    scale: lambda; traced, differentiable.

  Raises:
    SelectionError: if the quantile is outside [0, 1], or a leaf has no
      gradient.
    StructureError: in the merge, if a gradient is not of its leaf's shape.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in
    ...               ([0, 0, 0, 0], [4, 1, 0, 0], [4, 0, 1, 0]))
    >>> method = pj.merging.trust_region(quantile=0.75, scale=1.0)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [0.0, 1.0, 1.0, 0.0]
  """
  if isinstance(quantile, int | float):
    shares.check_density(quantile, zero=True, name="quantile")
  known = None
  if gradients is not None:
    names = [name for name in gradients[0] if all(name in g for g in gradients)]
    known = PerLeaf(
      {n: tuple(g[n] for g in gradients) for n in names},
      missing="no gradient is given for the leaf {name}; take "
      "absolute_gradients over it too, of each contributor's data",
    )
  return transform.chain(
    Transform.of(_CONFLICT, {"gradients": known}),
    Transform.of(_TRUST, {"quantile": quantile}),
    steps.weighted_sum(),
    steps.scale(scale),
  )


def _conflict(leaf, deltas, base, state, shared):
  del leaf, base, shared
  given = state.get("gradients")

  def conflict(deltas, given):
    sizes = tuple(map(jnp.abs, deltas))
    pulls = sizes
    if given is not None:
      # Signed ones would cancel, and a conflict is none below 0.
      pulls = tuple(jnp.abs(g.astype(deltas[0].dtype)) for g in given)
    total = jnp.zeros_like(deltas[0])
    for i, pull in enumerate(pulls):
      for j, size in enumerate(sizes):
        if i != j:
          total = total + transform.rounded(pull * size)
    return total

  if given is not None and len(given) != len(deltas):
    raise SelectionError(
      f"expected the gradients of {len(deltas)} contributors, got {len(given)}"
    )
  given = jax.tree.map(jnp.asarray, given)
  for gradient in given or ():
    if gradient.shape != deltas[0].shape:
      raise StructureError(
        f"a gradient is of shape {gradient.shape}, and its leaf of "
        f"{deltas[0].shape}"
      )
  return (*deltas, on_leaf_mesh(conflict, deltas[0], tuple(deltas), given))


_CONFLICT = transform.register_step(
  transform.Step(name="conflict_of_gradients", update=_conflict)
)


def _trust_keys(leaf, deltas, state):
  del leaf, state
  return (ordering.magnitude_keys(deltas[-1]),)


def _trust_ranks(state, shapes, k):
  del k
  size = sum(math.prod(shape) for shape in shapes)
  below = shares.entries_of(state["quantile"], size, zero=True)
  rank = ranks.minus(limbs(size), below)
  one = limbs(1)
  where = jnp.where if isinstance(rank, jax.Array) else np.where
  return (where(at_least(rank, one), rank, one),)


def _trust(leaf, deltas, base, state, searches):
  del base, state
  (key,) = _trust_keys(leaf, deltas, None)
  hurts = selection.keep_keys(key, leaf, searches[0])
  return tuple(jnp.where(hurts, jnp.zeros_like(d), d) for d in deltas[:-1])


_TRUST = transform.register_step(
  transform.Step(
    name="trust_region",
    update=_trust,
    **cuts(_trust_keys, _trust_ranks, bits=31, early=True),
  )
)
