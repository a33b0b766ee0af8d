"""conflicts: where contributors disagree, before they are merged.

Numbers for people to read, not to decide by: in experiments with rebased
patches the cosine, the sign conflicts and the overlap hardly predicted what a
merge loses, and the divergence of predictions on probes did.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging import inputs, methods, running
from patchjax.patches import leafwise, placement
from patchjax.patches.deltas import Delta
from patchjax.patches.transform import Transform
from patchjax.trees.names import flatten
from patchjax.trees.report import table

Array = Any


@dataclasses.dataclass(frozen=True)
class LeafConflict:
  """How far two or more contributors disagree in one leaf, or in all.

  Attributes:
    name: text name, or "total".
    size: how many numbers.
    changed: share of them that some contributor changes.
    overlap: of those, the share that at least two change.
    sign: share of the magnitude, of all entries that at least two change,
      that stands against the sign of the entry's sum: 0 where all agree, near
      1/2 where they cancel.
    cosine: mean cosine between the changes of two contributors; 0 if one of
      them is zero.
  """

  name: str
  size: int
  changed: float
  overlap: float
  sign: float
  cosine: float


@dataclasses.dataclass(frozen=True)
class ConflictReport:
  """What `conflicts` found; prints as a table.

  Attributes:
    leaves: of each leaf that somebody changes.
    total: of all together.
    divergence: with probes: `{"contributor i": mean KL(contributor i ||
      merged)}` in nats; else None.
  """

  leaves: tuple[LeafConflict, ...]
  total: LeafConflict
  divergence: dict[str, float] | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns the report as plain dicts and numbers."""
    return {
      "total": dataclasses.asdict(self.total),
      "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
      "divergence": self.divergence,
    }

  def __str__(self) -> str:
    rows = [
      [
        leaf.name,
        f"{leaf.size:,}",
        f"{leaf.changed:.2%}",
        f"{leaf.overlap:.2%}",
        f"{leaf.sign:.2%}",
        f"{leaf.cosine:+.3f}",
      ]
      for leaf in sorted(self.leaves, key=lambda leaf: -leaf.sign)
      + [self.total]
    ]
    text = table(
      ["leaf", "size", "changed", "overlap", "sign conflict", "cosine"],
      rows,
      title="conflicts: shares of entries; of magnitude for signs",
    )
    if self.divergence is not None:
      text += "\n" + table(
        ["parent", "KL(parent || merged), nats"],
        [[name, f"{value:.4g}"] for name, value in self.divergence.items()],
      )
    return text


def conflicts(
  base: Any,
  contributors: Sequence[Any],
  *,
  only: Any = None,
  method: Transform | None = None,
  probes: Any = None,
  apply_fn: Callable[[Any, Any], Array] | None = None,
  merged: Any = None,
) -> ConflictReport:
  """Returns how far contributors disagree, leaf by leaf and in total.

  Args:
    base: pytree of arrays.
    contributors: pytrees with the leaves of the base, or patches on it.
    only: selector of the leaves to compare; by default all that are merged.
    method: the merge that probes are to judge; by default `linear()`.
    probes: inputs, without labels, for `apply_fn`.
    apply_fn: `(params, probes) -> [..., classes]` logits. With it and probes
      the report tells how far the merged model's predictions are from each
      contributor's.
    merged: the merged parameters, if they are known already.

  Returns:
    A `ConflictReport`.

  Raises:
    MismatchError: if a contributor does not fit the base.
    ValueError: if only one of `probes` and `apply_fn` is given.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base, a, b = ({"w": np.float32(x)} for x in ([0, 0], [1, 3], [-1, 3]))
    >>> pj.merging.conflicts(base, [a, b]).total.sign
    0.125
  """
  if (probes is None) != (apply_fn is None):
    raise ValueError("probes and apply_fn go together: give both, or neither")
  named, _ = flatten(base)
  sources = inputs.sources_of(named, contributors)
  floats = inputs.floats_of(named, only)
  inputs.check_narrow(floats)
  stats, sizes = {}, {}
  for name, leaf in floats.items():
    sizes[name] = int(np.prod(leaf.shape))
    if not any(name in source for source in sources) or not sizes[name]:
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
    where = placement.leaf_of(leaf)
    stats[name] = _compare(where, leaf, tuple(given))
  stats = {
    name: np.asarray(parts, np.float64)
    for name, parts in jax.device_get(stats).items()
  }
  leaves = tuple(
    _summary(name, sizes[name], parts, len(sources))
    for name, parts in stats.items()
  )
  whole = sum(stats.values(), np.zeros(4 + len(sources) ** 2))
  total = _summary("total", sum(sizes.values()), whole, len(sources))
  divergence = None
  if apply_fn is not None:
    if merged is None:
      method = methods.linear() if method is None else method
      merged = running.merge(base, contributors, method, only=only)
    divergence = _divergences(base, contributors, merged, probes, apply_fn)
  return ConflictReport(leaves, total, divergence)


@jax.jit
def _compare(leaf, base, sources):
  deltas = leafwise.task_vectors(base, sources, leaf.shape)

  def sums(deltas, leaf):
    # Sums of rows first: one float32 sum over a large leaf would be inexact.
    del leaf
    changed = [d != 0 for d in deltas]
    count = functools.reduce(jnp.add, [c.astype(jnp.float32) for c in changed])
    several = count >= 2
    balance = functools.reduce(jnp.add, deltas)
    magnitude = functools.reduce(jnp.add, [jnp.abs(d) for d in deltas])
    # |sum| is what agrees minus what stands against it.
    against = (magnitude - jnp.abs(balance)) / 2
    zero = jnp.zeros_like(magnitude)
    parts = [
      (count >= 1).astype(jnp.float32),
      several.astype(jnp.float32),
      jnp.where(several, against, zero),
      jnp.where(several, magnitude, zero),
    ]
    parts += [a * b for a in deltas for b in deltas]
    return jnp.stack([jnp.sum(p.astype(jnp.float32)) for p in parts])

  return placement.sum_over_shards(sums, deltas, leaf)


def _summary(name: str, size: int, parts: np.ndarray, k: int) -> LeafConflict:
  some, several, against, magnitude = parts[:4]
  gram = parts[4:].reshape(k, k)
  norms = np.sqrt(np.diag(gram))
  scale = np.outer(norms, norms)
  cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
  pairs = cosines[np.triu_indices(k, 1)]
  return LeafConflict(
    name=name,
    size=size,
    changed=float(some / size) if size else 0.0,
    overlap=float(several / some) if some else 0.0,
    sign=float(against / magnitude) if magnitude else 0.0,
    cosine=float(pairs.mean()) if len(pairs) else 0.0,
  )


def _divergences(base, contributors, merged, probes, apply_fn):
  from patchjax.patches.apply import apply
  from patchjax.patches.patch import Patch

  def log_probs(params):
    logits = jnp.asarray(apply_fn(params, probes)).astype(jnp.float32)
    return jax.nn.log_softmax(logits)

  new = log_probs(merged)
  found = {}
  for i, contributor in enumerate(contributors):
    if isinstance(contributor, Patch):
      contributor = apply(base, contributor)
    old = log_probs(contributor)
    kl = jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))
    found[f"contributor {i}"] = float(kl)
  return found
