"""The diagonal of the Fisher information, one example at a time.

`F_j = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_j)^2`: how much the model's
predictions depend on each parameter. Gradients are squared for each example
and then averaged. (The square of a mini-batch's mean gradient, which is
sometimes used in its place, is too small by about the size of the batch.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.statistics import streaming, tapping
from patchjax.trees.dtypes import KINDS, dtype_name, is_array, is_key
from patchjax.trees.errors import DtypeError, NonFiniteError, StructureError
from patchjax.trees.names import flatten
from patchjax.trees.selectors import select_named

Array = Any
Labels = Literal["sample", "empirical", "exact"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fisher:
  """A Fisher diagonal.

  Attributes:
    values: `{text name: float32 array}` of the shapes of the leaves.
    n: how many examples it was taken over.
    labels: where the labels came from; static.
  """

  values: dict[str, Array]
  n: Any
  labels: str = dataclasses.field(metadata={"static": True})


def fisher_diagonal(
  log_prob: Callable[[Any, Any], Array],
  params: Any,
  data: Any,
  *,
  key: Array | None = None,
  labels: Labels = "sample",
  only: Any = None,
  chunk: int = 8,
) -> Fisher:
  """Returns the diagonal of the Fisher information.

  Args:
    log_prob: `(params, x) -> [..., classes]`: for *one* example, the
      log-probabilities of its classes, or logits (they are normalised here).
      More axes, such as positions of a text, hold independent predictions.
    params: pytree of arrays.
    data: pytree of arrays with examples along the first axis; with
      "empirical" labels a pair `(inputs, labels)`. An iterator (with
      `__next__`) gives such batches one after the other, of any sizes.
    key: PRNG key, for sampled labels. Example i uses `fold_in(key, i)`, so
      results do not depend on `chunk` or on the batches.
    labels: "sample": one label an example, drawn from the model: unbiased.
      "exact": the sum over all classes, each weighted with its probability;
      costs as many gradients as there are classes. "empirical": the data's
      labels (the "empirical Fisher", which is another quantity).
    only: selector of the leaves; by default all floating point ones. Only
      their gradients are computed.
    chunk: examples whose gradients are held at once. On a CPU 1 is several
      times faster where layers are large: the products of a single example
      run on all cores.

  Returns:
    A `Fisher`: float32 arrays with the leaves' shapes and shardings.

  Raises:
    DtypeError: if `only` picks a leaf that is not floating point.
    NonFiniteError: if a gradient is NaN or Inf; names the leaves.
    StructureError: if there is no example.
    ValueError: if labels are asked for that cannot be had.

  Example:
    >>> import jax, numpy as np
    >>> params = {"w": np.zeros((2, 3), np.float32)}
    >>> x = np.float32([[1, 0], [0, 2]])
    >>> model = lambda p, x: x @ p["w"]
    >>> f = fisher_diagonal(model, params, x, labels="exact")
    >>> print(np.asarray(f.values["w"]).round(3), f.n)
    [[0.111 0.111 0.111]
     [0.444 0.444 0.444]] 2
  """
  check_labels(labels, key)
  values, n = accumulated(
    log_prob, params, data, key, labels, only, chunk, "square"
  )
  return Fisher(values, n, labels)


def check_labels(labels: str, key: Any) -> None:
  """Raises ValueError for labels that cannot be had.

  Args:
    labels: see `fisher_diagonal`.
    key: PRNG key, or None.
  """
  if labels not in ("sample", "empirical", "exact"):
    raise ValueError(
      f"labels must be 'sample', 'empirical' or 'exact', got {labels!r}"
    )
  if labels == "sample" and key is None:
    raise ValueError("sampled labels need key=jax.random.key(...)")


def accumulated(
  log_prob: Callable[[Any, Any], Array],
  params: Any,
  data: Any,
  key: Array | None,
  labels: Labels,
  only: Any,
  chunk: int,
  power: Literal["square", "abs"],
) -> tuple[dict[str, Array], int]:
  """Returns the mean over examples of a power of their gradients.

  Args:
    log_prob: see `fisher_diagonal`.
    params: see `fisher_diagonal`.
    data: see `fisher_diagonal`.
    key: see `fisher_diagonal`.
    labels: see `fisher_diagonal`.
    only: see `fisher_diagonal`.
    chunk: see `fisher_diagonal`.
    power: of each entry of a gradient.

  Returns:
    `{text name: mean}`, and the number of examples.
  """
  streaming.check_chunk(chunk)
  picked = picked_floats(flatten(params)[0], only)
  function, arrays = tapping.by_name(log_prob, params)
  static = _Static(function, labels, chunk, power)
  chosen = {name: arrays[name] for name in picked}
  rest = {name: leaf for name, leaf in arrays.items() if name not in chosen}
  total = {name: _zeros(leaf) for name, leaf in chosen.items()}
  n = 0
  for start, size, batch in streaming.pieces(data, None, "the Fisher"):
    inputs, targets = split(batch, labels)
    total = _accumulate(
      static, total, chosen, rest, inputs, targets, key, np.int32(start)
    )
    n += size
  values, bad = _mean(total, np.float32(n))
  wrong = [name for name, is_bad in jax.device_get(bad).items() if is_bad]
  if wrong:
    raise NonFiniteError(
      "the Fisher is NaN or Inf in " + ", ".join(wrong) + "; look at the "
      "model's log-probabilities (log of 0?) or leave the leaves out (only=)"
    )
  return values, n


def picked_floats(named: dict[str, Any], only: Any) -> tuple[str, ...]:
  """Returns the names of the floating point leaves that a selector picks.

  Args:
    named: `{text name: leaf}`.
    only: a selector; None for all floating point leaves.

  Raises:
    DtypeError: if it picks a leaf that is not floating point.
    StructureError: if there is none.
  """
  floats = tuple(name for name, leaf in named.items() if _is_float(leaf))
  if only is None:
    if not floats:
      raise StructureError("params hold no floating point array")
    return floats
  arrays = {name: leaf for name, leaf in named.items() if is_array(leaf)}
  picked = select_named(arrays, only)
  wrong = [name for name in picked if name not in floats]
  if wrong:
    raise DtypeError(
      "no gradient with respect to leaves that are not floating point: "
      + ", ".join(f"{name} ({dtype_name(named[name])})" for name in wrong)
      + "; narrow only="
    )
  return picked


def _is_float(leaf: Any) -> bool:
  if not is_array(leaf) or is_key(leaf):
    return False
  kind = KINDS[dtype_name(leaf)]
  return kind.floating and kind.words == 1


def _zeros(leaf: Any) -> Array:
  return jnp.zeros_like(leaf, jnp.float32)


def split(batch: Any, labels: Labels) -> tuple[Any, Any]:
  """Returns the inputs of a batch, and its labels or None.

  Args:
    batch: of the data.
    labels: where labels come from.

  Raises:
    ValueError: if the batch should have labels, and is no pair.
  """
  if labels != "empirical":
    return batch, None
  if not isinstance(batch, tuple | list) or len(batch) != 2:
    raise ValueError(
      "with labels='empirical' the data is a pair (inputs, labels), got "
      f"{type(batch).__name__}"
    )
  return batch[0], batch[1]


@dataclasses.dataclass(frozen=True)
class _Static:
  """What a compiled accumulation depends on besides shapes."""

  function: Callable[[Any, Any], Array]
  labels: Labels
  chunk: int
  power: str


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _accumulate(static, total, chosen, rest, inputs, targets, key, start):
  """Adds the squared gradients of a batch's examples to `total`."""

  def scores(chosen, x):
    out = static.function({**rest, **chosen}, x)
    return jax.nn.log_softmax(out.astype(jnp.float32))

  def squared(args):
    i, x, y = args
    if static.labels == "exact":
      return _over_classes(static.power, scores, chosen, x)
    if static.labels == "sample":
      own = jax.random.fold_in(key, i)
      y = jax.random.categorical(own, jax.lax.stop_gradient(scores(chosen, x)))
    y = jnp.asarray(y)

    def log_likelihood(chosen):
      out = scores(chosen, x)
      return jnp.sum(jnp.take_along_axis(out, y[..., None], axis=-1))

    return _powers(static.power, jax.grad(log_likelihood)(chosen))

  def add(total, args):
    many = jax.vmap(squared)(args)
    return jax.tree.map(lambda a, b: a + jnp.sum(b, 0), total, many), None

  size = jax.tree.leaves(inputs)[0].shape[0]
  index = start + jnp.arange(size, dtype=jnp.int32)
  args = (index, inputs, targets)
  whole = size // static.chunk * static.chunk
  if whole:
    chunks = jax.tree.map(
      lambda a: a[:whole].reshape(-1, static.chunk, *a.shape[1:]), args
    )
    total, _ = jax.lax.scan(add, total, chunks)
  if whole < size:
    total, _ = add(total, jax.tree.map(lambda a: a[whole:], args))
  return total


def _powers(power: str, grads: Any) -> Any:
  function = jnp.square if power == "square" else jnp.abs
  return jax.tree.map(lambda g: function(g.astype(jnp.float32)), grads)


def _over_classes(power, scores, chosen, x):
  """Returns `sum_c p_c |d log p_c|^power`, one class at a time."""
  shape = jax.eval_shape(scores, chosen, x).shape
  if len(shape) != 1:
    raise ValueError(
      "labels='exact' sums over the classes of one prediction an example, "
      f"and log_prob gives shape {shape}; use labels='sample'"
    )
  log_p = jax.lax.stop_gradient(scores(chosen, x))

  def add(total, c):
    grads = jax.grad(lambda p: scores(p, x)[c])(chosen)
    return jax.tree.map(
      lambda t, g: t + jnp.exp(log_p[c]) * g, total, _powers(power, grads)
    ), None

  zero = jax.tree.map(_zeros, chosen)
  return jax.lax.scan(add, zero, jnp.arange(shape[0]))[0]


@jax.jit
def _mean(total, n):
  values = jax.tree.map(lambda t: t / n, total)
  bad = jax.tree.map(lambda t: ~jnp.isfinite(jnp.sum(t)), values)
  return values, bad
