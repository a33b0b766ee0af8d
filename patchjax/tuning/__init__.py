"""Making small patches: masks and low-rank factors to train."""

from patchjax.tuning.low_rank import lora
from patchjax.tuning.masks import fish, mask_patch, random_mask

__all__ = ["fish", "lora", "mask_patch", "random_mask"]
