"""Linear layers: which axes of a leaf are inputs, which are outputs.

A leaf of a linear layer is a matrix, or a batch of them, whatever its axes:
flax's query kernel `[in, heads, size]` has one axis of inputs, its output
kernel `[heads, size, out]` has two, layers stacked for a scan have a batch
axis in front. A `LinearLayer` says which axes are which; `linear_layers`
finds them in any function of the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from patchjax.trees.errors import SelectionError, StructureError

Array = Any


@dataclasses.dataclass(frozen=True)
class LinearLayer:
  """What the axes of a leaf that multiplies an input are.

  Attributes:
    in_axes: those that are summed over, ascending.
    out_axes: those of the result, ascending.
    batch_axes: those that number matrices, ascending.
  """

  in_axes: tuple[int, ...]
  out_axes: tuple[int, ...]
  batch_axes: tuple[int, ...] = ()

  @property
  def order(self) -> tuple[int, ...]:
    """All axes: those of the batch, of inputs, of outputs."""
    return (*self.batch_axes, *self.in_axes, *self.out_axes)

  def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns how many matrices a leaf is, and their inputs and outputs.

    Args:
      shape: of the leaf.

    Raises:
      StructureError: if it has other axes than the layer.

    Example:
      >>> LinearLayer((0,), (1, 2)).sizes((8, 2, 4))
      (1, 8, 8)
    """
    if sorted(self.order) != list(range(len(shape))):
      raise StructureError(
        f"a layer with inputs {self.in_axes}, outputs {self.out_axes} and "
        f"batch axes {self.batch_axes} cannot be a leaf of shape {shape}; "
        "every axis must be one of these"
      )
    batch, inputs, outputs = (
      math.prod(shape[axis] for axis in axes)
      for axes in (self.batch_axes, self.in_axes, self.out_axes)
    )
    return batch, inputs, outputs

  def matrices(self, x: Array) -> Array:
    """Returns a leaf as matrices `[batch, inputs, outputs]`.

    Args:
      x: array of the leaf's shape.
    """
    sizes = self.sizes(tuple(x.shape))
    return jnp.transpose(x, self.order).reshape(sizes)

  def leaf(self, matrices: Array, shape: tuple[int, ...]) -> Array:
    """Returns the leaf that matrices are; inverse of `matrices`.

    Args:
      matrices: `[batch, inputs, outputs]`.
      shape: of the leaf.
    """
    moved = matrices.reshape([shape[axis] for axis in self.order])
    back = sorted(range(len(shape)), key=self.order.__getitem__)
    return jnp.transpose(moved, back)


def linear_layers(
  apply: Callable[..., Any], params: Any, *inputs: Any
) -> dict[str, LinearLayer]:
  """Returns the linear layers of a function of parameters, found by tracing.

  A leaf is one if all that happens to it is that inputs are multiplied with
  it (`dot_general`, which is what `@`, `dot` and `einsum` are), after nothing
  but casts, transpositions and reshapes of it, anywhere in `jit`, `scan`
  (with the leaf stacked along the scan, or the same in each step),
  `checkpoint` and functions with derivatives of their own. Leaves that are
  used in another way too, such as an embedding table that is also the output
  layer, leaves that are multiplied over different axes in different places,
  convolutions, biases and scales are not.

  Args:
    apply: `(params, *inputs) -> outputs`, of arrays; it is traced, not run.
    params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
    *inputs: pytrees of arrays, or of `jax.ShapeDtypeStruct`.

  Returns:
    `{text name: LinearLayer}` in the order in which they are first used.

  Example:
    >>> import numpy as np
    >>> params = {"w": np.zeros((2, 3, 5), "f4"), "b": np.zeros(5, "f4")}
    >>> def attend(params, x):
    ...   return jnp.einsum("tnh,nho->to", x, params["w"]) + params["b"]
    >>> linear_layers(attend, params, np.zeros((7, 2, 3), "f4"))
    {'w': LinearLayer(in_axes=(0, 1), out_axes=(2,), batch_axes=())}
  """
  from patchjax.statistics import tapping

  function, arrays = tapping.by_name(apply, params)
  found: dict[str, LinearLayer] = {}

  def trace(arrays, inputs):
    found.update(tapping.Wiring.of(function, arrays, *inputs).layers)
    return ()

  jax.eval_shape(trace, arrays, inputs)
  return found


def chosen(
  found: Mapping[str, LinearLayer], layers: Any
) -> dict[str, LinearLayer]:
  """Returns those of the layers found that are asked for.

  Args:
    found: by `linear_layers`.
    layers: a selector of their names; a mapping of names to `LinearLayer`
      that says what they must be; None for all.

  Raises:
    SelectionError: if one is not found, or is another than is said.
  """
  from patchjax.trees.selectors import select_named

  if layers is None:
    return dict(found)
  if not isinstance(layers, Mapping):
    return {name: found[name] for name in select_named(dict(found), layers)}
  wrong = {
    name: found.get(name, "no linear layer")
    for name, layer in layers.items()
    if found.get(name) != layer
  }
  if wrong:
    raise SelectionError(
      "layers are not what is said of them:\n"
      + "\n".join(
        f" - {name}: expected {layers[name]}, found {one}"
        for name, one in wrong.items()
      )
      + "\nto mend it: see linear_layers(apply, params, x); for layers that "
      "tracing cannot find give gram(..., inputs=...)"
    )
  return {name: found[name] for name in layers}
