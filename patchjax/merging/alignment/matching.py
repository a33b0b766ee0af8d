"""Git Re-Basin: one model's hidden units, in the order of another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from patchjax.merging.alignment import (
  activations,
  assigning,
  checking,
  inferring,
  specs,
)
from patchjax.merging.inputs import is_float
from patchjax.trees.errors import MismatchError, NonFiniteError
from patchjax.trees.names import named_leaves


@dataclasses.dataclass(frozen=True)
class Aligned:
  """A model whose hidden units were put in another order.

  Attributes:
    params: its parameters; it computes what it did.
    permutations: by dimension, what was done, for `permute` and
      `permute_patch`.
    spec: what may be permuted.
    agreement: `sum <a, x>` over the leaves with hidden units, for x the
      parameters before and after.
  """

  params: Any
  permutations: specs.Permutations
  spec: specs.PermutationSpec
  agreement: tuple[float, float]


def align(
  apply_fn: Callable[..., Any],
  target: Any,
  params: Any,
  *inputs: Any,
  by: Literal["weights", "activations"] = "weights",
  spec: specs.PermutationSpec | None = None,
  on_doubt: Literal["refuse", "fix"] = "refuse",
  seed: int = 0,
  sweeps: int = 100,
  tolerance: float | None = None,
) -> Aligned:
  """Returns a model's parameters in the order of another's hidden units.

  Git Re-Basin (Ainsworth et al. 2023, https://arxiv.org/abs/2209.04836): a
  network computes the same when its hidden units change places, so two that
  were trained apart can be averaged only after their units are matched.

  Args:
    apply_fn: the model, `(params, *inputs)`, traceable.
    target: the parameters whose order is wanted.
    params: those that are permuted.
    *inputs: arrays the model is called with. Matching by weights needs a few,
      to find and check what may be permuted; by activations, data.
    by: "weights": no data is used (section 3.2); "activations": units that
      respond alike are matched (section 3.1).
    spec: what may be permuted, if known; by default inferred.
    on_doubt: if it is inferred, see `infer_permutations`.
    seed: of the check, and of the order of dimensions.
    sweeps: over all dimensions, at most.
    tolerance: of the checks, see `infer_permutations`; by default that of the
      spec.

  Returns:
    The parameters, and what was done.

  Raises:
    MismatchError: if leaves do not fit, or what was permuted computes
      something else.
    StructureError: if it cannot be proven what may be permuted.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> rng = np.random.default_rng(0)
    >>> a = {"w1": rng.normal(size=(4, 8)), "w2": rng.normal(size=(8, 2))}
    >>> a = {name: np.float32(x) for name, x in a.items()}
    >>> b = {"w1": a["w1"][:, ::-1], "w2": a["w2"][::-1]}
    >>> mlp = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> found = pj.merging.align(mlp, a, b, np.ones((3, 4), np.float32))
    >>> [bool((found.params[name] == a[name]).all()) for name in a]
    [True, True]
  """
  if by not in ("weights", "activations"):
    raise ValueError(f"by must be 'weights' or 'activations', got {by!r}")
  if spec is None:
    spec = inferring.infer_permutations(
      apply_fn,
      params,
      *inputs,
      on_doubt=on_doubt,
      seed=seed,
      tolerance=tolerance,
    )
  if by == "weights":
    found = weight_matching(spec, target, params, seed=seed, sweeps=sweeps)
  else:
    found = activation_matching(
      spec, apply_fn, target, params, *inputs, seed=seed, sweeps=sweeps
    )
  moved = specs.permute(spec, found, params)
  tolerance = spec.tolerance if tolerance is None else tolerance
  _check_function(apply_fn, params, moved, inputs, tolerance)
  a = _floats(spec, target)
  before, after = (
    sum(assigning.dot(a[name], x[name]) for name in a)
    for x in (_floats(spec, params), _floats(spec, moved))
  )
  return Aligned(moved, found, spec, (before, after))


def weight_matching(
  spec: specs.PermutationSpec,
  target: Any,
  params: Any,
  *,
  seed: int = 0,
  sweeps: int = 100,
  start: specs.Permutations | None = None,
) -> specs.Permutations:
  """Returns permutations that bring weights near to a target's.

  Algorithm 1 of Git Re-Basin (https://arxiv.org/abs/2209.04836): one hidden
  dimension after the other, in a random order, is given its best permutation
  while all others stay, a linear assignment on `sum_leaves A B^T`, until a
  sweep betters nothing. The agreement never falls; the optimum is a local
  one. Heads, and what else holds dimensions that may differ within it, are
  matched together with what they hold.

  In the authors' code a step that betters nothing may still change places
  that are equally good; here it does not. Their random numbers are JAX's,
  these are NumPy's.

  Args:
    spec: of the model, checked.
    target: the parameters whose order is wanted.
    params: those that would be permuted.
    seed: of the order of dimensions.
    sweeps: over all dimensions, at most.
    start: permutations to start from; by default none.

  Returns:
    For each dimension, where its units come from: for `permute`.

  Raises:
    MismatchError: if leaves do not fit; lists them.
    NonFiniteError: if a leaf holds NaN or Inf.
    StructureError: if the spec was not checked.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a = {"w1": np.eye(3, dtype="f"), "w2": np.ones((3, 1), "f")}
    >>> mlp = lambda p, x: (x @ p["w1"]) @ p["w2"]
    >>> spec = pj.merging.infer_permutations(mlp, a, np.ones((2, 3), "f"))
    >>> b = a | {"w1": a["w1"][:, [2, 0, 1]]}
    >>> pj.merging.weight_matching(spec, a, b)["w1:1"].tolist()
    [1, 2, 0]
  """
  checking.require_checked(spec)
  if start is not None:
    specs.check_permutations(spec, start)
    start = specs.identities(spec) | start
  a, b = _floats(spec, target), _floats(spec, params)
  factors = {name: [f for axis in spec.axes[name] for f in axis] for name in a}
  return assigning.assigned(
    spec, factors, a, b, seed=seed, most=sweeps, start=start
  )


def activation_matching(
  spec: specs.PermutationSpec,
  apply_fn: Callable[..., Any],
  target: Any,
  params: Any,
  *inputs: Any,
  seed: int = 0,
  sweeps: int = 100,
) -> specs.Permutations:
  """Returns permutations that bring together units that respond alike.

  Section 3.1 of Git Re-Basin (https://arxiv.org/abs/2209.04836): a linear
  assignment on `sum_x h_a(x) h_b(x)^T` for each hidden dimension, of the
  activations that the model contracts over it: what a layer hands on, after
  its nonlinearity, as in the authors' code. A dimension that is handed on in
  several places (a residual stream) is matched on all of them.

  Args:
    spec: of the model, checked.
    apply_fn: the model, `(params, *inputs)`, traceable.
    target: the parameters whose order is wanted.
    params: those that would be permuted.
    *inputs: arrays the model is called with: data, some hundred examples. All
      their activations are held at once.
    seed: of the order of dimensions.
    sweeps: over all dimensions, at most.

  Returns:
    For each dimension, where its units come from: for `permute`.

  Raises:
    MismatchError: if leaves do not fit; lists them.
    StructureError: if the spec was not checked, or a dimension is contracted
      nowhere outside loops.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.normal(size=(32, 4)), rng.normal(size=(4, 6))
    >>> a = {"w1": np.float32(w), "w2": np.ones((6, 1), "f")}
    >>> b = {"w1": a["w1"][:, [1, 2, 3, 4, 5, 0]], "w2": a["w2"]}
    >>> mlp = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> spec = pj.merging.infer_permutations(mlp, a, np.float32(x))
    >>> found = pj.merging.activation_matching(spec, mlp, a, b, np.float32(x))
    >>> found["w1:1"].tolist()
    [5, 0, 1, 2, 3, 4]
  """
  checking.require_checked(spec)
  specs.check_leaves(spec, named_leaves(target))
  specs.check_leaves(spec, named_leaves(params))
  factors, a, b = activations.tapped(spec, apply_fn, target, params, inputs)
  return assigning.assigned(spec, factors, a, b, seed=seed, most=sweeps)


def _floats(spec: specs.PermutationSpec, tree: Any) -> Mapping[str, np.ndarray]:
  """Returns the floating point leaves with dimensions that move."""
  named = named_leaves(tree)
  specs.check_leaves(spec, named)
  moving = set(spec.moving)
  found = {
    name: np.asarray(named[name])
    for name, axes in spec.axes.items()
    if is_float(named[name]) and any(moving & set(axis) for axis in axes)
  }
  bad = [
    name
    for name, x in found.items()
    if not np.isfinite(x.astype(np.promote_types(x.dtype, np.float32))).all()
  ]
  if bad:
    raise NonFiniteError(
      f"units cannot be matched by NaN or Inf, found in {', '.join(bad)}"
    )
  return found


def _check_function(apply_fn, params, permuted, inputs, tolerance) -> None:
  run = jax.jit(lambda p: apply_fn(p, *inputs))
  expected = run(params)
  # Not against the target's outputs: they may be the same but for rounding.
  other = run(checking.moved(params, np.random.default_rng(0)))
  scales = checking.spreads(expected, other)
  error = checking.difference(expected, run(permuted), scales, tolerance)
  if error > 1:
    raise MismatchError(
      "the permuted parameters compute something else for these inputs, "
      f"{error:.1g} times what the tolerance allows; check the model for what "
      "depends on the order of its units"
    )
