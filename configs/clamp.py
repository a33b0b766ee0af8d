"""The CLAMP story: `python -m experiments.clamp --config configs/clamp.py`.

`--config configs/clamp.py:quick` runs all events with few steps and few texts
in under a minute; its scores mean nothing. Single fields are overridden by
`--config.steps=80`, a misspelt one is refused.

Expected of the default, seed 0: releases 1.0.0 and 1.0.1, Fidmor's patch
alone and the bolder compression rejected.
"""

import dataclasses

import ml_collections

from patchjax.demo.config import Config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Every number of the story.

  Args:
    arg: "" or "quick".
  """
  if arg not in ("", "quick"):
    raise ValueError(f"configs/clamp.py knows no variant {arg!r}, only 'quick'")
  config = ml_collections.ConfigDict(
    {
      field.name: getattr(Config(), field.name)
      for field in dataclasses.fields(Config)
    }
  )
  if arg == "quick":
    config.update(
      steps=4,
      fisher_examples=8,
      train_texts=64,
      validation_texts=32,
      test_texts=64,
    )
  return config


def get_hyper(h):
  """Three seeds, as the table of the README has them."""
  return h.product([h.sweep("config.seed", [0, 1, 2])])
