"""Alignment: hidden units of models, brought into one order."""

from patchjax.merging.alignment.checking import given_permutations
from patchjax.merging.alignment.connectivity import (
  Connectivity,
  linear_connectivity,
)
from patchjax.merging.alignment.inferring import infer_permutations
from patchjax.merging.alignment.matching import (
  Aligned,
  activation_matching,
  align,
  weight_matching,
)
from patchjax.merging.alignment.patched import permute_patch
from patchjax.merging.alignment.specs import (
  Hidden,
  PermutationSpec,
  composed,
  permute,
  random_permutations,
)

__all__ = [
  "Aligned",
  "Connectivity",
  "Hidden",
  "PermutationSpec",
  "activation_matching",
  "align",
  "composed",
  "given_permutations",
  "infer_permutations",
  "linear_connectivity",
  "permute",
  "permute_patch",
  "random_permutations",
  "weight_matching",
]
