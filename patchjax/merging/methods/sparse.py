"""Methods that sparsify each task vector, and then add or elect.

All are one chain: a selection (at random, by rank, or both), then weights,
with or without TIES's election of signs.
"""

from __future__ import annotations

from typing import Any, Literal

from patchjax.merging import steps
from patchjax.merging.dropping import drop
from patchjax.merging.dropping_by_rank import drop_by_rank
from patchjax.merging.masks import Rng
from patchjax.merging.methods import options
from patchjax.merging.middling import keep_between
from patchjax.merging.rescaling import keep_l1
from patchjax.patches.transform import Transform, chain
from patchjax.patches.trimming import trim

Flavour = Literal["paper", "mergekit"]


def dare_linear(
  *,
  density: Any = 0.5,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = False,
  rescale: bool = True,
  key: Any = 0,
  rng: Rng = "hash",
  flavour: Flavour = "paper",
) -> Transform:
  """Returns DARE: drop entries at random, rescale, then task arithmetic.

  Yu et al. 2024 (https://arxiv.org/abs/2311.03099, section 3):
  `base + scale * sum_i w_i m_i (x_i - base) / density` with
  `m_i ~ Bernoulli(density)` in each entry. Masks depend on key, name of the
  leaf, contributor and place of the entry alone (`keep_mask`).

  Args:
    density: probability of being kept (the paper's 1 - p), one a contributor
      or one for all; traced; has no derivative.
    weights: one a contributor; traced, differentiable; by default 1.
    scale: lambda; traced, differentiable.
    normalize: whether to divide by the sum of the weights.
    rescale: whether to make up for what is dropped.
    key: a seed or a PRNG key.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    flavour: "paper": each entry is divided by the density. "mergekit": each
      leaf is scaled back to its L1 norm.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, ones = ({"w": np.full(4, x, np.float32)} for x in (0, 1))
    >>> method = pj.merging.dare_linear(density=0.5, key=1)
    >>> set(pj.merge(base, [ones], method)["w"].tolist()) == {0.0, 2.0}
    True
  """
  options.check_flavour(flavour)
  dropped = _dropped(density, rescale, key, rng, flavour)
  return chain(dropped, *_added(weights, scale, normalize))


def dare_ties(
  *,
  density: Any = 0.5,
  trim: Any = 0.2,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool | None = None,
  rescale: bool = True,
  key: Any = 0,
  rng: Rng = "hash",
  flavour: Flavour = "paper",
) -> Transform:
  """Returns DARE followed by TIES.

  Yu et al. 2024 (https://arxiv.org/abs/2311.03099, section 3.3). In the
  paper's code all of TIES (https://arxiv.org/abs/2306.01708) is run on the
  dropped task vectors, the trim over the whole model too.

  Args:
    density: probability of being kept by DARE, one a contributor or one for
      all; traced; has no derivative.
    trim: share of the model that TIES then keeps; not used by mergekit.
    weights: one a contributor; traced, differentiable; by default 1. They
      weigh the mean; in mergekit the election too.
    scale: lambda; traced, differentiable.
    normalize: whether to take the mean of what agrees, or else the sum; by
      default as in the paper (mean) or in mergekit (sum).
    rescale: whether to make up for what DARE drops.
    key: a seed or a PRNG key.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    flavour: "paper"; or "mergekit": no trim, each leaf scaled back to its L1
      norm, weights in the election, where a zero sum counts as positive.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, ones = ({"w": np.full(8, x, np.float32)} for x in (0, 1))
    >>> merged = pj.merge(base, [ones] * 2, pj.merging.dare_ties())["w"]
    >>> set(merged.tolist()) <= {0.0, 2.0}
    True
  """
  options.check_flavour(flavour)
  dropped = _dropped(density, rescale, key, rng, flavour)
  if flavour == "mergekit":
    return chain(dropped, *_elected(weights, scale, bool(normalize)))
  weights = options.numbers(weights)
  mean = steps.disjoint_mean(weights=weights)
  if normalize is not None and not normalize:
    mean = steps.weighted_sum(weights=1.0 if weights is None else weights)
  return chain(
    dropped,
    _trim(density=options.numbers(trim), one_more=True),
    steps.elect_sign(),
    mean,
    steps.scale(scale),
  )


