"""Every number of the experiment, in one place."""

from __future__ import annotations

import dataclasses

from experiments.merging import tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings, fixed before any test text was scored.

  Attributes:
    tasks: names of the tasks, one specialist each.
    seeds: of what is random: which texts are trained on and in which order,
      masks, factors, entries that a method drops.
    tokens: a text is cut off here.
    depth: lower layers that nobody trains; their outputs are kept.
    train_texts: texts of a task that a seed draws from.
    validation_texts: texts of a task that settings are chosen on.
    test_texts: texts of a task that the table is about.
    steps: optimizer steps of a specialist.
    batch: texts a step.
    rate: learning rate of a specialist.
    union_rate: of the model trained on all tasks at once, with as many steps
      as the specialists together.
    lora_rate: the same for the LoRA patch.
    random_rate: the same for the patch on a random mask.
    rank: of the LoRA patch.
    share: entries of the random mask, as a share of the trained layers.
    statistics_texts: training texts of a task that Gram matrices and
      Kronecker factors are taken over.
    gradient_texts: the same for what needs a gradient for each text.
    adapt_texts: test texts of a task, without labels, that AdaMerging learns
      on.
    adapt_steps: its optimizer steps.
    adapt_batch: its texts of a task in a step.
    adapt_rate: its learning rate.
    evaluation_batch: texts that are scored at once.
  """

  tasks: tuple[str, ...] = tasks.NAMES
  seeds: tuple[int, ...] = (0, 1, 2)
  tokens: int = 24
  depth: int = 4
  train_texts: int = 1920
  validation_texts: int = 64
  test_texts: int = 160
  steps: int = 60
  batch: int = 16
  rate: float = 2e-4
  union_rate: float = 2e-4
  lora_rate: float = 3e-3
  random_rate: float = 1e-2
  rank: int = 8
  share: float = 0.015
  statistics_texts: int = 192
  gradient_texts: int = 64
  adapt_texts: int = 160
  adapt_steps: int = 40
  adapt_batch: int = 8
  adapt_rate: float = 1e-2
  evaluation_batch: int = 64
