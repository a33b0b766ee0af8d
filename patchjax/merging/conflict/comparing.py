"""conflicts: where contributors disagree, before they are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from patchjax.merging import inputs, methods, running
from patchjax.merging.conflict import findings, functional, measures, report
from patchjax.patches import leafwise, placement
from patchjax.patches.deltas import Delta
from patchjax.patches.transform import Transform
from patchjax.trees.names import flatten

Array = Any


def conflicts(
  base: Any,
  contributors: Sequence[Any],
  *,
  only: Any = None,
  method: Transform | None = None,
  probes: Any = None,
  apply_fn: Callable[[Any, Any], Array] | None = None,
  merged: Any = None,
  labels: Sequence[str] | None = None,
) -> report.ConflictReport:
  """Returns how far contributors disagree, leaf by leaf and in total.

  On four levels:

  1. Structure: leaves that a contributor inserts, deletes, renames, reshapes
     or casts, leaves without a mean that differ, NaN and Inf. `merge` raises
     for them; here they are `findings`, each with its fix, and what fits is
     compared nevertheless.
  2. Support: which entries two or more contributors change, as exact counts.
  3. Geometry: norms, cosines, and the share of entries and of magnitude with
     opposite signs.
  4. Function, with `probes` and `apply_fn`: the divergence KL(contributor ||
     merged) of predictions, and the generalised Gauss-Newton products
     `d_i^T G d_j`, see `functional.ggn_products`. In experiments divergence
     predicted what a merge loses, while cosine, signs and overlap hardly did:
     those are for people to read.

  `report.disjoint` says that no entry is changed by two contributors and
  nothing keeps them from being merged. Then
  `task_arithmetic()` (weights and scale 1) and `ties(density=1.0)` (either
  flavour, scale 1, no weights) give, bit for bit, what applying
  the contributors' changes one after the other gives, in any order: in each
  entry the sum has one term `d_i` beside zeros, which is exact, the elected
  sign is that of `d_i`, the mean over those that are not zero is `d_i`, and
  both ways round `f32(base) + d_i` once. It holds for changes that are sums
  (`pj.diff(base, x)`, and a pytree x counts through it); products and exact
  patches (`exact=True`) agree up to that rounding. A zero is a zero: -0.0
  where nothing is changed may become 0.0. It does not hold for means over all
  contributors (`linear`), nor where a method drops or rescales entries (a
  density below 1, DARE, a scale other than 1).

  Works on one device and on meshes of Auto and Explicit axes; no leaf is
  gathered.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    only: selector of the leaves to compare; by default all that are merged.
    method: the merge that probes are to judge; by default `linear()`.
    probes: inputs, without labels, for `apply_fn`.
    apply_fn: `(params, probes) -> [..., classes]` logits; traceable.
    merged: the merged parameters, if they are known already.
    labels: a name for each contributor; by default "contributor 0", ...

  Returns:
    A `ConflictReport`. Predictions are left out if `merge` would raise.

  Raises:
    StructureError: if there is nothing to compare.
    ValueError: if only one of `probes` and `apply_fn` is given, or labels are
      not one a contributor.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 3], [-1, 3]))
    >>> found = pj.merging.conflicts(base, [a, b])
    >>> found.total.sign, found.total.entries, found.disjoint
    (0.125, ((2, 2), (2, 2)), False)
  """
  if (probes is None) != (apply_fn is None):
    raise ValueError("probes and apply_fn go together: give both, or neither")
  findings.check_contributors(contributors)
  k = len(contributors)
  if labels is None:
    labels = [f"contributor {i}" for i in range(k)]
  if len(labels) != k:
    raise ValueError(f"{len(labels)} labels for {k} contributors")
  named, _ = flatten(base)
  found, sources, floats = findings.examine(named, contributors, only)
  counted: dict[str, Any] = {}
  deltas: list[dict[str, Any]] = [{} for _ in range(k)]
  for name, leaf, given in _works(floats, sources):
    counted[name] = measures.measure(placement.leaf_of(leaf), leaf, given)
    if apply_fn is not None:
      for held, source in zip(deltas, given, strict=True):
        if source is not None:
          held[name] = _task_vector(leaf, source)
  counted = jax.device_get(counted)
  tallies = {
    name: measures.unpacked(measures.unlimbed(limbs), sums, k)
    for name, (limbs, sums) in counted.items()
  }
  for name, tally in tallies.items():
    bad = {i: n for i, n in enumerate(tally.bad) if n}
    if bad:
      found.append(findings.not_finite(name, bad))
  changing = {
    name: [i for i in range(k) if tally.both[i, i]]
    for name, tally in tallies.items()
  }
  found = findings.with_others(found, changing)
  divergence, ggn = None, {}
  if apply_fn is not None and not any(f.blocks for f in found):
    if merged is None:
      method = methods.linear() if method is None else method
      merged = running.merge(base, contributors, method, only=only)
    divergence = dict(
      zip(
        labels,
        functional.divergences(base, contributors, merged, probes, apply_fn),
        strict=True,
      )
    )
    ggn = functional.ggn_products(apply_fn, base, probes, deltas)
  return report.ConflictReport(
    leaves=tuple(
      report.leaf_conflict(name, _size(floats[name]), tally, ggn.get(name))
      for name, tally in tallies.items()
    ),
    total=report.leaf_conflict(
      "total",
      sum(map(_size, floats.values())),
      sum(tallies.values(), measures.Tally.zero(k)),
      sum(ggn.values(), np.zeros((k, k))) if divergence else None,
    ),
    findings=found,
    contributors=tuple(labels),
    divergence=divergence,
  )


def _size(leaf: Any) -> int:
  return int(np.prod(leaf.shape, dtype=np.int64))


def _works(
  floats: dict[str, Any], sources: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
  """Yields name, base's leaf and sources of the leaves that somebody gives."""
  for name, leaf in floats.items():
    if not _size(leaf) or not any(name in source for source in sources):
      continue
    leaf = inputs.on_device(leaf)
    given = []
    for source in sources:
      one = source.get(name)
      if isinstance(one, Delta):
        one = leafwise.held_dense(leaf, one)
      elif one is not None:
        one = inputs.on_device(one, leaf)
      given.append(one)
    yield name, leaf, tuple(given)


@jax.jit
def _task_vector(leaf: Array, source: Any) -> Array:
  return leafwise.task_vectors(leaf, (source,), leaf.shape)[0]
