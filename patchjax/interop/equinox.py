"""equinox: modules are pytrees, so `pj.apply` is nearly all there is."""

from __future__ import annotations

from typing import Any

from patchjax.patches import Patch, apply


def update(model: Any, patch: Patch) -> Any:
  """Returns an equinox module with a patch applied.

  `pj.apply(model, patch)` in one line, with what is no array (activation
  functions, sizes) set aside, so that it may be called inside
  `eqx.filter_jit` and on patches of the partitioned model alike.

  Args:
    model: an `eqx.Module`.
    patch: a patch for its arrays.

  Raises:
    MismatchError: if the patch is for another structure.

  Example:
    >>> import equinox as eqx, jax
    >>> import patchjax as pj
    >>> model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    >>> params = eqx.filter(model, eqx.is_array)
    >>> patch = pj.diff(params, jax.tree.map(lambda x: 2 * x, params))
    >>> new = update(model, patch)
    >>> bool((new.layers[0].weight == 2 * model.layers[0].weight).all())
    True
  """
  import equinox as eqx

  arrays, rest = eqx.partition(model, eqx.is_array)
  return eqx.combine(apply(arrays, patch), rest)
