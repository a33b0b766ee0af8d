"""What a change is: patches, their deltas, laws and codes, and transforms."""

from patchjax.patches.algebra import norm, restructure, stack
from patchjax.patches.apply import apply, check_base, revert
from patchjax.patches.codes import Dense, LowRank, Quantized, Sparse
from patchjax.patches.compose import compose
from patchjax.patches.compress import compress
from patchjax.patches.deltas import Delete, Delta, Insert, Rename
from patchjax.patches.diff import diff
from patchjax.patches.patch import Patch, Structure, structure_of
from patchjax.patches.quantizing import quantize, quantized, ternarize
from patchjax.patches.training import trainable
from patchjax.patches.transform import (
  Count,
  Step,
  Transform,
  chain,
  from_spec,
  one_count,
  register_step,
)
from patchjax.patches.trimming import trim
from patchjax.patches.truncating import truncate

__all__ = [
  "Count",
  "Delete",
  "Delta",
  "Dense",
  "Insert",
  "LowRank",
  "Patch",
  "Quantized",
  "Rename",
  "Sparse",
  "Step",
  "Structure",
  "Transform",
  "apply",
  "chain",
  "check_base",
  "compose",
  "compress",
  "diff",
  "from_spec",
  "norm",
  "one_count",
  "quantize",
  "quantized",
  "register_step",
  "restructure",
  "revert",
  "stack",
  "structure_of",
  "ternarize",
  "trainable",
  "trim",
  "truncate",
]
