"""AdaMerging: merging coefficients from inputs alone, by test entropy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from patchjax.merging import inputs, running
from patchjax.merging.learning import fitting
from patchjax.merging.steps import elect_sign, weighted_sum
from patchjax.patches.codes import Dense
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.patches.perleaf import PerLeaf
from patchjax.patches.transform import chain
from patchjax.patches.trimming import trim
from patchjax.trees.dtypes import is_array
from patchjax.trees.names import named_leaves

Array = Any
Level = Literal["task", "layer", "leaf"]

_LAYER = re.compile(r".*?(?:^|[/._])\d+(?=[/._]|$)")


def adamerging(
  base: Any,
  contributors: Sequence[Any],
  apply_fn: Callable[[Any, Any], Array] | Sequence[Callable[[Any, Any], Array]],
  data: Any,
  *,
  level: Level = "leaf",
  plus_plus: bool = False,
  density: Any = 0.2,
  init: Any = 0.3,
  clip: bool = True,
  optimizer: Any = None,
  steps: int | None = None,
) -> fitting.Fitted:
  """Returns the merge whose coefficients make predictions most certain.

  AdaMerging (Yang et al. 2024, https://arxiv.org/abs/2310.02575):
  `base + sum_k c_k (x_k - base)`, where the coefficients c minimise the
  entropy of the merged model's predictions (equations 5 and 6) on inputs
  without labels: the sum over tasks of the mean over their examples. Like
  the released code, coefficients start at 0.3, are used clipped to [0, 1],
  and are learned by Adam of learning rate 1e-3 for 500 steps. (That code adds
  up two batches of 16 inputs a task in each step, which makes its loss twice
  the one here for batches of 32. Adam does not see a factor.)

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    apply_fn: `(params, inputs) -> [..., classes]` logits; or one for each
      task, if each has a head of its own.
    data: the inputs of each task, a sequence, for all steps; or an iterator
      (with `__next__`) over such sequences, one a step.
    level: how many coefficients a contributor has. "task": one (task-wise
      AdaMerging); "layer": one for each layer, that is for leaves whose names
      agree up to their first integer (`blocks/3/...`), and for leaves without
      one by what holds them; "leaf": one for each leaf, as the released code
      does under the name of layer-wise.
    plus_plus: AdaMerging++: of the task vectors only the entries are used
      that TIES keeps, trimmed and then elected by sign, as in the released
      code. They are found once, and held in float32 beside the contributors.
    density: share of the model that `plus_plus` keeps.
    init: the first coefficients: a number, or one a contributor.
    clip: whether coefficients are clipped. Those outside get no gradient.
    optimizer: an optax optimizer; by default `optax.adam(1e-3)`.
    steps: how many; by default 500, or all of an iterator.

  Returns:
    The merge, its coefficients (clipped; `[k]`, or a `PerLeaf` of them), for
    `task_arithmetic(weights=...)`, and the entropies before each step.

  Raises:
    MismatchError: if a contributor does not fit; lists every leaf.
    NonFiniteError: if the entropy is NaN or Inf.
    TypeError: if the inputs are one array, not a sequence of one a task.
    ValueError: if tasks and heads are not equally many, or for a bad option.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> base = {"w": np.float32([[0.1, 0], [0, 0.1]])}
    >>> tuned = [{"w": np.float32([[1, 0], [0, 0.1]])},
    ...          {"w": np.float32([[0.1, 0], [0, 1]])}]
    >>> x = np.eye(2, dtype=np.float32)
    >>> found = pj.merging.adamerging(
    ...   base, tuned, lambda p, x: x @ p["w"], [x[:1], x[1:]], level="task",
    ...   steps=20)
    >>> bool(found.losses[-1] < found.losses[0]), found.numbers.round(2)
    (True, Array([0.32, 0.32], dtype=float32))
  """
  if level not in ("task", "layer", "leaf"):
    raise ValueError(f"level must be 'task', 'layer' or 'leaf', got {level!r}")
  if is_array(data):
    raise TypeError(
      f"data is an array of shape {data.shape}; give the inputs of each task: "
      "[inputs_of_a, inputs_of_b]"
    )
  if optimizer is None:
    import optax

    optimizer = optax.adam(1e-3)
  if steps is None and not isinstance(data, Iterator):
    steps = 500
  fitting.check_inputs(base, contributors, None)
  if plus_plus:
    contributors = _elected(base, contributors, density)
  k = len(contributors)
  floats = inputs.floats_of(named_leaves(base), None)
  groups = {name: _group(name, level) for name in floats}
  start = jnp.broadcast_to(jnp.asarray(init, jnp.float32), (k,))

  def effective(numbers: dict[str, Array]) -> Any:
    bounded = {g: _clipped(c) if clip else c for g, c in numbers.items()}
    if level == "task":
      return bounded[""]
    return PerLeaf({name: bounded[group] for name, group in groups.items()})

  def loss(params: Any, batch: Sequence[Any]) -> Array:
    terms = [
      jnp.mean(prediction_entropy(apply(params, x)))
      for apply, x in zip(_each(apply_fn, batch), batch, strict=True)
    ]
    return sum(terms[1:], terms[0])

  found = fitting.fit_numbers(
    base,
    contributors,
    lambda numbers: weighted_sum(weights=effective(numbers)),
    dict.fromkeys(groups.values(), start),
    loss,
    data if isinstance(data, Iterator) else tuple(data),
    optimizer=optimizer,
    steps=steps,
  )
  return fitting.Fitted(found.merged, effective(found.numbers), found.losses)


def prediction_entropy(logits: Array) -> Array:
  """Returns `-sum_c p_c log p_c` of predictions, in nats.

  Args:
    logits: `[..., classes]`.

  Returns:
    float32 `[...]`.

  Example:
    >>> import numpy as np
    >>> prediction_entropy(np.zeros((2, 4), np.float32)).round(4)
    Array([1.3863, 1.3863], dtype=float32)
  """
  log_p = jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32))
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _clipped(c: Array) -> Array:
  # The derivative at a bound itself is 1, as torch.clamp has it.
  inside = (c >= jnp.float32(0)) & (c <= jnp.float32(1))
  bounded = jnp.clip(c, jnp.float32(0), jnp.float32(1))
  return jnp.where(inside, c, jax.lax.stop_gradient(bounded))


def _group(name: str, level: Level) -> str:
  if level == "task":
    return ""
  if level == "leaf":
    return name
  found = _LAYER.match(name)
  return found.group() if found else name.rpartition("/")[0]


def _each(apply_fn: Any, batch: Sequence[Any]) -> Sequence[Any]:
  if callable(apply_fn):
    return [apply_fn] * len(batch)
  if len(apply_fn) != len(batch):
    raise ValueError(
      f"{len(apply_fn)} functions were given for the inputs of {len(batch)} "
      "tasks; give one for all, or one a task"
    )
  return apply_fn


def _elected(
  base: Any, contributors: Sequence[Any], density: Any
) -> list[Patch]:
  """Returns what TIES keeps of each contributor, before it is averaged."""
  named = named_leaves(base)
  sources = inputs.changed_of(
    named, inputs.sources_of(named, contributors, same=True)
  )
  kept = running.run_leaves(
    inputs.floats_of(named, None),
    sources,
    chain(trim(density=density, one_more=True), elect_sign()),
    None,
    as_params=False,
  )
  return [
    Patch({name: Delta(Dense(ds[i]), "add") for name, ds in kept.items()})
    for i in range(len(contributors))
  ]