def della(
  *,
  density: Any = 0.5,
  epsilon: Any = 0.15,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = True,
  rescale: bool = True,
  key: Any = 0,
  rng: Rng = "hash",
  flavour: Flavour = "paper",
) -> Transform:
  """Returns DELLA: drop small entries more often, elect signs, average.

  Deep et al. 2024 (https://arxiv.org/abs/2406.11617, MagPrune): an entry of
  rank r (from 0 at the least magnitude) in a row of n is kept with
  `p = density - epsilon + 2 epsilon r / (n - 1)` and divided by p; then
  `base + scale * sum_i w_i d_i / sum_i w_i` over those d_i whose sign is that
  of their sum. Of equal magnitudes the first in the row ranks lower; a row of
  one entry has p = density; a contributor of density 1 is left as it is.

  Args:
    density: mean probability of being kept, one a contributor or one for all;
      traced; has no derivative.
    epsilon: half of the range of probabilities (half of the `window_size` of
      the paper's code); traced; has no derivative.
    weights: one a contributor; traced, differentiable; by default 1. They
      multiply before the election.
    scale: lambda; traced, differentiable.
    normalize: whether to divide by the weights of what agrees.
    rescale: whether to make up for what is dropped.
    key: a seed or a PRNG key.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    flavour: "paper": rows lie along the last axis, each entry is divided by
      its p. "mergekit": rows lie along the second axis, each leaf is scaled
      back to its L1 norm.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, ones = ({"w": np.full(8, x, np.float32)} for x in (0, 1))
    >>> pj.merge(base, [ones] * 2, pj.merging.della(density=1.0))["w"].tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
  """
  pruned = _pruned(density, epsilon, rescale, key, rng, flavour)
  return chain(pruned, *_elected(weights, scale, normalize))


def della_linear(
  *,
  density: Any = 0.5,
  epsilon: Any = 0.15,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = False,
  rescale: bool = True,
  key: Any = 0,
  rng: Rng = "hash",
  flavour: Flavour = "paper",
) -> Transform:
  """Returns DELLA without the election of signs.

  `base + scale * sum_i w_i d_i` with d_i as in `della` (Deep et al. 2024,
  https://arxiv.org/abs/2406.11617; an ablation in the paper's code).

  Args:
    density: mean probability of being kept, see `della`.
    epsilon: half of the range of probabilities, see `della`.
    weights: one a contributor; traced, differentiable; by default 1.
    scale: lambda; traced, differentiable.
    normalize: whether to divide by the sum of the weights.
    rescale: whether to make up for what is dropped.
    key: a seed or a PRNG key.
    rng: "hash", or "threefry" for JAX's generator, thirty times the work.
    flavour: see `della`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, ones = ({"w": np.full(2, x, np.float32)} for x in (0, 1))
    >>> method = pj.merging.della_linear(density=1.0, scale=0.5)
    >>> pj.merge(base, [ones] * 3, method)["w"].tolist()
    [1.5, 1.5]
  """
  pruned = _pruned(density, epsilon, rescale, key, rng, flavour)
  return chain(pruned, *_added(weights, scale, normalize))


