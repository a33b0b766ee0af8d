"""Methods that choose in each entry which contributors count, and how much."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from patchjax.merging.energies import weigh_by_energy
from patchjax.merging.importance import keep_important
from patchjax.merging.methods import options
from patchjax.merging.steps import scale as scaled
from patchjax.patches import counting, transform
from patchjax.patches.transform import Transform, chain
from patchjax.trees.errors import SelectionError

Flavour = Literal["paper", "mergekit"]


def sce(*, density: Any = 1.0, flavour: Flavour = "paper") -> Transform:
  """Returns SCE: select by variance, weigh by energy, erase minority signs.

  Wan et al. 2024 (https://arxiv.org/abs/2408.07990), in each leaf: the
  `floor(density n)` entries of the largest variance over contributors, of the
  n where they differ, give the weights `w_i = mean(d_i^2)`; then `base +
  sum_i w_i d_i / sum_i w_i` over those whose sign is that of the sum (zero
  counts as positive).

  Args:
    density: share that is selected (mergekit's `select_topk`); traced; has no
      derivative.
    flavour: "paper": as in the authors' code, the selection shapes only the
      weights; all entries are elected and averaged. "mergekit": entries that
      are not selected stay at the base; and where the mean squares sum to
      less than 1e-6, as they mostly do, all weights are equal.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [3, -1]))
    >>> pj.merge(base, [a, b], pj.merging.sce())["w"].tolist()
    [2.3333332538604736, 2.0]
  """
  options.check_flavour(flavour)
  return weigh_by_energy(density=density, flavour=flavour)


def ram(*, threshold: Any = 1e-5) -> Transform:
  """Returns RAM: each entry is the mean over the contributors that moved it.

  Reinforced agent merging (https://arxiv.org/abs/2601.13572): with
  `a_i = |x_i - base| > threshold` in each entry,
  `base + sum_i a_i (x_i - base) / max(sum_i a_i, 1)`.

  Args:
    threshold: change from which on a contributor takes part; traced.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [3, 0]))
    >>> pj.merge(base, [a, b], pj.merging.ram())["w"].tolist()
    [2.0, 2.0]
  """
  return Transform.of(_RAM, {"threshold": threshold})


def ramplus(
  *,
  r: Any = 0.1,
  alpha: Any = None,
  threshold: Any = 1e-5,
  scope: Literal["tree", "leaf"] | None = None,
  flavour: Flavour = "paper",
) -> Transform:
  """Returns RAM+: RAM, where what only one contributor moved is enlarged.

  https://arxiv.org/abs/2601.13572: entries that contributor i alone moved are
  multiplied by `1 + r min(rho_i, alpha)`, rho_i the number of entries that it
  moved with others over that of its own.

  Args:
    r: the largest gain is r alpha (the authors' `rescale_factor` is 1 + r);
      traced, differentiable.
    alpha: bound of rho; by default 1 as in the authors' code, in mergekit 0.2.
    threshold: change from which on a contributor takes part; traced.
    scope: whether rho is counted over the model ("tree") or in each leaf.
    flavour: "paper": scope "tree"; "mergekit" (`ramplus_tl`): scope "leaf".

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [3, 0]))
    >>> pj.merge(base, [a, b], pj.merging.ramplus(r=0.5))["w"].tolist()
    [2.0, 3.0]
  """
  options.check_flavour(flavour)
  paper = flavour == "paper"
  scope = scope or ("tree" if paper else "leaf")
  options.check("scope", scope, ("tree", "leaf"))
  alpha = (1.0 if paper else 0.2) if alpha is None else alpha
  numbers = {"r": r, "alpha": alpha, "threshold": threshold}
  return Transform.of(_RAMPLUS, numbers, scope=scope)


def nearswap(*, t: Any, flavour: Flavour = "paper") -> Transform:
  """Returns NearSwap: the base moves to the contributor by at most t.

  `base + min(1, t / |x - base|) (x - base)`: parameters that are near each
  other are swapped, others move by t
  (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, whose t is
  0.0001). One contributor.

  Args:
    t: the distance; traced, differentiable.
    flavour: "mergekit": distances below 1e-6 count as 1e-6, which matters for
      a t below that.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0, 0], [0.25, -2]))
    >>> pj.merge(base, [tuned], pj.merging.nearswap(t=0.5))["w"].tolist()
    [0.25, -0.5]
  """
  options.check_flavour(flavour)
  return Transform.of(_NEAR, {"t": t}, floor=flavour == "mergekit")


def arcee_fusion() -> Transform:
  """Returns Arcee Fusion: take the entries whose importance is an outlier.

  No paper; defined by mergekit (https://github.com/arcee-ai/mergekit,
  `arcee_fusion`; https://arxiv.org/abs/2403.13257). Importance is
  `|x - base| KL(softmax(x) || softmax(base))`, softmax over rows of the last
  axis, 1e-8 added to both; entries of at least median + 1.5 (q3 - q1) of
  their leaf are taken from the contributor, the others from the base.
  Quantiles are exact, entries floor(q (n - 1)) in order from 0, where
  mergekit takes a random sample of leaves of more than a million entries. One
  contributor.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((4, 4), np.float32)}
    >>> tuned = {"w": np.diag(np.float32([0, 0, 0, 5]))}
    >>> pj.merge(base, [tuned], pj.merging.arcee_fusion())["w"][3].tolist()
    [0.0, 0.0, 0.0, 5.0]
  """
  return keep_important()


def magmax(*, scale: Any = 0.5) -> Transform:
  """Returns MagMax: in each entry the change of the largest magnitude.

  Marczak et al. 2024 (https://arxiv.org/abs/2407.06322, equation 4): `base +
  scale * d_j` with `j = argmax_i |x_i - base|`; of equal magnitudes the last.

  Args:
    scale: lambda, 0.5 in the paper's scripts; traced, differentiable.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 2], [-3, 1]))
    >>> pj.merge(base, [a, b], pj.merging.magmax())["w"].tolist()
    [-1.5, 1.0]
  """
  return chain(Transform.of(_LARGEST, {}), scaled(scale))


def _moved(deltas, state):
  """Which entries each contributor moved."""
  least = jnp.asarray(state["threshold"]).astype(deltas[0].dtype)
  return tuple(jnp.abs(d) > least for d in deltas)


def _numbers_of(moved, dtype):
  """By how many contributors each entry was moved."""
  return functools.reduce(jnp.add, (m.astype(dtype) for m in moved))


def _shared_mean(deltas, moved, gains):
  number = _numbers_of(moved, deltas[0].dtype)
  one, zero = jnp.ones_like(number), jnp.zeros_like(number)
  total = zero
  for d, m, gain in zip(deltas, moved, gains):
    if gain is not None:
      gained = transform.rounded(d * gain.astype(d.dtype))
      d = jnp.where(number == one, gained, d)
    total = total + jnp.where(m, d, zero)
  return total / jnp.maximum(number, one)


def _ram(leaf, deltas, base, state, shared):
  del leaf, base, shared
  return _shared_mean(deltas, _moved(deltas, state), [None] * len(deltas))


_RAM = transform.register_step(
  transform.Step(name="ram", update=_ram, reducing=True)
)


def _ramplus_start(state, shapes, k, *, scope):
  del state, shapes, scope
  return np.zeros(k, np.float32)


def _ramplus_reduce(leaf, deltas, state, carry, *, scope):
  del carry, scope
  moved = _moved(deltas, state)
  number = _numbers_of(moved, jnp.int32)
  one = jnp.ones_like(number)
  masks = [m & (number > one) for m in moved]
  masks += [m & (number == one) for m in moved]
  counts = [
    counting.count_true(tuple(masks[i : i + 8]), local=leaf.local)
    for i in range(0, len(masks), 8)
  ]
  return jnp.concatenate(counts, axis=1)


def _ramplus_finish(total, carry):
  del carry
  shared, own = jnp.split(counting.number_of(total), 2)
  # Nothing of its own: as large as can be, if it has anything.
  return shared / jnp.maximum(own, jnp.float32(1e-12)), jnp.asarray(True)


def _ramplus(leaf, deltas, base, state, rho, *, scope):
  del leaf, base, scope
  r, alpha = (jnp.asarray(state[x]).astype(jnp.float32) for x in ("r", "alpha"))
  gains = jnp.float32(1) + transform.rounded(r * jnp.minimum(rho, alpha))
  return _shared_mean(deltas, _moved(deltas, state), list(gains))


_RAMPLUS = transform.register_step(
  transform.Step(
    name="ramplus",
    update=_ramplus,
    start=_ramplus_start,
    counts=transform.one_count(_ramplus_reduce, _ramplus_finish),
    reducing=True,
    scope=lambda *, scope: scope,
  )
)


def _near(leaf, deltas, base, state, shared, *, floor):
  del leaf, base, shared
  if len(deltas) != 1:
    raise SelectionError(
      f"nearswap takes one contributor, got {len(deltas)}; choose which"
    )
  (d,) = deltas
  t = jnp.asarray(state["t"]).astype(d.dtype)
  distance = jnp.abs(d)
  if floor:
    distance = jnp.maximum(distance, jnp.asarray(1e-6, d.dtype))
  # Written without a quotient where all of the difference is taken.
  near = distance <= t
  safe = jnp.where(near, jnp.ones_like(d), distance)
  return jnp.where(near, d, transform.rounded(d * (t / safe)))


_NEAR = transform.register_step(
  transform.Step(name="nearswap", update=_near, reducing=True)
)


def _largest(leaf, deltas, base, state, shared):
  del leaf, base, state, shared
  return functools.reduce(
    lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a), deltas
  )


_LARGEST = transform.register_step(
  transform.Step(name="largest_change", update=_largest, reducing=True)
)
