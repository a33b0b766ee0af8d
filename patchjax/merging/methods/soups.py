"""Averages over models of one run or one sweep: soups, WiSE-FT, EMA, LAWA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from patchjax.merging import inputs, steps
from patchjax.patches import laws, transform
from patchjax.patches.transform import Transform
from patchjax.trees.errors import StructureError
from patchjax.trees.names import flatten

Array = Any


def uniform_soup() -> Transform:
  """Returns the plain mean of the contributors' parameters.

  The uniform soup of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482,
  section 2); `linear` with equal weights. One contributor is the result.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([1])}, {"w": np.float32([4])}
    >>> pj.merge(None, [a, b], pj.merging.uniform_soup())["w"].tolist()
    [2.5]
  """
  return steps.mean()


def wise_ft(*, alpha: Any = 0.5) -> Transform:
  """Returns `(1 - alpha) base + alpha x`, of one contributor x.

  WiSE-FT (Wortsman et al. 2021, https://arxiv.org/abs/2109.01903, equation
  1): between the zero-shot model and the fine-tuned one. With alpha 1 the
  result is the contributor, with 0 the base, bit for bit.

  Args:
    alpha: the paper recommends 0.5 where nothing is known; traced,
      differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = {"w": np.float32([1])}, {"w": np.float32([5])}
    >>> method = pj.merging.wise_ft(alpha=0.25)
    >>> pj.merge(base, [tuned], method)["w"].tolist()
    [2.0]
  """
  return Transform.of(_WISE, {"alpha": alpha})


def _wise(leaf, params, base, state, shared):
  del leaf, shared
  if len(params) != 1:
    raise ValueError(
      f"wise_ft takes one contributor beside the base, got {len(params)}; "
      "average the others first (uniform_soup)"
    )
  (x,) = params
  alpha = jnp.asarray(state["alpha"]).astype(x.dtype)
  rest = jnp.ones_like(alpha) - alpha
  return transform.rounded(rest * base) + transform.rounded(alpha * x)


_WISE = transform.register_step(
  transform.Step(
    "wise_ft",
    _wise,
    reducing=True,
    space=lambda **_: "params",
    needs_base=True,
    carries_nonfinite=True,
  )
)


def ema(*, decay: Any = 0.9) -> Transform:
  """Returns the exponential moving average of checkpoints, the oldest first.

  `a_0 = x_0`, `a_i = decay a_(i-1) + (1 - decay) x_i`, as of a mean teacher
  (Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780, equation 2).

  Args:
    decay: traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> run = [{"w": np.float32([x])} for x in (0, 8, 8)]
    >>> pj.merge(None, run, pj.merging.ema(decay=0.5))["w"].tolist()
    [6.0]
  """
  return Transform.of(_EMA, {"decay": decay})


def _ema(leaf, vectors, base, state, shared):
  del leaf, base, shared
  decay = jnp.asarray(state["decay"]).astype(vectors[0].dtype)
  rest = jnp.ones_like(decay) - decay
  mean, *others = vectors
  for x in others:
    mean = transform.rounded(decay * mean) + transform.rounded(rest * x)
  return mean


_EMA = transform.register_step(
  transform.Step(
    "ema",
    _ema,
    reducing=True,
    space=lambda **_: "either",
    carries_nonfinite=True,
  )
)


def lawa(*, window: int | None = None) -> Transform:
  """Returns the mean of the last checkpoints of a run, the oldest first.

  LAWA (Kaddour 2022, https://arxiv.org/abs/2209.14981). What weighs the
  checkpoints otherwise (a decay that is merged instead of trained) is
  `linear(weights=...)`.

  Args:
    window: how many of the last; all by default. Static.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> run = [{"w": np.float32([x])} for x in (0, 1, 3)]
    >>> pj.merge(None, run, pj.merging.lawa(window=2))["w"].tolist()
    [2.0]
  """
  if window is not None and window < 1:
    raise ValueError(f"window must be at least 1, got {window}")
  return Transform.of(_LAWA, {}, window=window)


def _lawa(leaf, vectors, base, state, shared, *, window):
  del leaf, base, state, shared
  if window is not None and window > len(vectors):
    raise ValueError(
      f"lawa(window={window}) needs as many checkpoints, got {len(vectors)}"
    )
  last = vectors if window is None else vectors[-window:]
  total = functools.reduce(jnp.add, last)
  share = jnp.asarray(1 / len(last)).astype(total.dtype)
  return transform.rounded(total * share)


_LAWA = transform.register_step(
  transform.Step("lawa", _lawa, reducing=True, space=lambda **_: "either")
)


def greedy_soup(
  models: Sequence[Any], score: Callable[[Any], Any]
) -> tuple[Any, list[int]]:
  """Returns the mean of models that were added while they helped.

  Recipe 1 of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482): models
  are tried by falling score, and one stays if the mean with it scores
  strictly better than the mean without it. Of equal scores the later model
  is tried first, as in the released code.

  One running sum in float32 is kept, never a stack: beside the models there
  are two more in memory, and trying all of them compiles one program a shape.

  Args:
    models: pytrees of one structure. What is not floating point must agree.
    score: called with a model, returns a number; larger is better, on data
      that is held out.

  Returns:
    the mean, and the indices of its models in the order they were added.

  Raises:
    MismatchError: if a model does not fit the first; lists every leaf.
    StructureError: if there is no model.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([x])} for x in (0, 4, 9)]
    >>> merged, kept = pj.merging.greedy_soup(
    ...   models, lambda model: -abs(float(model["w"][0]) - 3)
    ... )
    >>> kept
    [1]
  """
  if not models:
    raise StructureError("there is nothing to merge: models is empty")
  first, treedef = flatten(models[0])
  leaves = inputs.sources_of(first, list(models), same=True)
  floats = inputs.floats_of(first, None)
  inputs.check_narrow(floats)
  rest = [n for n in first if n not in floats and inputs.is_array(first[n])]
  fixed = first | inputs.agreed(first, leaves, rest)

  def soup(total, count):
    mean = {
      name: _mean_of(x, count, floats[name].dtype) for name, x in total.items()
    }
    return jax.tree.unflatten(treedef, (fixed | mean).values())

  def added(total, i):
    return {
      name: _added(
        None if total is None else total[name],
        inputs.on_device(leaves[i][name], first[name]),
      )
      for name in floats
    }

  scores = [float(score(model)) for model in models]
  order = sorted(range(len(models)), key=scores.__getitem__)[::-1]
  kept, best = order[:1], scores[order[0]]
  total = added(None, order[0])
  for i in order[1:]:
    trial = added(total, i)
    value = float(score(soup(trial, len(kept) + 1)))
    if value > best:
      kept, best, total = [*kept, i], value, trial
  return soup(total, len(kept)), kept


@jax.jit
def _added(total, leaf):
  wide = leaf.astype(laws.compute_dtype(leaf))
  return wide if total is None else total + wide


@functools.partial(jax.jit, static_argnums=(2,))
def _mean_of(total, count, dtype):
  share = 1 / jnp.asarray(count).astype(total.dtype)
  return transform.rounded(total * share).astype(dtype)
