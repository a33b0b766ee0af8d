"""Means over seeds, tasks and texts, and their standard errors.

Every model of every seed is tested on the same texts, so that two methods are
compared text by text and seed by seed. Both are samples: other texts and
other seeds would give other means. The variance of a mean is therefore that of
an analysis of variance with both at random, crossed: what texts add, plus what
seeds add, less what is counted twice (their interaction).
"""

from __future__ import annotations

import numpy as np


def mean(outcomes: np.ndarray, task: np.ndarray) -> float:
  """The mean over seeds, of the mean over tasks, of the mean over texts.

  Args:
    outcomes: one number a seed and text, `[seeds, n]`.
    task: number of each text's task, `[n]`.
  """
  return float(outcomes.mean(axis=0) @ _weights(task))


def standard_error(outcomes: np.ndarray, task: np.ndarray) -> float:
  """The standard error of `mean`; give differences for that of a difference.

  With one seed, of what other texts would change only.

  Args:
    outcomes: one number a seed and text, `[seeds, n]`.
    task: number of each text's task, `[n]`.
  """
  outcomes = np.asarray(outcomes, np.float64)
  seeds = len(outcomes)
  weights = _weights(task)
  n = np.bincount(task)
  k = len(n)
  rest = outcomes - outcomes.mean(axis=0) if seeds > 1 else outcomes * 0
  by_text = _within(outcomes.mean(axis=0), task)
  texts = float(np.sum((by_text / n[task] / k) ** 2 * (n / (n - 1))[task]))
  if seeds == 1:
    return float(np.sqrt(texts))
  by_seed = outcomes @ weights
  among = float(np.var(by_seed, ddof=1) / seeds)
  both = np.stack([_within(row, task) for row in rest])
  twice = float(np.sum((both * weights) ** 2) / (seeds - 1) / seeds)
  return float(np.sqrt(max(texts + among - twice, texts, among)))


def _weights(task: np.ndarray) -> np.ndarray:
  """What a text weighs in the mean of the means of tasks."""
  n = np.bincount(task)
  return 1 / n[task] / len(n)


def _within(values: np.ndarray, task: np.ndarray) -> np.ndarray:
  """The values less the mean of their task."""
  return values - (np.bincount(task, weights=values) / np.bincount(task))[task]
