"""What a merge does to predictions: level four of `conflicts`.

Divergence on probes is what predicted, in experiments, how much a merge
loses; the generalised Gauss-Newton product between two contributors is its
part that comes from their being merged together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.merging.conflict import sums
from patchjax.patches import placement
from patchjax.patches.apply import apply
from patchjax.patches.patch import Patch
from patchjax.trees.dtypes import is_array, widened
from patchjax.trees.names import flatten

Array = Any
ApplyFn = Callable[[Any, Any], Array]


def ggn_products(
  apply_fn: ApplyFn,
  base: Any,
  probes: Any,
  deltas: Sequence[Mapping[str, Array]],
) -> dict[str, np.ndarray]:
  """Returns `d_i^T G d_j` of all contributors, split over the leaves.

  G is the generalised Gauss-Newton matrix of the cross-entropy of softmax
  predictions, at the base, in the mean over probes:
  `G = 1/N sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n`, with J_n the Jacobian of
  the logits of probe n by the parameters and p_n = softmax(logits)
  (Schraudolph 2002, https://doi.org/10.1162/08997660260028683, section 3;
  Martens 2020, https://arxiv.org/abs/1412.1193, section 8). It is the Fisher
  matrix of the predictions, so `KL(base || base + d)` is `d^T G d / 2` to
  second order, and for a sum of changes that is
  `sum_i d_i^T G d_i / 2 + sum_{i<j} d_i^T G d_j`: the cross terms are what
  the contributors do to predictions together and none does alone. Negative
  ones cancel.

  G is never formed: `u_j = J d_j` is one forward pass with a tangent (jvp),
  `G d_j = J^T (p * u_j - p (p . u_j)) / N` one backward pass (vjp).

  Args:
    apply_fn: `(params, probes) -> [..., classes]` logits; all axes but the
      last count as probes.
    base: the parameters at which G is taken.
    probes: what `apply_fn` takes.
    deltas: of each contributor its changes by name; missing ones are zero.

  Returns:
    `{name: [k, k]}` for the leaves that somebody changes: the mean of
    `<d_i, (G d_j)>` over the leaf and its transpose. Their sum over the
    leaves is `d_i^T G d_j`, in nats.
  """
  named, treedef = flatten(base)
  names = [n for n in named if any(n in delta for delta in deltas)]
  if not names:
    return {}
  shifts = [
    {
      n: delta[n] if n in delta else jnp.zeros_like(_first(deltas, n))
      for n in names
    }
    for delta in deltas
  ]

  def images(named, shifts, probes):
    def logits(shift):
      moved = named | {
        n: (jnp.asarray(named[n]).astype(s.dtype) + s).astype(named[n].dtype)
        for n, s in shift.items()
      }
      out = apply_fn(jax.tree.unflatten(treedef, moved.values()), probes)
      return out.astype(widened(out.dtype))

    zero = jax.tree.map(jnp.zeros_like, shifts[0])
    out, forward = jax.linearize(logits, zero)
    backward = jax.linear_transpose(forward, zero)
    p = jax.nn.softmax(out)
    count = jnp.asarray(max(out.size // out.shape[-1], 1)).astype(out.dtype)
    found = []
    for shift in shifts:
      u = forward(shift)
      mean = jnp.sum(p * u, axis=-1, keepdims=True)
      found.append(backward(p * (u - mean) / count)[0])
    return found

  arrays = {n: leaf for n, leaf in named.items() if is_array(leaf)}

  def run(arrays, shifts, probes):
    return images(
      {n: arrays.get(n, x) for n, x in named.items()}, shifts, probes
    )

  pulled = jax.jit(run)(arrays, shifts, probes)
  found = jax.device_get(
    {
      n: _inner(
        placement.leaf_of(shifts[0][n]),
        tuple(shift[n] for shift in shifts),
        tuple(image[n] for image in pulled),
      )
      for n in names
    }
  )
  k = len(shifts)
  wide = {n: np.float64(x).reshape(k, k) for n, x in found.items()}
  return {n: (x + x.T) / 2 for n, x in wide.items()}


@jax.jit
def _inner(leaf, shifts, images):
  def products(arrays, leaf):
    terms = [a * b for a in arrays[0] for b in arrays[1]]
    return sums.totals(terms, local=leaf.local)

  return placement.sum_over_shards(products, (shifts, images), leaf)


def _first(deltas: Sequence[Mapping[str, Array]], name: str) -> Array:
  return next(delta[name] for delta in deltas if name in delta)


def divergences(
  base: Any,
  contributors: Sequence[Any],
  merged: Any,
  probes: Any,
  apply_fn: ApplyFn,
) -> list[float]:
  """Returns the mean KL(contributor || merged) of predictions, in nats.

  Args:
    base: the parameters that patches are for.
    contributors: pytrees or patches.
    merged: the merged parameters.
    probes: what `apply_fn` takes.
    apply_fn: `(params, probes) -> [..., classes]` logits.
  """

  def log_probs(params):
    logits = jnp.asarray(apply_fn(params, probes))
    return jax.nn.log_softmax(logits.astype(widened(logits.dtype)))

  new = log_probs(merged)
  found = []
  for contributor in contributors:
    if isinstance(contributor, Patch):
      contributor = apply(base, contributor)
    old = log_probs(contributor)
    kl = jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))
    found.append(float(kl))
  return found
