"""Every number of the demo, in one place."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the story, fixed before any test text was scored.

  Learning rates, bits and the number of steps were chosen on validation
  texts. Margins are what about a thousand examples can decide: two points
  against the parents of a merge, four on a guarded task, six on a class slice
  of a compressed model. A contribution moves the boundary between the classes
  of a zero-shot task, which no threshold was ever fitted to, so for it the
  slices only guard against the collapse of a class.

  Attributes:
    seed: of everything random: masks, the order of the texts, labels drawn.
    tokens: a text is cut off here.
    depth: lower layers that no contributor trains; their outputs are cached.
    share: entries of a sparse patch, as a share of the entries of all layers.
    steps: optimizer steps of a contributor, or of a task patch.
    batch: texts a step.
    fish_rate: learning rate of the entries on a FISH mask.
    random_rate: the same on a random mask; it needs a larger one.
    dense_rate: the same where every entry of the upper layers is trained.
    keep: weight of the loss that keeps the answers to another task's
      question, for a contributor that read the suite.
    fisher_examples: texts that the Fisher information is taken over.
    train_texts: most texts of a task to train on.
    validation_texts: most texts of a task to choose settings on.
    test_texts: most texts of a task to test on; the planner asks for fewer.
    task_margin: accepted loss on a guarded task.
    class_margin: accepted loss on a class slice, for a contribution.
    slice_margin: accepted loss on a class slice, for a compression.
    parent_margin: accepted loss of a merge against each parent's own claim.
    parent_discordance: share of texts on which a merge and its parent are
      expected to differ; the planner's other shares are measured.
    parent_difference: true difference to a parent that the planner allows.
    mean_margin: loss in mean score that a compression may have.
    flips: cap on the rate of lost answers of a contribution.
    compressed_flips: the same for a compression.
    alpha: chance to accept what is worse by a margin.
    power: chance to accept what is as good, that the planner aims at.
    compressions: name of each proposed compression and its rules, which
      leaves to round to how many bits; the boldest first, which is the one
      of its size that costs least in validation.
    evaluation_batch: texts that are scored at once.
  """

  seed: int = 0
  tokens: int = 20
  depth: int = 4
  share: float = 0.005
  steps: int = 60
  batch: int = 16
  fish_rate: float = 2e-3
  random_rate: float = 1e-2
  dense_rate: float = 2e-4
  keep: float = 1.0
  fisher_examples: int = 64
  train_texts: int = 960
  validation_texts: int = 400
  test_texts: int = 2000
  task_margin: float = 0.04
  class_margin: float = 0.30
  slice_margin: float = 0.06
  parent_margin: float = 0.02
  parent_discordance: float = 0.06
  parent_difference: float = -0.005
  mean_margin: float = 0.01
  flips: float = 0.25
  compressed_flips: float = 0.10
  alpha: float = 0.05
  power: float = 0.8
  compressions: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    (
      "3-4-bit",
      (("layers/[0-3]/.*/kernel", 4), ("layers/[45]/.*/kernel", 3)),
    ),
    ("4-bit", (("layers/.*/kernel", 4),)),
  )
  evaluation_batch: int = 64
