"""A spec of permutations is held to the function of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging.alignment import specs
from patchjax.merging.inputs import is_float
from patchjax.trees.errors import (
  MismatchError,
  NonFiniteError,
  StructureError,
)
from patchjax.trees.names import flatten

# Of two units, a random order is the old one half of the time.
_DRAWS = 8


def given_permutations(
  axes: Mapping[str, Sequence[Any]],
  apply_fn: Callable[..., Any],
  params: Any,
  *inputs: Any,
  within: Mapping[str, Sequence[str]] | None = None,
  seed: int = 0,
  tolerance: float | None = None,
) -> specs.PermutationSpec:
  """Returns a spec that was written down, if the model obeys it.

  For models that `infer_permutations` refuses.

  Args:
    axes: for each leaf with hidden units, by text name, one entry an axis:
      None for an axis that keeps its order, the name of a dimension, or for a
      flattened axis a tuple of names and sizes, the slowest first.
    apply_fn: the model, `(params, *inputs)`.
    params: pytree of arrays.
    *inputs: arrays it is called with.
    within: for dimensions, all those they may differ within, outer and outer
      still (see `Hidden`).
    seed: of the check.
    tolerance: of the check, see `infer_permutations`.

  Returns:
    The spec.

  Raises:
    MismatchError: if sizes do not fit, or permuting a dimension changes what
      the model computes; names it, and its leaves.
    NonFiniteError: if the model gives NaN in the check.
    StructureError: if a leaf or dimension is not there, or the inputs do not
      show one, so that it cannot be checked.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> params = {"w1": np.ones((2, 4), "f"), "w2": np.ones((4, 1), "f")}
    >>> spec = pj.merging.given_permutations(
    ...   {"w1": (None, "units"), "w2": ("units", None)},
    ...   lambda p, x: np.tanh(1) * (x @ p["w1"]) @ p["w2"],
    ...   params, np.ones((3, 2), "f"),
    ... )
    >>> spec.moving, spec.error < 1e-5
    (('units',), True)
  """
  spec = specs.from_axes(params, axes, within or {})
  wrong = [
    f" - {name} within {outer}"
    for name, hidden in spec.dimensions.items()
    for outer in hidden.within
    if outer not in spec.dimensions
    or not set(spec.dimensions[outer].within) < set(hidden.within)
  ]
  if wrong:
    raise StructureError(
      "what a dimension lies within must be dimensions, with all that they "
      "lie within themselves:\n" + "\n".join(wrong)
    )
  spec = checked(
    spec, apply_fn, params, *inputs, seed=seed, tolerance=tolerance
  )
  # Rules prove what is inferred; of this there is no other evidence.
  blind = [
    f" - {name}, in {', '.join(leaves)}"
    for name, leaves in spec.unseen.items()
    if leaves == spec.where(name)
  ]
  if blind:
    raise StructureError(
      "these cannot be checked, since for inputs like those given the model "
      "gives the same when any leaf of theirs is permuted alone:\n"
      + "\n".join(blind)
      + "\ngive inputs for which they matter: several steps, tokens that "
      "differ, some units that are not zero"
    )
  return spec


def checked(
  spec: specs.PermutationSpec,
  apply_fn: Callable[..., Any],
  params: Any,
  *inputs: Any,
  seed: int = 0,
  tolerance: float | None = None,
) -> specs.PermutationSpec:
  """Returns the spec with its error, if permuting leaves the model's function.

  All dimensions are permuted at random, several times, in parameters and
  inputs that are moved at random from those given, so that zeros and equal
  numbers in these hide nothing (signs stay: a variance is not made negative).
  The inputs may still hide what the model does: one step alone says nothing
  of queries and keys, nor do equal tokens, nor a dead unit of its weights.
  So each leaf is permuted alone, too: one that changes nothing is told.

  Args:
    spec: of the model.
    apply_fn: the model, `(params, *inputs)`.
    params: pytree of arrays.
    *inputs: arrays it is called with.
    seed: of what is random.
    tolerance: the largest difference allowed, relative to what moving the
      parameters changes; by default 1e-3 for float32, 1e-7 for float64, 0.1
      for half precision.

  Raises:
    MismatchError: if outputs differ; names the dimensions and their leaves.
    NonFiniteError: if the model gives NaN.
    StructureError: if the outputs do not depend on the parameters.
  """
  rng = np.random.default_rng(seed)
  near, other = moved(params, rng), moved(params, rng)
  given = tuple(moved(x, rng) for x in inputs)
  run = jax.jit(lambda p: apply_fn(p, *given))
  expected = _outputs(run(near))
  scales = spreads(expected, run(other))

  def differs(params):
    return difference(expected, run(params), scales, tolerance) > 1

  error = 0.0
  draws = [specs.random_permutations(spec, rng) for _ in range(_DRAWS)]
  for everything in draws:
    found = run(specs.permute(spec, everything, near))
    if difference(expected, found, scales, tolerance) > 1:
      wrong = [
        f" - {name}, in {', '.join(spec.where(name))}"
        for name, table in everything.items()
        if differs(specs.permute(spec, {name: table}, near))
      ]
      raise MismatchError(
        "the model computes something else when these are permuted:\n"
        + "\n".join(wrong or [" - all together"])
      )
    error = max(error, difference(expected, found, scales, 1.0))
  unseen = _unseen(spec, draws, near, other, differs)
  return dataclasses.replace(
    spec, error=error, tolerance=tolerance, unseen=unseen
  )


def _unseen(spec, draws, near, other, differs) -> dict[str, tuple[str, ...]]:
  """Returns, by dimension, the leaves that change nothing if permuted alone.

  Had the spec left such a leaf out, the check would not have noticed.
  """
  named, treedef = flatten(near)
  others, _ = flatten(other)

  def shows(name, leaf):
    if len(spec.where(name)) == 1:
      # Permuting its only leaf permutes it everywhere: that is no change.
      new = [others[leaf]]
    else:
      new = (
        specs.permuted_leaf(
          spec, {name: draw[name]}, spec.axes[leaf], named[leaf]
        )
        for draw in draws
      )
    return any(
      differs(jax.tree.unflatten(treedef, (named | {leaf: x}).values()))
      for x in new
    )

  found = {
    name: tuple(leaf for leaf in spec.where(name) if not shows(name, leaf))
    for name in spec.moving
    if spec.dimensions[name].size > 1
  }
  return {name: leaves for name, leaves in found.items() if leaves}


def moved(tree: Any, rng: np.random.Generator) -> Any:
  """Returns a pytree whose floating point numbers are moved at random.

  Args:
    tree: pytree of arrays.
    rng: draws by how much.
  """
  named, treedef = flatten(tree)

  def move(x):
    if not is_float(x):
      return x
    shape = np.shape(x)
    wide = np.asarray(x).astype(np.float32 if x.dtype.itemsize < 8 else x.dtype)
    near = 1 + 0.3 * rng.uniform(-1, 1, shape)
    out = wide * near + 0.05 * rng.uniform(0, 1, shape)
    out = out.astype(x.dtype)
    return jax.device_put(out, x.sharding) if isinstance(x, jax.Array) else out

  return jax.tree.unflatten(treedef, [move(x) for x in named.values()])


def _outputs(tree: Any) -> list[np.ndarray]:
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def spreads(one: Any, other: Any) -> list[float]:
  """Returns how far outputs of two models differ: the scales of errors.

  The largest output would be none: the one large number that a mask puts in
  would hide all others.

  Args:
    one: pytree of a model's outputs.
    other: those of other parameters.

  Returns:
    One number a leaf.

  Raises:
    NonFiniteError: if there is NaN.
    StructureError: if they do not differ.
  """
  pairs = list(zip(_outputs(one), _outputs(other), strict=True))
  if any(np.isnan(x).any() for pair in pairs for x in pair):
    raise NonFiniteError(
      "the model gives NaN for parameters and inputs near those given, so "
      "that nothing can be checked; give others"
    )
  found = []
  for x, y in pairs:
    gaps = _gaps(x, y)
    found.append(float(gaps[np.isfinite(gaps)].max(initial=0)))
  if not any(found):
    raise StructureError(
      "the model's outputs do not depend on the parameters for these inputs, "
      "so that nothing can be checked; give others"
    )
  return found


def difference(
  expected: Any,
  found: Any,
  scales: Sequence[float],
  tolerance: float | None,
) -> float:
  """Returns how far outputs differ, 1 being the most that rounding explains.

  Args:
    expected: pytree of a model's outputs.
    found: pytree of others.
    scales: by how much each leaf may differ at all, see `spreads`.
    tolerance: the largest difference allowed, as a part of the scale; None
      for that of the leaf's dtype.
  """
  worst = 0.0
  for x, y, scale in zip(
    _outputs(expected), _outputs(found), scales, strict=True
  ):
    allowed = tolerance
    if allowed is None:
      allowed = {2: 0.1, 4: 1e-3, 8: 1e-7}.get(x.dtype.itemsize, 0.1)
    gap = float(_gaps(x, y).max(initial=0))
    worst = max(worst, gap / max(scale * allowed, _TINY))
  return worst


_TINY = float(np.finfo(np.float32).tiny)


def _gaps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns how far numbers are apart: 0 if by their last bits, Inf by NaN."""
  bits = 0.0
  if jnp.issubdtype(x.dtype, jnp.inexact):
    bits = 8 * float(jnp.finfo(x.dtype).eps)
  x, y = (z.astype(np.result_type(z.dtype, np.float64)) for z in (x, y))
  with np.errstate(invalid="ignore"):
    gaps = np.where(np.isclose(x, y, bits, 0), 0, np.abs(x - y))
  return np.where(np.isnan(gaps), np.inf, gaps)


def require_checked(spec: specs.PermutationSpec) -> None:
  """Raises StructureError for a spec that no model was held to.

  Args:
    spec: of a model.
  """
  if spec.error is None:
    raise StructureError(
      "this spec was not checked against a model; make it with "
      "infer_permutations or given_permutations"
    )
