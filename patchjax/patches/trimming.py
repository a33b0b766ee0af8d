"""trim: keep the entries of largest magnitude, zero the others.

Used by encodings (sparse patches) and by merges (TIES).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches import ordering, selection, shares, transform
from patchjax.patches.counting import at_least, limbs
from patchjax.patches.rank_cuts import cuts


def trim(
  *,
  density: Any,
  scope: Literal["tree", "leaf"] = "tree",
  exact_k: bool = False,
  one_more: bool | Literal["if_none"] = False,
) -> transform.Transform:
  """Returns the transform that keeps a share of the entries, by magnitude.

  Of n entries those at least as large as the k-th largest are kept,
  `k = floor(density * n)`.

  Args:
    density: share that is kept, in (0, 1]; one number, or one a contributor.
      Traced: it may change without a new compilation, and be mapped over;
      a derivative with respect to it is refused.
    scope: "tree": one threshold over all leaves of a contributor, as in the
      TIES paper's code; "leaf": one for each leaf, as in mergekit.
    exact_k: whether exactly k entries are kept: ties at the threshold go to
      the leaf that comes first by name, then to the lowest index. By default
      all entries that tie are kept.
    one_more: whether k is one larger (and at most n), as in the TIES paper's
      code, whose threshold is the `n - floor(density * n)`-th *smallest*
      magnitude. "if_none": only where k would
      be 0, as in mergekit.

  Raises:
    SelectionError: if the density is outside (0, 1].

  Example:
    >>> import numpy as np, patchjax as pj
    >>> patch = pj.diff({"w": np.zeros(4, np.float32)},
    ...                 {"w": np.float32([1, -4, 3, 2])})
    >>> small = pj.compress(patch, pj.trim(density=0.5), code="dense")
    >>> small.deltas["w"].code.values.tolist()
    [0.0, -4.0, 3.0, 0.0]
  """
  if scope not in ("tree", "leaf"):
    raise ValueError(f"scope must be 'tree' or 'leaf', got {scope!r}")
  if isinstance(density, int | float):
    shares.check_density(density)
  return transform.Transform.of(
    TRIM, {"density": density}, scope=scope, exact_k=exact_k, one_more=one_more
  )


def _ranks(state, shapes, k, *, scope, exact_k, one_more):
  del scope, exact_k
  size = sum(math.prod(shape) for shape in shapes)
  densities = transform.per_contributor(state["density"], k)
  found = tuple(
    shares.entries_of(density, size, more=int(one_more is True))
    for density in densities
  )
  if one_more != "if_none":
    return found
  one = limbs(1)
  return tuple(
    (jnp.where if isinstance(k, jax.Array) else np.where)(
      at_least(k, one), k, one
    )
    for k in found
  )


def _keys(leaf, deltas, state, **options):
  del leaf, state, options
  return tuple(map(ordering.magnitude_keys, deltas))


def _update(leaf, deltas, base, state, searches, **options):
  del base
  keys = _keys(leaf, deltas, state, **options)
  return tuple(
    jnp.where(
      selection.keep_keys(key, leaf, search), delta, jnp.zeros_like(delta)
    )
    for key, delta, search in zip(keys, deltas, searches, strict=True)
  )


TRIM = transform.register_step(
  transform.Step(
    name="trim",
    update=_update,
    scope=lambda *, scope, **_: scope,
    **cuts(
      _keys,
      _ranks,
      bits=31,
      exact=lambda *, exact_k, **_: exact_k,
      early=True,
    ),
  )
)
