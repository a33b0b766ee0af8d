"""What data says about parameters."""

from patchjax.statistics.checking import SpotCheck, spot_check
from patchjax.statistics.factors import Gram, KFac, gram, kfac
from patchjax.statistics.files import load, save
from patchjax.statistics.fisher import Fisher, fisher_diagonal
from patchjax.statistics.gradients import absolute_gradients
from patchjax.statistics.layers import LinearLayer, linear_layers
from patchjax.statistics.shrinking import shrink

__all__ = [
  "Fisher",
  "Gram",
  "KFac",
  "LinearLayer",
  "SpotCheck",
  "absolute_gradients",
  "fisher_diagonal",
  "gram",
  "kfac",
  "linear_layers",
  "load",
  "save",
  "shrink",
  "spot_check",
]
