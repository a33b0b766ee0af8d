"""Permutations that make arrays alike, by linear assignments.

Coordinate ascent on `sum <a, permuted b>` over all arrays: the permutation of
one hidden dimension that is best while the others stay is a linear assignment
(Ainsworth et al. 2023, https://arxiv.org/abs/2209.04836, algorithm 1).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from patchjax.merging.alignment import specs

Arrays = Mapping[str, np.ndarray]
Factors = Mapping[str, Sequence["str | int"]]


def assigned(
  spec: specs.PermutationSpec,
  factors: Factors,
  a: Arrays,
  b: Arrays,
  *,
  seed: int,
  most: int,
  start: specs.Permutations | None = None,
) -> specs.Permutations:
  """Returns permutations of b's hidden dimensions that make it like a.

  Args:
    spec: the dimensions.
    factors: of the entries of each array.
    a: arrays by name.
    b: arrays by name, of the same shapes.
    seed: of the order in which dimensions are taken, another in each sweep.
    most: sweeps at most; it ends when a whole sweep betters nothing.
    start: where to start; by default from b as it is.
  """
  rng = np.random.default_rng(seed)
  found = specs.identities(spec) if start is None else dict(start)
  ascent = _Ascent(spec, factors, a, b, found)
  steps = [(name, kind) for name in spec.moving for kind in ascent.kinds(name)]
  for _ in range(most):
    better = [
      ascent.better(*steps[i]) for i in rng.permutation(len(steps)).tolist()
    ]
    if not any(better):
      break
  return ascent.found


class _Ascent:
  """The state: b as permuted so far, and how."""

  def __init__(self, spec, factors, a, b, found):
    self.spec, self.factors, self.found = spec, factors, found
    self.a = {name: _sized(spec, factors[name], x) for name, x in a.items()}
    self.b = {
      name: self._moved(found, name, _sized(spec, factors[name], x))
      for name, x in b.items()
    }

  def _moved(self, step, name, array):
    return specs.permuted_array(self.spec, step, self.factors[name], array)

  def _holding(self, dimensions):
    return [
      name
      for name, factors in self.factors.items()
      if any(d in factors for d in dimensions)
    ]

  def kinds(self, name):
    """Returns how a dimension can be matched: alone, or with what is in it."""
    return ("alone", "inner") if self.inner(name) else ("alone",)

  def inner(self, name):
    """Returns the dimensions that lie directly within one, and move."""
    within = {*self.spec.dimensions[name].within, name}
    return [
      d
      for d in self.spec.moving
      if set(self.spec.dimensions[d].within) == within
    ]

  def better(self, name, kind):
    """Matches a dimension; returns whether that made the arrays more alike."""
    step = self.alone(name) if kind == "alone" else self.with_inner(name)
    touched = self._holding(step)
    moved = {n: self._moved(step, n, self.b[n]) for n in touched}
    before = sum(dot(self.a[n], self.b[n]) for n in touched)
    after = sum(dot(self.a[n], moved[n]) for n in touched)
    # Sums of other order differ in their last bits: that is no progress.
    if not after > before + 1e-9 * abs(before):
      return False
    self.b.update(moved)
    self.found = specs.composed(self.spec, self.found, step)
    return True

  def alone(self, name):
    """Returns the best order of one dimension while all others stay."""
    within = self.spec.dimensions[name].within
    table = self.spec.table(name)
    likeness = np.zeros((*table, table[-1]))
    for leaf in self._holding([name]):
      for place in _places(self.factors[leaf], name):
        outer = [self.factors[leaf].index(d) for d in within]
        x, y = (
          _rows(array, outer, [place]) for array in (self.a[leaf], self.b[leaf])
        )
        likeness += x @ np.swapaxes(y, -1, -2)
    return {name: _solved(likeness)}

  def with_inner(self, name):
    """Returns the best order of a dimension and of what lies in it.

    For each pair of units (of heads, say) what lies in them is matched first:
    how alike two heads are is seen only when their numbers are in order.
    """
    inner, spec = self.inner(name), self.spec
    within = spec.dimensions[name].within
    table = spec.table(name)
    size = table[-1]
    likeness = np.zeros((*table, size))
    orders = {
      d: np.zeros((*table, size, spec.dimensions[d].size), np.int32)
      for d in inner
    }
    for leaf in self._holding([name]):
      factors = self.factors[leaf]
      if any(d in factors for d in inner):
        continue
      for place in _places(factors, name):
        outer = [factors.index(d) for d in within]
        x, y = (
          _rows(array, outer, [place]) for array in (self.a[leaf], self.b[leaf])
        )
        likeness += x @ np.swapaxes(y, -1, -2)
    for d in inner:
      pairs = []
      for leaf in self._holding([d]):
        factors = self.factors[leaf]
        outer = [factors.index(o) for o in within]
        at = [factors.index(name), factors.index(d)]
        pairs.append(
          [_rows(array, outer, at) for array in (self.a[leaf], self.b[leaf])]
        )
      for index in np.ndindex(*table[:-1]):
        for i in range(size):
          for j in range(size):
            products = (x[index][i] @ y[index][j].T for x, y in pairs)
            mutual = functools.reduce(np.add, products)
            order = _solved(mutual)
            own = np.arange(order.size)
            likeness[(*index, i, j)] += mutual[own, order].sum()
            orders[d][(*index, i, j)] = order
    found = _solved(likeness)
    step = {name: found}
    for d in inner:
      index = found[..., None, None]
      chosen = np.take_along_axis(orders[d], index, axis=-2)[..., 0, :]
      axes = [(*within, name).index(o) for o in spec.dimensions[d].within]
      step[d] = np.transpose(chosen, [*axes, len(axes)])
    return step


def _sized(spec, factors, array):
  sizes = [spec.size(factor) for factor in factors]
  wide = np.asarray(array)
  wide = wide.astype(np.promote_types(wide.dtype, np.float32))
  return wide.reshape(sizes)


def _places(factors, name):
  return [i for i, f in enumerate(factors) if f == name]


def _rows(array, outer, inner):
  """Returns `[*outer, *inner, rest]` of an array, with the rest as one axis."""
  first = [*outer, *inner]
  rest = [i for i in range(array.ndim) if i not in first]
  moved = np.transpose(array, [*first, *rest])
  return moved.reshape(*moved.shape[: len(first)], -1)


def dot(x: np.ndarray, y: np.ndarray) -> float:
  """Returns the sum of products of two arrays, in float64."""
  return float(np.vdot(x.astype(np.float64), y.astype(np.float64)))


def _solved(likeness):
  """Returns the assignment of largest likeness, for each leading index."""
  from scipy.optimize import linear_sum_assignment

  out = np.empty(likeness.shape[:-1], np.int32)
  for index in np.ndindex(*likeness.shape[:-2]):
    out[index] = linear_sum_assignment(likeness[index], maximize=True)[1]
  return out
