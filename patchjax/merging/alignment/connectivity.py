"""Linear mode connectivity: the loss on the line between two models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from patchjax.merging import methods, running
from patchjax.merging.learning import fitting

Array = Any


@dataclasses.dataclass(frozen=True)
class Connectivity:
  """Losses along a line.

  Attributes:
    t: where: 0 is the first model, 1 the second.
    losses: there.
  """

  t: np.ndarray
  losses: np.ndarray

  def barrier(self, *, against: Literal["mean", "line"] = "mean") -> float:
    """Returns how far the loss rises between the models.

    Args:
      against: "mean": above the mean of the losses at the ends, as in Git
        Re-Basin (https://arxiv.org/abs/2209.04836, definition 2.1); "line":
        above the straight line between them, as in Entezari et al. 2022
        (https://arxiv.org/abs/2110.06296, equation 1), which is never
        negative. They agree where the ends are equally good.

    Example:
      >>> scan = Connectivity(np.array([0, 0.5, 1]), np.array([1.0, 3.0, 2.0]))
      >>> scan.barrier(), scan.barrier(against="line")
      (1.5, 1.5)
    """
    if against not in ("mean", "line"):
      raise ValueError(f"against must be 'mean' or 'line', got {against!r}")
    first, last = self.losses[0], self.losses[-1]
    level = (first + last) / 2
    if against == "line":
      level = first + self.t * (last - first)
    return float(np.max(self.losses - level))


def linear_connectivity(
  a: Any,
  b: Any,
  loss: Callable[[Any], Any],
  *,
  points: int = 25,
  traced: bool = True,
  chunk: int = 1,
) -> Connectivity:
  """Returns the loss at `(1 - t) a + t b`, for t from 0 to 1.

  Two models can be averaged without harm if the loss does not rise between
  them (Frankle et al. 2020, https://arxiv.org/abs/1912.05671).

  Args:
    a: parameters.
    b: others of the same structure.
    loss: `(params) -> scalar`; less is better.
    points: how many t, the ends among them.
    traced: whether `loss` can be traced by JAX: then one program is compiled
      for all points.
    chunk: how many points are merged and evaluated at once, if traced.

  Raises:
    MismatchError: if b does not fit a; lists every leaf.

  Example:
    >>> import jax.numpy as jnp, numpy as np, patchjax as pj
    >>> a, b = {"w": np.float32([-1])}, {"w": np.float32([1])}
    >>> scan = pj.merging.linear_connectivity(
    ...   a, b, lambda p: 1 - p["w"][0] ** 2, points=5)
    >>> scan.losses.tolist(), scan.barrier()
    ([0.0, 0.75, 1.0, 0.75, 0.0], 1.0)
  """
  if points < 2:
    raise ValueError(f"points must be at least 2, got {points}")
  fitting.check_inputs(None, [a, b], None)
  t = np.linspace(0, 1, points, dtype=np.float32)
  arrays, rebuild = fitting.parted([a, b])

  def at(t, arrays):
    weights = (1 - t, t)
    method = methods.linear(weights=jax.numpy.stack(weights), normalize=False)
    return loss(running.merge(None, rebuild(arrays), method))

  if traced:
    run = jax.jit(
      lambda t, arrays: jax.lax.map(
        lambda one: at(one, arrays), t, batch_size=chunk
      )
    )
    losses = run(t, arrays)
  else:
    losses = [at(one, arrays) for one in t]
  return Connectivity(t, np.asarray(losses, np.float64))
