"""What a change is: patches, their deltas, laws and codes, and transforms."""

from patchjax.patches.algebra import norm, restructure, stack
from patchjax.patches.apply import apply, check_base, revert
from patchjax.patches.codes import Dense, LowRank, Quantized, Sparse
from patchjax.patches.compose import compose
from patchjax.patches.deltas import Delete, Delta, Insert, Rename
from patchjax.patches.diff import diff
from patchjax.patches.patch import Patch, Structure, structure_of
from patchjax.patches.training import trainable

__all__ = [
  "Delete",
  "Delta",
  "Dense",
  "Insert",
  "LowRank",
  "Patch",
  "Quantized",
  "Rename",
  "Sparse",
  "Structure",
  "apply",
  "check_base",
  "compose",
  "diff",
  "norm",
  "restructure",
  "revert",
  "stack",
  "structure_of",
  "trainable",
]
