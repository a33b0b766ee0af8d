"""Merging: steps, methods, and the functions that run them."""

from patchjax.merging.conflict import ConflictReport, conflicts
from patchjax.merging.dropping import drop
from patchjax.merging.dropping_by_rank import drop_by_rank
from patchjax.merging.files import merge_files
from patchjax.merging.masks import keep_mask
from patchjax.merging.methods import (
  breadcrumbs,
  breadcrumbs_ties,
  centered_clipping,
  dare_linear,
  dare_ties,
  della,
  della_linear,
  ema,
  geometric_median,
  karcher,
  krum,
  lawa,
  linear,
  lines,
  median,
  metagpt,
  model_stock,
  multislerp,
  nuslerp,
  passthrough,
  slerp,
  task_arithmetic,
  ties,
  trimmed_mean,
  uniform_soup,
  wise_ft,
)
from patchjax.merging.methods.coefficients import scale_by_depth
from patchjax.merging.methods.soups import greedy_soup
from patchjax.merging.middling import keep_between
from patchjax.merging.rescaling import keep_l1
from patchjax.merging.running import combine, merge
from patchjax.merging.steps import (
  disjoint_mean,
  elect_sign,
  mean,
  scale,
  weighted_sum,
)
from patchjax.patches.perleaf import PerLeaf, per_leaf
from patchjax.patches.trimming import trim

__all__ = [
  "ConflictReport",
  "PerLeaf",
  "breadcrumbs",
  "breadcrumbs_ties",
  "centered_clipping",
  "combine",
  "conflicts",
  "dare_linear",
  "dare_ties",
  "della",
  "della_linear",
  "disjoint_mean",
  "drop",
  "drop_by_rank",
  "elect_sign",
  "ema",
  "geometric_median",
  "greedy_soup",
  "karcher",
  "keep_between",
  "keep_l1",
  "keep_mask",
  "krum",
  "lawa",
  "linear",
  "lines",
  "mean",
  "median",
  "merge",
  "merge_files",
  "metagpt",
  "model_stock",
  "multislerp",
  "nuslerp",
  "passthrough",
  "per_leaf",
  "scale",
  "scale_by_depth",
  "slerp",
  "task_arithmetic",
  "ties",
  "trim",
  "trimmed_mean",
  "uniform_soup",
  "weighted_sum",
  "wise_ft",
]
