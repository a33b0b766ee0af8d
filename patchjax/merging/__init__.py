"""Merging: steps, methods, and the functions that run them."""

from patchjax.merging.conflict import ConflictReport, conflicts
from patchjax.merging.dropping import drop
from patchjax.merging.dropping_by_rank import drop_by_rank
from patchjax.merging.energies import weigh_by_energy
from patchjax.merging.files import MergedFiles, merge_files
from patchjax.merging.masks import keep_mask
from patchjax.merging.methods import (
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
  geometric_median,
  karcher,
  krum,
  lawa,
  linear,
  lines,
  magmax,
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
  sce,
  slerp,
  task_arithmetic,
  ties,
  trimmed_mean,
  uniform_soup,
  wise_ft,
)
from patchjax.merging.methods.coefficients import scale_by_depth
from patchjax.merging.methods.consensus import (
  emr_masks,
  emr_rescalers,
  tall_masks,
)
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
from patchjax.merging.streaming.models import abstract_of
from patchjax.merging.varying import keep_varied
from patchjax.patches.perleaf import PerLeaf, per_leaf
from patchjax.patches.trimming import trim

__all__ = [
  "ConflictReport",
  "MergedFiles",
  "PerLeaf",
  "abstract_of",
  "arcee_fusion",
  "breadcrumbs",
  "breadcrumbs_ties",
  "centered_clipping",
  "combine",
  "conflicts",
  "consensus_ta",
  "dare_linear",
  "dare_ties",
  "della",
  "della_linear",
  "disjoint_mean",
  "drop",
  "drop_by_rank",
  "elect_sign",
  "ema",
  "emr",
  "emr_masks",
  "emr_rescalers",
  "geometric_median",
  "greedy_soup",
  "karcher",
  "keep_between",
  "keep_l1",
  "keep_mask",
  "keep_varied",
  "krum",
  "lawa",
  "linear",
  "lines",
  "magmax",
  "mean",
  "median",
  "merge",
  "merge_files",
  "metagpt",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "passthrough",
  "pcb",
  "per_leaf",
  "ram",
  "ramplus",
  "scale",
  "scale_by_depth",
  "sce",
  "slerp",
  "tall_masks",
  "task_arithmetic",
  "ties",
  "trim",
  "trimmed_mean",
  "uniform_soup",
  "weigh_by_energy",
  "weighted_sum",
  "wise_ft",
]
