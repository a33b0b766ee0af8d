"""Learning the numbers of a merge: by gradients, by entropy, by search."""

from patchjax.merging.learning.entropy import adamerging, prediction_entropy
from patchjax.merging.learning.fitting import Fitted, fit_numbers
from patchjax.merging.learning.proposals import cma_es, grid, uniform
from patchjax.merging.learning.searching import Found, search_numbers

__all__ = [
  "Fitted",
  "Found",
  "adamerging",
  "cma_es",
  "fit_numbers",
  "grid",
  "prediction_entropy",
  "search_numbers",
  "uniform",
]