def breadcrumbs(
  *,
  density: Any = 0.1,
  gamma: Any = 0.01,
  scope: Literal["row", "leaf", "tree"] | None = None,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = False,
  rescale: bool = False,
  flavour: Flavour = "paper",
) -> Transform:
  """Returns Model Breadcrumbs: task arithmetic of the entries in the middle.

  Davari and Belilovsky 2024 (https://arxiv.org/abs/2312.06795, section 3):
  `base + scale * sum_i w_i m_i (x_i - base)`, where m_i masks, of n entries,
  the `floor(gamma n)` largest magnitudes and all after the next
  `floor(density n)`. Of equal magnitudes the first in order is the larger. A
  leaf that is one number stays whole.

  Args:
    density: share that is kept, one a contributor or one for all; traced; has
      no derivative.
    gamma: share of the largest that go.
    scope: what n entries are: "row", those along the last axis, as in the
      paper's code; "leaf", as in mergekit; "tree".
    weights: one a contributor; traced, differentiable; by default 1.
    scale: the paper's alpha; traced, differentiable.
    normalize: whether to divide by the sum of the weights.
    rescale: whether to scale each leaf back to its L1 norm (mergekit).
    flavour: "paper"; or "mergekit": scope "leaf", and fewer of the largest go
      where otherwise fewer than `floor(density n)` stayed, none where the
      density is 1.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, tuned = ({"w": np.float32(x)} for x in ([0] * 4, [1, -4, 3, 2]))
    >>> method = pj.merging.breadcrumbs(density=0.5, gamma=0.25)
    >>> pj.merge(base, [tuned], method)["w"].tolist()
    [0.0, 0.0, 3.0, 2.0]
  """
  middle = _middle(density, gamma, scope, rescale, flavour)
  return chain(middle, *_added(weights, scale, normalize))


def breadcrumbs_ties(
  *,
  density: Any = 0.1,
  gamma: Any = 0.01,
  scope: Literal["row", "leaf", "tree"] | None = None,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = False,
  rescale: bool = False,
  flavour: Flavour = "paper",
) -> Transform:
  """Returns Model Breadcrumbs with the election of signs of TIES.

  A combination of mergekit's: the entries that `breadcrumbs` keeps
  (https://arxiv.org/abs/2312.06795), weighted; of those the ones whose sign
  is that of their sum (https://arxiv.org/abs/2306.01708; zero counts as
  positive): `base + scale * sum_i w_i d_i`.

  Args:
    density: share that is kept, see `breadcrumbs`.
    gamma: share of the largest that go.
    scope: what the shares are of, see `breadcrumbs`.
    weights: one a contributor; traced, differentiable; by default 1. They
      multiply before the election.
    scale: lambda; traced, differentiable.
    normalize: whether to divide by the weights of what agrees.
    rescale: whether to scale each leaf back to its L1 norm (mergekit).
    flavour: see `breadcrumbs`.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32([x, x])} for x in (0, 3, -1))
    >>> method = pj.merging.breadcrumbs_ties(density=1.0, gamma=0.0)
    >>> pj.merge(base, [a, b], method)["w"].tolist()
    [3.0, 3.0]
  """
  middle = _middle(density, gamma, scope, rescale, flavour)
  return chain(middle, *_elected(weights, scale, normalize))


_trim = trim  # Where an argument has that name.


def _dropped(density, rescale, key, rng, flavour):
  norms = rescale and flavour == "mergekit"
  step = drop(
    density=options.numbers(density),
    key=key,
    rng=rng,
    rescale=rescale and not norms,
  )
  return keep_l1(step) if norms else step


def _pruned(density, epsilon, rescale, key, rng, flavour):
  options.check_flavour(flavour)
  norms = rescale and flavour == "mergekit"
  step = drop_by_rank(
    density=options.numbers(density),
    epsilon=options.numbers(epsilon),
    key=key,
    rng=rng,
    rescale=rescale and not norms,
    axis=1 if flavour == "mergekit" else -1,
  )
  return keep_l1(step) if norms else step


def _middle(density, gamma, scope, rescale, flavour):
  options.check_flavour(flavour)
  mergekit = flavour == "mergekit"
  step = keep_between(
    density=options.numbers(density),
    gamma=options.numbers(gamma),
    scope=scope or ("leaf" if mergekit else "row"),
    fill=mergekit,
  )
  return keep_l1(step) if rescale else step


def _added(weights, scale, normalize):
  """Task arithmetic."""
  weights = 1.0 if weights is None else options.numbers(weights)
  total = steps.weighted_sum(weights=weights, normalize=normalize)
  return total, steps.scale(scale)


def _elected(weights, scale, normalize):
  """Election of signs after the weights, then mean or sum."""
  weights = options.numbers(weights)
  total = steps.disjoint_mean(weights=weights, in_sum=False)
  if not normalize:
    total = steps.weighted_sum()
  elect = steps.elect_sign(zero="positive", weights=weights)
  return elect, total, steps.scale(scale)
