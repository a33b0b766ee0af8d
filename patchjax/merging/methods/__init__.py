"""Merge methods: keyword-only recipes that return a chain of steps.

Each lives in a module of its topic; `METHODS` lists them all. A method of a
published name gives what the paper's code gives; where mergekit computes
something else under the same name, `flavour="mergekit"` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patchjax.merging.methods.arcs import nuslerp, slerp
from patchjax.merging.methods.averages import (
  linear,
  passthrough,
  task_arithmetic,
)
from patchjax.merging.methods.coefficients import lines, metagpt, model_stock
from patchjax.merging.methods.consensus import (
  consensus_ta,
  emr,
  pcb,
)
from patchjax.merging.methods.robust import (
  centered_clipping,
  geometric_median,
  krum,
  median,
  trimmed_mean,
)
from patchjax.merging.methods.selective import (
  arcee_fusion,
  magmax,
  nearswap,
  ram,
  ramplus,
  sce,
)
from patchjax.merging.methods.signs import ties
from patchjax.merging.methods.soups import ema, lawa, uniform_soup, wise_ft
from patchjax.merging.methods.sparse import (
  breadcrumbs,
  breadcrumbs_ties,
  dare_linear,
  dare_ties,
  della,
  della_linear,
)
from patchjax.merging.methods.spherical import karcher, multislerp
from patchjax.merging.methods.statistical import (
  fisher,
  mats,
  regmean,
  trust_region,
)
from patchjax.merging.spectral.bracketed import knots, svc
from patchjax.merging.spectral.interference import wudi
from patchjax.merging.spectral.isotropic import iso_c, iso_cts
from patchjax.merging.spectral.singular import star, tsv_m

METHODS: tuple[Callable[..., Any], ...] = (
  arcee_fusion,
  breadcrumbs,
  breadcrumbs_ties,
  centered_clipping,
  consensus_ta,
  dare_linear,
  dare_ties,
  della,
  della_linear,
  ema,
  emr,
  fisher,
  geometric_median,
  iso_c,
  iso_cts,
  karcher,
  knots,
  krum,
  lawa,
  linear,
  lines,
  magmax,
  mats,
  median,
  metagpt,
  model_stock,
  multislerp,
  nearswap,
  nuslerp,
  passthrough,
  pcb,
  ram,
  ramplus,
  regmean,
  sce,
  slerp,
  star,
  svc,
  task_arithmetic,
  ties,
  trimmed_mean,
  trust_region,
  tsv_m,
  uniform_soup,
  wise_ft,
  wudi,
)
"""Every merge method: found by name in the command line, each held to a
reference and to the paper by the tests."""

BY_NAME: dict[str, Callable[..., Any]] = {f.__name__: f for f in METHODS}
