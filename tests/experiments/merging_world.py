"""A tiny world for the merging experiment: a random encoder, made-up texts."""

import jax
import numpy as np

from experiments.merging.encoder import Encoder
from experiments.merging.settings import Settings
from patchjax.demo import model, tasks

SHAPE = model.Shape(
  vocabulary=40, positions=8, width=16, hidden=32, layers=3, heads=2
)
NAMES = ("a", "b", "c", "d", "e")
SETTINGS = Settings(
  tasks=NAMES,
  seeds=(0, 1),
  tokens=8,
  depth=2,
  train_texts=24,
  validation_texts=12,
  test_texts=16,
  steps=3,
  batch=4,
  rate=1e-2,
  rank=2,
  share=0.05,
  statistics_texts=8,
  gradient_texts=4,
  adapt_texts=8,
  adapt_steps=2,
  adapt_batch=4,
  evaluation_batch=16,
)


def texts(random, n, classes):
  labels = random.integers(0, classes, n).astype(np.int32)
  # The first token says the class; lengths differ.
  ids = random.integers(10, SHAPE.vocabulary, (n, 8)).astype(np.int32)
  ids[:, 0] = labels + 1
  mask = np.arange(8) < random.integers(3, 9, n)[:, None]
  return tasks.Texts(np.where(mask, ids, 0), mask, labels)


def task(name):
  random = np.random.default_rng(sum(name.encode()))
  classes = ("x", "y", "z")[: 2 + len(name) % 2 + (name == "a")]
  return tasks.Task(
    name=name,
    classes=classes,
    prompts=texts(random, len(classes), len(classes)),
    train=texts(random, 30, len(classes)),
    validation=texts(random, 12, len(classes)),
    test=texts(random, 16, len(classes)),
  )


def params():
  return model.initial(jax.random.key(0), SHAPE)


def encoder():
  return Encoder(
    params(),
    {name: task(name) for name in NAMES},
    depth=SETTINGS.depth,
    heads=SHAPE.heads,
    batch=SETTINGS.evaluation_batch,
  )
