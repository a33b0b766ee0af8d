"""A tiny world for the story: a random encoder and made-up texts."""

import jax
import numpy as np

from patchjax.demo import model, scoring, tasks
from patchjax.demo.config import Config

SHAPE = model.Shape(
  vocabulary=40, positions=8, width=16, hidden=32, layers=3, heads=2
)
CONFIG = Config(
  tokens=8,
  depth=2,
  share=0.02,
  steps=3,
  batch=4,
  fisher_examples=4,
  evaluation_batch=16,
  compressions=(
    ("2-bit", (("layers/.*/kernel", 2),)),
    ("8-bit", (("layers/.*/kernel", 8),)),
  ),
)


def texts(random, n, classes):
  labels = random.integers(0, classes, n).astype(np.int32)
  # The first token says the class; lengths differ.
  ids = random.integers(10, SHAPE.vocabulary, (n, 8)).astype(np.int32)
  ids[:, 0] = labels + 1
  mask = np.arange(8) < random.integers(3, 9, n)[:, None]
  return tasks.Texts(np.where(mask, ids, 0), mask, labels)


def task(name, n=60):
  random = np.random.default_rng(sum(name.encode()))
  names = ("a", "b", "c") if name == "bbc" else ("negative", "positive")
  return tasks.Task(
    name=name,
    classes=names,
    prompts=texts(random, len(names), len(names)),
    train=texts(random, 24, len(names)),
    validation=texts(random, 30, len(names)),
    test=texts(random, n, len(names)),
  )


def scorer(n=60, seed=0):
  return scoring.Scorer(
    model.initial(jax.random.key(seed), SHAPE),
    {name: task(name, n) for name in tasks.NAMES},
    depth=CONFIG.depth,
    heads=SHAPE.heads,
    batch=CONFIG.evaluation_batch,
  )
