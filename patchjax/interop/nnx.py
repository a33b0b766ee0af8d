"""flax nnx: modules are patched in place, as their users expect."""

from __future__ import annotations

from typing import Any

from patchjax.patches import Patch, apply


def update(model: Any, patch: Patch, *, wrt: Any = None) -> None:
  """Applies a patch to an nnx module in place.

  The patch may come from anything with the same names: this module, its
  state, its pure dict, or the same model elsewhere.

  Args:
    model: an `nnx.Module`; its variables get new values.
    patch: a patch for the variables selected by `wrt`.
    wrt: an nnx filter of the variables that the patch is for (`wrt` is what
      `nnx.Optimizer` calls it); by default `nnx.Param`.

  Raises:
    MismatchError: if the patch is for another structure.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> import patchjax as pj
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> base = nnx.state(model, nnx.Param)
    >>> tuned = jax.tree.map(lambda x: x + 1, base)
    >>> update(model, pj.diff(base, tuned))
    >>> model.bias[...]
    Array([1., 1., 1.], dtype=float32)
  """
  from flax import nnx

  params = nnx.state(model, nnx.Param if wrt is None else wrt)
  nnx.update(model, apply(params, patch))
