"""fit_numbers: the smooth numbers of any merge method, by gradient descent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging import inputs, running
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform
from patchjax.trees.dtypes import is_array
from patchjax.trees.errors import NonFiniteError, StructureError
from patchjax.trees.names import named_leaves

Array = Any
Numbers = Any
Method = Transform | Mapping[Any, Transform]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
  """What was learned.

  Attributes:
    merged: the merge with the learned numbers.
    numbers: the learned numbers, float32 arrays, in the structure they were
      given in.
    losses: float32, the loss before each step.
  """

  merged: Any
  numbers: Numbers
  losses: Array


def fit_numbers(
  base: Any,
  contributors: Sequence[Any],
  method: Callable[[Numbers], Method],
  numbers: Numbers,
  loss: Callable[[Any, Any], Array],
  data: Any,
  *,
  optimizer: Any = None,
  steps: int | None = None,
  only: Any = None,
) -> Fitted:
  """Returns a merge whose numbers were learned by gradient descent.

  Minimises `loss(merge(base, contributors, method(numbers)), batch)` over the
  numbers by `jax.grad` through `merge`. Weights, scales and interpolation
  parameters are smooth; a density is not, since it selects, and its
  derivative is refused (search for it with `search_numbers`). Each step costs
  a merge, and a forward and a backward pass of the loss; the derivative in a
  weight is one dot product of a gradient with a task vector.

  `method` may make anything of the numbers: bound them (`jax.nn.sigmoid`),
  give each leaf its own or interpolate a few over the layers (`per_leaf`),
  or return a mapping of selectors to methods.

  Args:
    base: pytree of arrays; None for methods that need none.
    contributors: pytrees with the leaves of the base, or patches on it.
    method: called with the numbers, returns what `merge` takes.
    numbers: where to start: a pytree of numbers or arrays.
    loss: `(merged parameters, batch) -> scalar`, traceable.
    data: a batch for all steps, or an iterator (with `__next__`) over them.
    optimizer: an optax `GradientTransformation`; by default
      `optax.adam(1e-2)`.
    steps: how many; by default 100 with one batch, all of an iterator.
    only: selector of the leaves to merge; the others stay the base's.

  Returns:
    The merge, its numbers, and the losses.

  Raises:
    MismatchError: if a contributor does not fit; lists every leaf.
    NonFiniteError: if the loss became NaN or Inf.
    SelectionError: if a derivative in a density is needed.
    StructureError: if an iterator has no batch.

  Example:
    >>> import jax.numpy as jnp, numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 0], [0, 4]))
    >>> target = np.float32([0.5, 1])
    >>> fitted = pj.merging.fit_numbers(
    ...   base, [a, b],
    ...   lambda weights: pj.merging.task_arithmetic(weights=weights),
    ...   np.ones(2), lambda p, t: jnp.sum((p["w"] - t) ** 2), target,
    ...   steps=300,
    ... )
    >>> print(np.round(fitted.numbers, 2))
    [0.5  0.25]
  """
  check_inputs(base, contributors, only)
  import optax

  if optimizer is None:
    optimizer = optax.adam(1e-2)
  arrays, rebuild = parted((base, list(contributors)))

  def value(numbers, arrays, batch):
    held, given = rebuild(arrays)
    merged = running.merge(held, given, method(numbers), only=only)
    return loss(merged, batch)

  @jax.jit
  def step(numbers, state, arrays, batch):
    now, grads = jax.value_and_grad(value)(numbers, arrays, batch)
    # optax raises floats to the power of a step count.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, numbers)
      numbers = optax.apply_updates(numbers, updates)
    return now, numbers, state

  numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)
  state = optimizer.init(numbers)
  losses = []
  for batch in batches(data, steps):
    now, numbers, state = step(numbers, state, arrays, batch)
    losses.append(now)
  losses = np.asarray(jax.device_get(losses), np.float32)
  _check_losses(losses)
  merged = running.merge(base, contributors, method(numbers), only=only)
  return Fitted(merged, numbers, losses)


def check_inputs(base: Any, contributors: Sequence[Any], only: Any) -> None:
  """Raises what `merge` would raise eagerly and cannot see inside `jit`.

  Args:
    base: see `merge`.
    contributors: see `merge`.
    only: see `merge`.

  Raises:
    DtypeError: for 64-bit leaves while JAX narrows them.
    MismatchError: if a contributor does not fit, or some disagree in leaves
      that have no mean.
    StructureError: if there is nothing to merge.
  """
  if not contributors:
    raise StructureError("there is nothing to merge: contributors is empty")
  if base is None and any(isinstance(c, Patch) for c in contributors):
    raise StructureError("a patch is a change of its base: give the base")
  named = named_leaves(contributors[0] if base is None else base)
  sources = inputs.sources_of(named, contributors, same=True)
  floats = inputs.floats_of(named, only)
  inputs.check_narrow(floats)
  if only is None:
    rest = [n for n in named if n not in floats and inputs.is_array(named[n])]
    own = sources if base is None else inputs.changed_of(named, sources)
    inputs.agreed(named, own, rest)


def parted(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """Returns the arrays of a pytree, for a jitted function, and the way back.

  Args:
    tree: any pytree; leaves that are no arrays (names, flags) stay behind.

  Example:
    >>> import numpy as np
    >>> arrays, rebuild = parted({"w": np.ones(2), "name": "mlp"})
    >>> len(arrays), rebuild([0])
    (1, {'name': 'mlp', 'w': 0})
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
  rest = [None if is_array(leaf) else leaf for leaf in leaves]

  def rebuild(arrays: list[Any]) -> Any:
    full = list(rest)
    for i, array in zip(places, arrays, strict=True):
      full[i] = array
    return jax.tree.unflatten(treedef, full)

  return [leaves[i] for i in places], rebuild


def batches(data: Any, steps: int | None) -> Iterator[Any]:
  """Yields a batch a step.

  Args:
    data: one batch, or an iterator over batches.
    steps: how many at most; by default 100 of one batch, or all.

  Raises:
    StructureError: if there is none.
  """
  if steps is not None and steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  if not isinstance(data, Iterator):
    for _ in range(100 if steps is None else steps):
      yield data
    return
  count = 0
  while steps is None or count < steps:
    try:
      batch = next(data)
    except StopIteration:
      break
    yield batch
    count += 1
  if not count:
    raise StructureError("the iterator over batches is empty")


def _check_losses(losses: np.ndarray) -> None:
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise NonFiniteError(
      f"the loss was {losses[bad[0]]} at step {bad[0]} of {losses.size}; "
      "look at the loss at the numbers given, or lower the learning rate"
    )
