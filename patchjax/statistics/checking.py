"""Spot checks: whether a statistic can be what it is said to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from patchjax.patches.placement import identity_of
from patchjax.statistics import streaming
from patchjax.statistics.fisher import Fisher
from patchjax.statistics.kinds import arrays_of
from patchjax.trees.errors import StructureError

Array = Any


@dataclasses.dataclass(frozen=True)
class SpotCheck:
  """What a spot check found.

  Attributes:
    scores: `{array: how far the claim is from the probes}`, in standard
      errors; the largest of some sketches.
    ratios: `{array: claimed size / measured size}`: means of the diagonal.
    limit: of a score.
  """

  scores: dict[str, float]
  ratios: dict[str, float]
  limit: float

  @property
  def passed(self) -> bool:
    """Whether no score is above the limit."""
    return not self.wrong

  @property
  def wrong(self) -> tuple[str, ...]:
    """Arrays whose score is above the limit, or no number; worst first."""
    scores = {n: np.inf if s != s else s for n, s in self.scores.items()}
    order = sorted(scores, key=lambda name: -scores[name])
    return tuple(name for name in order if scores[name] > self.limit)


def spot_check(
  claimed: Any,
  measure: Callable[..., Any],
  probes: Any,
  *,
  key: Array | None = None,
  groups: int = 16,
  sketches: int = 8,
  seed: int = 0,
  level: float = 1e-3,
) -> SpotCheck:
  """Compares a statistic with what is measured on some probes.

  The probes are cut into groups and the statistic is measured on each. Of
  every array some sketches (its mean diagonal, and sums with random signs)
  are compared with those of the claim: the distance to the groups' mean, in
  standard errors of the difference of the two, is a score. Statistics of the
  same kind of data pass; those that are scaled, shuffled, of another layer or
  made up do not, where the probes can tell. A claim of few examples is
  expected to be off by more.

  Args:
    claimed: a `Fisher`, `Gram` or `KFac`.
    measure: `(examples) -> statistic`, of the same kind: for example `lambda
      data: gram(apply, params, data)`. With a key `(examples, key) ->
      statistic`.
    probes: pytree of arrays with examples along the first axis.
    key: PRNG key, for sampled labels: each group gets one made of it. With
      one key for all, the groups' labels would err alike, and look surer than
      they are.
    groups: how many; scores are about distributed as Student's t with one
      degree of freedom less.
    sketches: how many random sums; a claim is to satisfy all of them, so
      keep the seed from who makes it.
    seed: of the signs.
    level: how often an honest claim may fail, in all of its arrays together.

  Raises:
    StructureError: if there are fewer probes than groups, or the claim has
      not the arrays that are measured.
    ValueError: if labels are sampled without `key`.

  Example:
    >>> import numpy as np
    >>> from patchjax.statistics import gram
    >>> params = {"w": np.eye(3, dtype=np.float32)}
    >>> x = np.random.default_rng(0).standard_normal((512, 3)).astype("f4")
    >>> def apply(params, x):
    ...   return x @ params["w"]
    >>> def measure(data):
    ...   return gram(apply, params, data)
    >>> honest = measure(x[:256])
    >>> spot_check(honest, measure, x[256:]).passed
    True
    >>> boasting = jax.tree.map(lambda a: 3 * a, honest)
    >>> spot_check(boasting, measure, x[256:]).wrong
    ('w',)
  """
  size = streaming.size_of(probes)
  if groups < 2 or size < groups:
    raise StructureError(
      f"a spot check of {groups} groups needs at least two, and as many "
      f"probes, got {size}"
    )
  ends = [size * i // groups for i in range(groups + 1)]
  found: list[dict[str, list[float]]] = []
  for i, (first, last) in enumerate(zip(ends, ends[1:])):
    group = streaming.part(probes, first, last)
    if key is None:
      one = measure(group)
      if getattr(one, "labels", None) == "sample":
        raise ValueError(
          "groups with sampled labels need keys of their own: give key= and "
          "measure=lambda data, key: ..."
        )
    else:
      one = measure(group, jax.random.fold_in(key, i))
    found.append(_sketched(one, sketches, seed))
  said = _sketched(claimed, sketches, seed)
  if said.keys() != found[0].keys():
    raise StructureError(
      f"the claim has {', '.join(said)}; measured are {', '.join(found[0])}"
    )
  from scipy import special

  scores, ratios = {}, {}
  tail = level / (2 * len(said) * (sketches + 1))
  limit = -float(special.stdtrit(groups - 1, tail))
  # The claim is a mean of a sample too.
  both = np.sqrt(1 + size / float(claimed.n))
  for name in said:
    rows = np.asarray([one[name] for one in found])
    mean = rows.mean(0)
    error = both * rows.std(0, ddof=1) / np.sqrt(groups)
    # What does not vary between groups must agree to rounding.
    error = np.maximum(error, 1e-5 * np.abs(rows[:, 0]).max() + 1e-30)
    scores[name] = float(np.max(np.abs(np.asarray(said[name]) - mean) / error))
    ratios[name] = float(said[name][0] / (mean[0] or np.nan))
  return SpotCheck(scores, ratios, limit)


def _arrays(statistic: Any) -> dict[str, Array]:
  fields = arrays_of(statistic)
  return {
    name if len(fields) == 1 else f"{name} ({field})": x
    for field in fields
    for name, x in getattr(statistic, field).items()
  }


def _sketched(statistic: Any, count: int, seed: int) -> dict[str, list[float]]:
  """Returns the mean of each array's diagonal, and signed sums of entries."""
  found = {}
  for name, array in _arrays(statistic).items():
    x = np.asarray(jax.device_get(array), np.float32)
    words = identity_of(name).tolist()
    rng = np.random.default_rng([seed, *words])
    if isinstance(statistic, Fisher):
      diagonal, sums = float(x.mean(dtype="f8")), []
      flat = x.reshape(-1)
      for _ in range(count):
        signs = rng.integers(0, 2, flat.size, np.int8) * np.int8(2) - np.int8(1)
        sums.append(float(np.dot(flat, signs.astype(np.float32))))
    else:
      diagonal = float(np.einsum("bii->b", x).mean(dtype="f8"))
      ways = rng.choice([-1.0, 1.0], (count, x.shape[-1])).astype(np.float32)
      sums = np.einsum("si,bij,sj->s", ways, x, ways, optimize=True).tolist()
    found[name] = [diagonal, *sums]
  return found
