"""Weight matching of Git Re-Basin in numpy, float64, from the paper.

Ainsworth et al. 2023, https://arxiv.org/abs/2209.04836, algorithm 1: for one
layer after the other, in a random order, `argmax_P <P, sum_l W_A P' W_B^T>`
by a linear assignment, until nothing changes. Written for dimensions that each
lie on whole axes of leaves.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def moved(leaf, axes, permutations, but=None):
  """A leaf with its axes permuted, all but one."""
  for axis, name in enumerate(axes):
    if name is not None and axis != but:
      leaf = np.take(leaf, permutations[name], axis)
  return leaf


def weight_matching(axes, a, b, order, sweeps=100):
  """Returns permutations of b, and how alike they make the models.

  Args:
    axes: `{leaf: (name or None, ...)}`.
    a: leaves by name.
    b: leaves by name.
    order: names in the order of a sweep, called with the sweep's number.
    sweeps: at most.
  """
  sizes = {
    name: a[leaf].shape[i]
    for leaf, names in axes.items()
    for i, name in enumerate(names)
    if name is not None
  }
  permutations = {name: np.arange(n) for name, n in sizes.items()}
  for sweep in range(sweeps):
    progress = False
    for name in order(sweep):
      likeness = np.zeros((sizes[name],) * 2)
      for leaf, names in axes.items():
        for i, own in enumerate(names):
          if own == name:
            x = np.moveaxis(np.float64(a[leaf]), i, 0)
            y = moved(np.float64(b[leaf]), names, permutations, but=i)
            y = np.moveaxis(y, i, 0)
            likeness += x.reshape(len(x), -1) @ y.reshape(len(y), -1).T
      rows, best = linear_sum_assignment(likeness, maximize=True)
      gain = likeness[rows, best].sum()
      gain -= likeness[rows, permutations[name]].sum()
      if gain > 1e-9 * np.abs(likeness).sum():
        permutations[name], progress = best, True
    if not progress:
      break
  total = sum(
    np.sum(a[leaf] * moved(np.float64(b[leaf]), names, permutations))
    for leaf, names in axes.items()
  )
  return permutations, total
