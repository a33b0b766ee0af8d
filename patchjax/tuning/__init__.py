"""Making small patches: masks and low-rank factors to train."""


from patchjax.tuning.masks import fish, mask_patch, random_mask

__all__ = ["fish", "mask_patch", "random_mask"]
