"""Merges of MiniLM: `python -m experiments.merging --config=THIS`.

`:quick` after the path trains few steps and scores few texts: its accuracies
mean nothing. Single fields are overridden by `--config.rate=1e-4`, a misspelt
one is refused.
"""

import dataclasses

import ml_collections

from experiments.merging.settings import Settings


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Every number of the experiment.

  Args:
    arg: "" or "quick".
  """
  if arg not in ("", "quick"):
    raise ValueError(
      f"configs/merging_minilm.py knows no variant {arg!r}, only 'quick'"
    )
  config = ml_collections.ConfigDict(
    {
      field.name: getattr(Settings(), field.name)
      for field in dataclasses.fields(Settings)
    }
  )
  if arg == "quick":
    config.update(
      seeds=(0,),
      train_texts=64,
      validation_texts=16,
      test_texts=32,
      steps=4,
      statistics_texts=16,
      gradient_texts=4,
      adapt_texts=16,
      adapt_steps=2,
    )
  return config


def get_hyper(h):
  """One seed a job; their results meet in one workdir with `--resume`."""
  return h.product([h.sweep("config.seeds", [(0,), (1,), (2,)])])
