"""How strongly a model's loss pulls at each parameter, on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patchjax.statistics.fisher import Labels, accumulated, check_labels

Array = Any


def absolute_gradients(
  log_prob: Callable[[Any, Any], Array],
  params: Any,
  data: Any,
  *,
  key: Array | None = None,
  labels: Labels = "empirical",
  only: Any = None,
  chunk: int = 8,
) -> dict[str, Array]:
  """Returns the mean over examples of the gradients' absolute values.

  What trust-region merging (Sun et al. 2025,
  https://arxiv.org/abs/2501.15065) weighs task vectors with: `E |d loss /
  d theta|`, taken at the base, one gradient an example as in FusionBench's
  code.

  Args:
    log_prob: `(params, x) -> [..., classes]`, for one example, see
      `fisher_diagonal`.
    params: pytree of arrays.
    data: pairs `(inputs, labels)`, see `fisher_diagonal`.
    key: PRNG key, for sampled labels.
    labels: "empirical": the data's labels, as the code has it; see
      `fisher_diagonal` for others.
    only: selector of the leaves; by default all floating point ones.
    chunk: examples whose gradients are held at once.

  Returns:
    `{text name: float32 array}` of the shapes of the leaves.

  Raises:
    DtypeError: if `only` picks a leaf that is not floating point.
    NonFiniteError: if a gradient is NaN or Inf; names the leaves.
    StructureError: if there is no example.
    ValueError: if labels are asked for that cannot be had.

  Example:
    >>> import numpy as np
    >>> params = {"w": np.zeros((1, 2), np.float32)}
    >>> data = np.float32([[2], [-4]]), np.int32([0, 1])
    >>> found = absolute_gradients(lambda p, x: x @ p["w"], params, data)
    >>> found["w"].tolist()
    [[1.5, 1.5]]
  """
  check_labels(labels, key)
  values, _ = accumulated(
    log_prob, params, data, key, labels, only, chunk, "abs"
  )
  return values
