"""The merges that are timed: the same one in patchjax, mergekit and PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import patchjax as pj
from experiments.bench import merging_statistics

WEIGHTS = [0.5, 1.25, 0.75, 1.0]

_m = pj.merging


@dataclasses.dataclass(frozen=True)
class Contest:
  """One merge.

  Attributes:
    name: of the method, here and in mergekit.
    ours: makes what computes what mergekit computes.
    settings: mergekit's parameters.
    paper: makes what patchjax does by default, where that is another merge;
      of what decomposes, what it does by Gram matrices.
    base: whether mergekit's method gets the base.
    reads_base: whether the result depends on it.
    count: how many contributors.
    goals: how often faster than mergekit it is to be, in float32 and in
      bfloat16; None for no goal.
    limit: how close to the bytes-moved limit, in a buffer that is given.
    equal: whether both compute the same numbers: not so what is random.
    close: how closely, as a share of a tensor's maximum.
    told: whether `ours` is told the models, to make statistics of them.
    mergekit: whether mergekit has it; if not, the settings are those of the
      formula in PyTorch, and that is what the numbers are compared with.
  """

  name: str
  ours: Callable[..., pj.Transform]
  settings: Mapping[str, Any]
  paper: Callable[[], pj.Transform] | None = None
  base: bool = True
  reads_base: bool = True
  count: int = 4
  goals: tuple[float, float] | None = None
  limit: float | None = None
  equal: bool = True
  close: float = 1e-6
  told: bool = False
  mergekit: bool = True

  def method(self, models: Sequence[Any]) -> pj.Transform:
    """Returns what computes what mergekit computes, of some models.

    Args:
      models: the contributors.
    """
    return self.ours(models) if self.told else self.ours()

  def goal(self, dtype: str) -> float | None:
    """Returns how often faster than mergekit it is to be.

    Args:
      dtype: float32 or bfloat16.
    """
    return self.goals and self.goals[dtype != "float32"]


_FAST = (20.0, 20.0)

CONTESTS = (
  Contest(
    "linear",
    lambda: _m.linear(weights=WEIGHTS),
    {"weight": WEIGHTS},
    base=False,
    reads_base=False,
    goals=(4.0, 4.0),
    limit=1.3,
  ),
  Contest(
    "task_arithmetic",
    lambda: _m.task_arithmetic(weights=WEIGHTS, scale=0.4),
    {"weight": WEIGHTS, "lambda": 0.4},
    goals=(4.0, 4.0),
    limit=1.3,
  ),
  Contest(
    "slerp",
    lambda: _m.slerp(t=0.3, from_base=True),
    {"t": 0.3},
    count=1,
    goals=(2.0, 5.0),
    close=1e-5,  # of a cosine near 1, float32 does not tell the angle better
  ),
  Contest(
    "ties",
    lambda: _m.ties(density=0.2, weights=WEIGHTS, flavour="mergekit"),
    {"weight": WEIGHTS, "density": 0.2},
    paper=lambda: _m.ties(density=0.2),
    goals=_FAST,
  ),
  Contest(
    "dare_linear",
    lambda: _m.dare_linear(density=0.5, weights=WEIGHTS, flavour="mergekit"),
    {"weight": WEIGHTS, "density": 0.5},
    paper=lambda: _m.dare_linear(density=0.5, weights=WEIGHTS),
    goals=_FAST,
    equal=False,
  ),
  Contest(
    "dare_ties",
    lambda: _m.dare_ties(density=0.5, weights=WEIGHTS, flavour="mergekit"),
    {"weight": WEIGHTS, "density": 0.5},
    paper=lambda: _m.dare_ties(density=0.5),
    goals=_FAST,
    equal=False,
  ),
  Contest(
    "della",
    lambda: _m.della(
      density=0.5, epsilon=0.15, weights=WEIGHTS, flavour="mergekit"
    ),
    {"weight": WEIGHTS, "density": 0.5, "epsilon": 0.15},
    paper=lambda: _m.della(density=0.5, epsilon=0.15, weights=WEIGHTS),
    goals=_FAST,
    equal=False,
  ),
  Contest(
    "breadcrumbs",
    lambda: _m.breadcrumbs(
      density=0.3, gamma=0.01, weights=WEIGHTS, flavour="mergekit"
    ),
    {"weight": WEIGHTS, "density": 0.3, "gamma": 0.01},
    paper=lambda: _m.breadcrumbs(density=0.3, gamma=0.01, weights=WEIGHTS),
    goals=_FAST,
  ),
  Contest(
    "sce",
    lambda: _m.sce(density=0.3, flavour="mergekit"),
    {"select_topk": 0.3},
    paper=lambda: _m.sce(density=0.3),
    goals=_FAST,
  ),
  Contest(
    "nuslerp",
    lambda: _m.nuslerp(weights=WEIGHTS[:2]),
    {"weight": WEIGHTS[:2]},
    base=False,
    reads_base=False,
    count=2,
  ),
  Contest(
    "multislerp",
    lambda: _m.multislerp(weights=WEIGHTS),
    {"weight": WEIGHTS},
    base=False,
    reads_base=False,
  ),
  Contest(
    "karcher", lambda: _m.karcher(), {}, base=False, reads_base=False
  ),
  Contest(
    "model_stock", lambda: _m.model_stock(flavour="mergekit"), {},
    paper=lambda: _m.model_stock(),
  ),
  *(
    # Of random tasks the least interference is anything but well determined.
    Contest(
      name, make, settings, paper=paper, mergekit=False, close=1e-4,
      equal=name != "wudi",
    )
    for name, make, settings, paper in (
      ("tsv_m", lambda: _m.tsv_m(), {"scale": 1.0},
       lambda: _m.tsv_m(svd="gram")),
      ("iso_c", lambda: _m.iso_c(), {"scale": 1.0}, None),
      ("star", lambda: _m.star(), {"eta": 40.0}, lambda: _m.star(svd="gram")),
      ("wudi", lambda: _m.wudi(), {"scale": 1.0}, None),
      ("svc", lambda: _m.svc(), {"alpha": 0.1}, lambda: _m.svc(svd="gram")),
    )
  ),
  *(
    Contest(
      name, make, settings, told=True, mergekit=False, close=1e-4,
      reads_base=name == "fisher",
    )
    for name, make, settings in (
      ("fisher", merging_statistics.fisher, {}),
      ("regmean", merging_statistics.regmean, {"off_diagonal": 0.9}),
      ("mats", merging_statistics.mats, {"iterations": 10}),
    )
  ),
)  # fmt: skip
"""Those that have goals first."""

BY_NAME = {contest.name: contest for contest in CONTESTS}
"""By name."""

MAIN = tuple(contest.name for contest in CONTESTS if contest.goals)
"""Names of those that have goals."""
