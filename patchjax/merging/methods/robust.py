"""Robust aggregation: a result that a few contributors cannot pull away.

For several updates of *one* task, some of which may be broken or hostile.
They are no methods to merge different skills with: what only one of five
honest contributors has learned looks like an outlier, and each of these rules
throws it away, where a mean keeps a fifth of it. And no rule helps when most
contributors are bad, or when the attackers know the rule and stay just inside
of it, round after round.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from patchjax.merging import gram
from patchjax.merging.methods import distances, options
from patchjax.patches import transform
from patchjax.patches.transform import Transform

Array = Any
Scope = Literal["tree", "leaf"]


def median() -> Transform:
  """Returns the median of each entry; of an even number, the middle's mean.

  Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 1. Correct as
  long as fewer than half of the contributors are bad.

  For updates of one task only: of contributors with different skills it
  keeps, entry by entry, what most have in common, and drops what one of them
  alone has learned.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([x])} for x in (1, 2, 1000)]
    >>> pj.merge(None, models, pj.merging.median())["w"].tolist()
    [2.0]
  """
  return Transform.of(_MEDIAN, {})


def trimmed_mean(*, drop: int = 1) -> Transform:
  """Returns the mean of each entry without its extreme values.

  Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 2: the `drop`
  largest and the `drop` smallest values of an entry are left out; correct as
  long as at most as many contributors are bad.

  For updates of one task only: an entry that a single contributor with a
  skill of its own has moved is just what is trimmed.

  Args:
    drop: how many at either end; static. Must leave something.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([x])} for x in (1, 2, 6, 1000)]
    >>> pj.merge(None, models, pj.merging.trimmed_mean())["w"].tolist()
    [4.0]
  """
  if drop < 0:
    raise ValueError(f"drop must not be negative, got {drop}")
  return Transform.of(_TRIMMED, {}, drop=drop)


def _in_order(given: tuple[Array, ...]) -> list[Array]:
  """Sorts in each entry, by a network: k arrays stay k arrays.

  Rounds of neighbours, odd and even in turn: k rounds sort k values.
  """
  values = list(given)
  for start in range(len(values)):
    for i in range(start % 2, len(values) - 1, 2):
      a, b = values[i], values[i + 1]
      values[i], values[i + 1] = jnp.minimum(a, b), jnp.maximum(a, b)
  return values


def _middle_mean(values: list[Array]) -> Array:
  total = functools.reduce(jnp.add, values)
  if len(values) == 1:
    return total
  share = jnp.asarray(1 / len(values)).astype(total.dtype)
  return transform.rounded(total * share)


def _median(leaf, vectors, base, state, shared):
  del leaf, base, state, shared
  drop = (len(vectors) - 1) // 2
  return _middle_mean(_in_order(vectors)[drop : len(vectors) - drop])


def _trimmed(leaf, vectors, base, state, shared, *, drop):
  del leaf, base, state, shared
  k = len(vectors)
  if 2 * drop >= k:
    raise ValueError(
      f"trimmed_mean(drop={drop}) leaves nothing of {k} contributors"
    )
  return _middle_mean(_in_order(vectors)[drop : k - drop])


def _either(**others):
  del others
  return "either"


_MEDIAN = transform.register_step(
  transform.Step("median", _median, reducing=True, space=_either)
)
_TRIMMED = transform.register_step(
  transform.Step("trimmed_mean", _trimmed, reducing=True, space=_either)
)


def geometric_median(
  *,
  weights: Any = 1.0,
  iterations: int = 4,
  epsilon: Any = 1e-5,
  scope: Scope = "tree",
) -> Transform:
  """Returns the point of least total distance to the contributors.

  RFA (Pillutla et al. 2019, https://arxiv.org/abs/1912.13445, algorithm 2),
  the smoothed Weiszfeld iteration from the weighted mean:
  `z <- sum_i b_i x_i / sum_i b_i`, `b_i = w_i / max(epsilon, ||z - x_i||)`.
  Correct as long as the bad hold less than half of the weight. Every iterate
  is a combination of the contributors, so distances between them, from one
  read, are all that is needed.

  For updates of one task only: the contributor with a skill of its own is the
  farthest from the rest, and weighs least.

  Args:
    weights: one a contributor, or one for all; traced, differentiable.
    iterations: how many; static. Four, and the epsilon, are those of the
      paper's code.
    epsilon: the least distance; traced.
    scope: whether distances are those of whole models or of each leaf.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([x])} for x in (1, 2, 1000)]
    >>> method = pj.merging.geometric_median(iterations=100)
    >>> pj.merge(None, models, method)["w"].round(2).tolist()
    [2.0]
  """
  options.check("scope", scope, ("tree", "leaf"))
  numbers = {"weights": options.numbers(weights), "epsilon": epsilon}
  return Transform.of(_GEOMETRIC, numbers, iterations=iterations, scope=scope)


def _geometric(squares, state, k, *, iterations, scope):
  del scope
  weights = gram.weights_of(state, k, normalize=True).astype(squares.dtype)
  epsilon = jnp.asarray(state["epsilon"]).astype(squares.dtype)

  def step(z, _):
    pull = weights / jnp.maximum(distances.to_mean(squares, z), epsilon)
    return pull / jnp.sum(pull), None

  z, _ = lax.scan(step, weights, length=iterations)
  return z, None


_GEOMETRIC = distances.combination("geometric_median", _geometric)


def krum(
  *, attackers: int = 1, chosen: int = 1, scope: Scope = "tree"
) -> Transform:
  """Returns the contributor nearest to its nearest others.

  Krum and, with `chosen > 1`, Multi-Krum (Blanchard et al. 2017,
  https://arxiv.org/abs/1703.02757, section 4): the score of a contributor is
  the sum of its squared distances to the `k - attackers - 2` others nearest
  to it; the result is the one of the smallest score, or the mean of the
  `chosen` smallest. Of equal scores the first wins.

  For updates of one task only: among different skills it returns one of them
  and nothing of the others.

  Args:
    attackers: how many may be bad; `2 attackers + 3` contributors are needed.
    chosen: how many are averaged; static, as is `attackers`.
    scope: whether distances are those of whole models or of each leaf.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([x])} for x in (1, 3, 4, 9, 1000)]
    >>> pj.merge(None, models, pj.merging.krum())["w"].tolist()
    [3.0]
  """
  options.check("scope", scope, ("tree", "leaf"))
  if attackers < 0 or chosen < 1:
    raise ValueError(
      "krum needs attackers >= 0 and chosen >= 1, got "
      f"attackers={attackers}, chosen={chosen}"
    )
  return Transform.of(
    _KRUM, {}, attackers=attackers, chosen=chosen, scope=scope
  )


def _krum(squares, state, k, *, attackers, chosen, scope):
  del state, scope
  if k < 2 * attackers + 3 or chosen > k:
    raise ValueError(
      f"krum(attackers={attackers}, chosen={chosen}) needs at least "
      f"{max(2 * attackers + 3, chosen)} contributors, got {k}"
    )
  # In each row the first is the distance to itself.
  near = jnp.sort(squares, axis=1)[:, 1 : k - attackers - 1]
  scores = jnp.sum(near, axis=1)
  place = jnp.argsort(jnp.argsort(scores))  # both are stable
  kept = place < jnp.asarray(chosen, place.dtype)
  return kept.astype(squares.dtype), 1 / chosen


_KRUM = distances.combination("krum", _krum)


def centered_clipping(
  *, radius: Any = 1.0, iterations: int = 1, scope: Scope = "tree"
) -> Transform:
  """Returns the base plus the mean of the task vectors, cut to a radius.

  Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, equation 7: from
  the base, `z <- z + mean_i (x_i - z) min(1, radius / ||x_i - z||)`. The paper
  starts from the aggregate of the round before: let that be the base. (Its code
  starts from zero.)

  For updates of one task only; and an attacker who has seen earlier rounds
  can stay inside the radius and still pull in one direction, round after
  round.

  Args:
    radius: tau; traced, differentiable.
    iterations: how many; static.
    scope: whether lengths are those of whole models or of each leaf.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x])} for x in (0, 1, 1000))
    >>> method = pj.merging.centered_clipping(radius=2.0)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [1.5]
  """
  options.check("scope", scope, ("tree", "leaf"))
  return Transform.of(
    _CLIPPING, {"radius": radius}, iterations=iterations, scope=scope
  )


def _clipping(dots, state, k, *, iterations, scope):
  del scope
  radius = jnp.asarray(state["radius"]).astype(dots.dtype)
  share = jnp.asarray(1 / k).astype(dots.dtype)
  one, tiny = (jnp.asarray(x).astype(dots.dtype) for x in (1, 1e-30))

  def step(z, _):
    # ||x_i - z||^2, of z as a combination of the task vectors.
    to = jnp.sum(dots * z[None, :], axis=1)
    squares = jnp.diagonal(dots) - to - to + jnp.sum(z * to)
    length = jnp.sqrt(jnp.maximum(squares, tiny))
    pull = share * jnp.minimum(one, radius / length)
    return z - jnp.sum(pull) * z + pull, None

  z, _ = lax.scan(step, jnp.zeros((k,), dots.dtype), length=iterations)
  return z


_CLIPPING = gram.combination(
  "centered_clipping",
  _clipping,
  space=lambda **_: "deltas",
  scope=lambda *, scope="tree", **_: scope,
)
