"""Merging: steps, methods, and the functions that run them."""

from patchjax.merging.conflict import ConflictReport, conflicts
from patchjax.merging.files import merge_files
from patchjax.merging.methods import linear, task_arithmetic, ties
from patchjax.merging.running import combine, merge
from patchjax.merging.steps import (
  disjoint_mean,
  elect_sign,
  mean,
  scale,
  weighted_sum,
)
from patchjax.patches.trimming import trim

__all__ = [
  "ConflictReport",
  "combine",
  "conflicts",
  "disjoint_mean",
  "elect_sign",
  "linear",
  "mean",
  "merge",
  "merge_files",
  "scale",
  "task_arithmetic",
  "ties",
  "trim",
  "weighted_sum",
]
