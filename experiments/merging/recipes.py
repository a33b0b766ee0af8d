"""The methods that are compared, and the settings each may choose from.

A recipe is a way to merge, a small grid of its options, and a few factors
that its merged change is multiplied with, where the method has such a scale.
Grids are around what the papers recommend. Methods for two models, for one,
or for checkpoints of one run are not for eight tasks: `LEFT_OUT` says why.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import patchjax as pj
from experiments.merging import informed, learned
from experiments.merging.problem import Problem
from patchjax import merging

Family = Literal[
  "sums",
  "signs and masks",
  "averages",
  "robust",
  "spectra",
  "statistics",
  "learned",
]
Grid = Mapping[str, Sequence[Any]]

LEFT_OUT = {
  "arcee_fusion": "merges one model into the base",
  "ema": "averages checkpoints of one run",
  "lawa": "averages checkpoints of one run",
  "nearswap": "merges one model into the base",
  "nuslerp": "merges two models",
  "passthrough": "takes one model",
  "slerp": "merges two models",
  "uniform_soup": "is `linear` with equal weights",
  "wise_ft": "merges one model into the base",
}
"""Entries of `METHODS` that are no candidates here, and why."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method and what may be chosen.

  Attributes:
    name: of the row in the table.
    family: what kind of method it is.
    merge: `(problem, **options)`, the upper layers of the merged model.
    grid: values of each option; every combination is tried.
    scales: factors of the merged change; each is tried.
    statistics: names of the statistics that it reads, for its cost.
    data: what it reads beside the models, in words.
  """

  name: str
  family: Family
  merge: Callable[..., Any]
  grid: Grid = dataclasses.field(default_factory=dict)
  scales: Sequence[float] = (1.0,)
  statistics: Sequence[str] = ()
  data: str = ""


def _plain(factory: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
  """Merges by a method that knows nothing but the models."""

  def merge(problem: Problem, **options: Any) -> Any:
    return pj.merge(problem.base, problem.patches, factory(**fixed, **options))

  return merge


def _drawn(factory: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
  """The same for a method that draws numbers."""

  def merge(problem: Problem, **options: Any) -> Any:
    method = factory(key=problem.seed, **fixed, **options)
    return pj.merge(problem.base, problem.patches, method)

  return merge


# Factors of a sum of eight task vectors, and of something like their mean.
_SUM = (0.2, 0.3, 0.4, 0.5, 0.7)
_FEW = (0.3, 0.5, 0.7, 1.0)
_MEAN = (1.0, 1.5, 2.0)
_ONE = (1.0, 1.5, 2.0)
_FLAT = (2.0, 3.0, 4.0, 5.0)


def recipes() -> tuple[Recipe, ...]:
  """Returns every recipe, in the order of the table."""
  return _SUMS + _SIGNS + _AVERAGES + _ROBUST + _SPECTRA + _INFORMED + _LEARNED


_SUMS = (
  Recipe(
    "task_arithmetic", "sums", _plain(merging.task_arithmetic), scales=_SUM
  ),
  Recipe("lines", "sums", _plain(merging.lines), {"beta": (0.2, 0.4, 0.6)}),
  Recipe("metagpt", "sums", _plain(merging.metagpt)),
  Recipe(
    "breadcrumbs",
    "sums",
    _plain(merging.breadcrumbs, density=0.5),
    scales=_FEW,
  ),
  Recipe(
    "dare_linear",
    "sums",
    _drawn(merging.dare_linear),
    {"density": (0.1, 0.5)},
    _FEW,
  ),
  Recipe("della_linear", "sums", _drawn(merging.della_linear), scales=_FEW),
  Recipe(
    "consensus_ta",
    "sums",
    _plain(merging.consensus_ta),
    {"threshold": (0.2, 0.4)},
    _FEW,
  ),
  Recipe(
    "trust_region_without_data",
    "sums",
    functools.partial(informed.trust_region, data=False),
    {"quantile": (0.9, 0.99)},
    _FEW,
  ),
)
_SIGNS = (
  Recipe(
    "ties",
    "signs and masks",
    _plain(merging.ties),
    {"density": (0.2, 0.5)},
    _MEAN,
  ),
  Recipe(
    "breadcrumbs_ties",
    "signs and masks",
    _plain(merging.breadcrumbs_ties, density=0.2),
    scales=_FEW,
  ),
  Recipe(
    "dare_ties",
    "signs and masks",
    _drawn(merging.dare_ties, density=0.9),
    scales=_MEAN,
  ),
  Recipe("della", "signs and masks", _drawn(merging.della), scales=_MEAN),
  Recipe(
    "pcb",
    "signs and masks",
    _plain(merging.pcb),
    {"density": (0.1, 0.2)},
    (0.5, 1.0, 1.5),
  ),
  Recipe("emr", "signs and masks", _plain(merging.emr), scales=(0.5, 1.0, 1.5)),
  Recipe(
    "magmax",
    "signs and masks",
    _plain(merging.magmax, scale=1.0),
    scales=(0.5, 1.0, 1.5),
  ),
  Recipe(
    "sce", "signs and masks", _plain(merging.sce), {"density": (0.1, 1.0)}
  ),
  Recipe("ram", "signs and masks", _plain(merging.ram)),
  Recipe("ramplus", "signs and masks", _plain(merging.ramplus)),
)
_AVERAGES = (
  Recipe("linear", "averages", _plain(merging.linear)),
  Recipe("multislerp", "averages", _plain(merging.multislerp)),
  Recipe("karcher", "averages", _plain(merging.karcher)),
  Recipe("model_stock", "averages", _plain(merging.model_stock)),
)
_ROBUST = (
  Recipe("median", "robust", _plain(merging.median)),
  Recipe("trimmed_mean", "robust", _plain(merging.trimmed_mean)),
  Recipe("geometric_median", "robust", _plain(merging.geometric_median)),
  Recipe("krum", "robust", _plain(merging.krum)),
  Recipe("centered_clipping", "robust", _plain(merging.centered_clipping)),
)

_SPECTRA = (
  Recipe("tsv_m", "spectra", _plain(merging.tsv_m), scales=_ONE),
  Recipe(
    "tsv_m_gram", "spectra", _plain(merging.tsv_m, svd="gram"), scales=_ONE
  ),
  Recipe(
    "tsv_m_randomized",
    "spectra",
    _plain(merging.tsv_m, svd="randomized"),
    scales=_ONE,
  ),
  Recipe("iso_c", "spectra", _plain(merging.iso_c), scales=_FLAT),
  Recipe("iso_cts", "spectra", _plain(merging.iso_cts), scales=_FLAT),
  Recipe("knots", "spectra", _plain(merging.knots, svd="gram"), scales=_MEAN),
  Recipe("star", "spectra", _plain(merging.star, svd="gram"), scales=_ONE),
  Recipe("wudi", "spectra", _plain(merging.wudi), {"ridge": (0.01, 0.1)}),
  Recipe("wudi_adam", "spectra", _plain(merging.wudi, solver="adam")),
  Recipe("svc", "spectra", _plain(merging.svc, svd="gram"), scales=_ONE),
)
_TEXTS = "training texts without labels"
_INFORMED = (
  Recipe(
    "fisher",
    "statistics",
    informed.fisher,
    statistics=("fisher",),
    data=_TEXTS,
  ),
  Recipe(
    "regmean",
    "statistics",
    informed.regmean,
    {"off_diagonal": (0.5, 0.9, 1.0)},
    statistics=("gram",),
    data=_TEXTS,
  ),
  Recipe(
    "regmean_plus_plus",
    "statistics",
    functools.partial(informed.regmean_plus_plus, off_diagonal=0.9),
    data=_TEXTS,
  ),
  Recipe(
    "mats",
    "statistics",
    functools.partial(informed.mats, iterations=30),
    statistics=("kfac",),
    data=_TEXTS,
  ),
  Recipe(
    "trust_region",
    "statistics",
    functools.partial(informed.trust_region, data=True),
    {"quantile": (0.9, 0.99)},
    _FEW,
    statistics=("gradients",),
    data="training texts with labels",
  ),
)
_LEARNED = tuple(
  Recipe(
    f"adamerging_{level}",
    "learned",
    functools.partial(learned.adamerging, level=level),
    data="test texts without labels",
  )
  for level in ("task", "leaf")
)


def named(names: Sequence[str] | None) -> tuple[Recipe, ...]:
  """Returns the recipes of these names; None: all.

  Args:
    names: of rows.

  Raises:
    ValueError: if there is no recipe of a name.
  """
  known = {recipe.name: recipe for recipe in recipes()}
  if names is None:
    return tuple(known.values())
  if unknown := set(names) - known.keys():
    raise ValueError(
      f"no recipe is called {sorted(unknown)}; known: {', '.join(known)}"
    )
  return tuple(known[name] for name in names)
