"""Gram matrices and Kronecker factors of linear layers.

A linear layer sees inputs X, one row an example and position. Its Gram matrix
`X^T X` is all that a least-squares fit of the layer to its own outputs needs
to know of the data (RegMean); with the same of the gradients at its outputs it
makes the Kronecker factors of the layer's Fisher information (K-FAC, MaTS).
Both are found for any function of parameters, without hooks in a model: see
`linear_layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchjax.patches.meshes import number_on_mesh
from patchjax.statistics import layers as layers_lib
from patchjax.statistics import streaming, tapping
from patchjax.statistics.fisher import Labels, check_labels, split
from patchjax.statistics.layers import LinearLayer
from patchjax.trees.errors import NonFiniteError, StructureError

Array = Any
Mask = Callable[[Any], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
  """Gram matrices of the inputs of linear layers.

  Attributes:
    values: `{text name: float32[batch, inputs, inputs]}`, the mean over rows
      of their outer products; the order of inputs is that of the leaf.
    rows: `{text name: number of rows}`.
    n: how many examples they were taken over.
    layers: `(text name, LinearLayer)` of each; static.
  """

  values: dict[str, Array]
  rows: dict[str, Any]
  n: Any
  layers: tuple[tuple[str, LinearLayer], ...] = dataclasses.field(
    metadata={"static": True}
  )

  @property
  def sums(self) -> dict[str, Array]:
    """The sums `X^T X`, where `values` are means."""
    return {name: x * float(self.rows[name]) for name, x in self.values.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KFac:
  """Kronecker factors of the Fisher information of linear layers.

  Attributes:
    inputs: `{text name: float32[batch, inputs, inputs]}`, as of `Gram`.
    outputs: `{text name: float32[batch, outputs, outputs]}`, the mean over
      rows of outer products of gradients of the log-likelihood at the output.
    rows: `{text name: number of rows}`.
    n: how many examples they were taken over.
    labels: where the labels came from; static.
    layers: `(text name, LinearLayer)` of each; static.
  """

  inputs: dict[str, Array]
  outputs: dict[str, Array]
  rows: dict[str, Any]
  n: Any
  labels: str = dataclasses.field(metadata={"static": True})
  layers: tuple[tuple[str, LinearLayer], ...] = dataclasses.field(
    metadata={"static": True}
  )


def gram(
  apply: Callable[[Any, Any], Any],
  params: Any,
  data: Any,
  *,
  layers: Any = None,
  inputs: Callable[[Any, Any], Mapping[str, Array]] | None = None,
  mask: Mask | None = None,
  chunk: int = 64,
) -> Gram:
  """Returns the Gram matrices of the inputs of all linear layers.

  RegMean (Jin et al. 2023, https://arxiv.org/abs/2212.09849) merges with
  them. A row is what a layer multiplies at once: an example's positions are
  rows, and so are the places where a layer is used again.

  Args:
    apply: `(params, x) -> anything`, for *one* example, as for
      `fisher_diagonal`; of a function of batches
      `lambda params, x: apply(params, x[None])`.
    params: pytree of arrays.
    data: pytree of arrays with examples along the first axis. An iterator
      (with `__next__`) gives such batches one after the other, of any sizes.
    layers: which layers: a selector, or `{name: LinearLayer}`; by default all
      that `linear_layers` finds.
    inputs: in the place of what tracing finds, an explicit map: `(params, x)
      -> {text name: inputs of that layer}`, arrays whose last axis the leaf
      is multiplied over; the first axis of the leaf is then its inputs, or
      what `layers` says of it.
    mask: `x -> weights` of the positions of an example (0 for padding):
      rows count by these weights, wherever a layer is used; those of a layer
      that sees one row an example, which was pooled, all count.
    chunk: examples whose inputs are held at once.

  Raises:
    NonFiniteError: if an input is NaN or Inf; names the leaves.
    SelectionError: if a layer that is asked for is none.
    StructureError: if there is no example, or no linear layer, or one whose
      rows are not the positions of the mask.

  Example:
    >>> import numpy as np
    >>> params = {"w": np.zeros((2, 3), np.float32)}
    >>> x = np.float32([[1, 0], [1, 2]])
    >>> found = gram(lambda p, x: x @ p["w"], params, x)
    >>> found.values["w"][0].tolist(), found.rows
    ([[1.0, 1.0], [1.0, 2.0]], {'w': 2})
  """
  function, arrays = tapping.by_name(apply, params)
  explicit = None if inputs is None else tapping.by_name(inputs, params)[0]
  static, known, total = None, {}, {}
  n, counted = 0, []
  for _, size, piece in streaming.pieces(data, chunk, "the Gram matrix"):
    if static is None:
      if explicit is None:
        known = _layers(function, arrays, piece, layers)
      else:
        known = _told(explicit, arrays, piece, layers)
      static = _Static(function, tuple(known), mask, explicit=explicit)
      total = _zeros(known, arrays, 1)
    total, rows = _add_inputs(static, total, arrays, piece)
    counted.append(rows)
    n += size
  return Gram(*_means(total, counted), n, tuple(known.items()))


def kfac(
  log_prob: Callable[[Any, Any], Array],
  params: Any,
  data: Any,
  *,
  key: Array | None = None,
  labels: Labels = "sample",
  layers: Any = None,
  mask: Mask | None = None,
  chunk: int = 16,
) -> KFac:
  """Returns the Kronecker factors of the Fisher of all linear layers.

  Martens and Grosse 2015 (https://arxiv.org/abs/1503.05671): the Fisher of a
  layer is taken for the product of the mean outer products of its inputs and
  of the gradients at its outputs. As in the code of MaTS (Tam et al. 2024,
  https://arxiv.org/abs/2312.04339) both are means over rows (tokens), and
  biases are left out.

  Args:
    log_prob: `(params, x) -> [..., classes]`, for one example: see
      `fisher_diagonal`.
    params: pytree of arrays.
    data: see `gram`; with "empirical" labels pairs `(inputs, labels)`.
    key: PRNG key, for sampled labels; example i uses `fold_in(key, i)`.
    labels: "sample", "exact" or "empirical", see `fisher_diagonal`.
    layers: see `gram`.
    mask: see `gram`; of the inputs.
    chunk: examples whose inputs and gradients are held at once.

  Raises:
    NonFiniteError: if an input or gradient is NaN or Inf; names the leaves.
    SelectionError: if a layer that is asked for is none.
    StructureError: see `gram`.
    ValueError: if labels are asked for that cannot be had.

  Example:
    >>> import numpy as np
    >>> params = {"w": np.zeros((2, 2), np.float32)}
    >>> x = np.float32([[1, 0], [1, 2]])
    >>> found = kfac(lambda p, x: x @ p["w"], params, x, labels="exact")
    >>> print(np.asarray(found.outputs["w"][0]).round(3))
    [[ 0.25 -0.25]
     [-0.25  0.25]]
  """
  check_labels(labels, key)
  function, arrays = tapping.by_name(log_prob, params)
  static, known, totals = None, {}, ({}, {})
  n, counted = 0, []
  for start, size, piece in streaming.pieces(data, chunk, "the K-FAC"):
    inputs, targets = split(piece, labels)
    if static is None:
      known = _layers(function, arrays, inputs, layers)
      static = _Static(function, tuple(known), mask, labels=labels)
      totals = _zeros(known, arrays, 1), _zeros(known, arrays, 2)
    totals, rows = _add_both(
      static, totals, arrays, inputs, targets, key, np.int32(start)
    )
    counted.append(rows)
    n += size
  ins, rows = _means(totals[0], counted)
  outs, _ = _means(totals[1], counted)
  return KFac(ins, outs, rows, n, labels, tuple(known.items()))


@dataclasses.dataclass(frozen=True)
class _Static:
  """What a compiled accumulation depends on besides shapes."""

  function: Callable[..., Any]
  names: tuple[str, ...]
  mask: Mask | None
  labels: str = ""
  explicit: Callable[..., Any] | None = None


def _layers(function, arrays, batch, asked) -> dict[str, LinearLayer]:
  found: dict[str, LinearLayer] = {}

  def one(x):
    found.update(tapping.Wiring.of(function, arrays, x).layers)
    return ()

  jax.eval_shape(lambda arrays, batch: jax.vmap(one)(batch), arrays, batch)
  if not found:
    raise StructureError(
      "no linear layer was found in the function (see linear_layers for what "
      "is one); say what layers see with gram(..., inputs=...)"
    )
  return layers_lib.chosen(found, asked)


def _told(explicit, arrays, batch, layers) -> dict[str, LinearLayer]:
  """Returns the layers of an explicit map of inputs."""
  shapes = jax.eval_shape(
    lambda a, b: jax.vmap(lambda x: dict(explicit(a, x)))(b), arrays, batch
  )
  wrong = [name for name in shapes if name not in arrays]
  if wrong:
    raise StructureError(
      f"inputs= names what is no leaf: {', '.join(wrong)}; leaves are "
      f"{', '.join(arrays)}"
    )
  told = layers if isinstance(layers, Mapping) else {}
  found = {}
  for name in shapes:
    ndim = len(arrays[name].shape)
    plain = LinearLayer((0,), tuple(range(1, ndim)))
    found[name] = told.get(name, plain)
    batch_, inputs, _ = found[name].sizes(tuple(arrays[name].shape))
    if batch_ != 1 or shapes[name].shape[-1:] != (inputs,):
      raise StructureError(
        f"inputs= gives {name} the shape {shapes[name].shape[1:]} for an "
        f"example, expected a last axis of {inputs}, and one matrix a leaf"
      )
  return found


def _zeros(known, arrays, which: int) -> dict[str, Array]:
  sizes = {n: x.sizes(tuple(arrays[n].shape)) for n, x in known.items()}
  return {
    name: jnp.zeros((size[0], size[which], size[which]), jnp.float32)
    for name, size in sizes.items()
  }


@dataclasses.dataclass
class _Seen:
  """What layers saw in a batch, and how that is rows of matrices.

  Attributes:
    static: of the accumulation.
    wires: of one example; None for an explicit map, whose arrays are rows.
    weights: of positions, `[examples, positions]`, or None.
  """

  static: _Static
  wires: tapping.Wiring | None
  weights: Array | None

  def _rows(self, name, seen, out):
    """Returns `[examples, batch, rows, entries]` of each use of a layer."""

    def one(seen):
      if self.wires is not None:
        return self.wires.rows(name, seen, out=out)
      x = seen[name].astype(jnp.float32)
      return [x.reshape(1, -1, x.shape[-1])]

    return jax.vmap(one)(seen)

  def _repeats(self, name, seen, rows):
    """Returns how often each use's rows go over the positions, 0 for never.

    Args:
      name: of the layer.
      seen: by key; arrays or their shapes.
      rows: of each use, or their shapes.
    """
    if self.weights is None:
      return [0] * len(rows)
    scans = [()]
    if self.wires is not None:
      shapes = {key: x.shape[1:] for key, x in seen.items()}
      scans = self.wires.steps(name, shapes)
    positions, found = self.weights.shape[1], []
    for steps, x in zip(scans, rows, strict=True):
      count = x.shape[2]
      # Positions are what is inside, or scanned along, of the scans around.
      ends = {math.prod(steps[:i]) for i in range(len(steps) + 1)}
      times = count // positions if positions else 0
      if times * positions == count and times in ends:
        found.append(times)
      elif count == 1:
        found.append(0)  # of what was pooled
      else:
        raise StructureError(
          f"mask= gives {positions} weights an example, and {name} sees "
          f"{count} rows of it; which are padding cannot be told. Leave such "
          "layers out (layers=), or give no mask"
        )
    return found

  def _own(self, name, seen):
    """Returns what is a layer's, so that no more goes through a mesh."""
    if self.wires is None:
      return {name: seen[name]}
    return {key: seen[key] for key in self.wires.keys(name)}

  def added(self, totals, seen, *, out):
    """Returns sums, and the outer products of all rows added to them.

    Args:
      totals: by name of the layer.
      seen: by key, examples along the first axis: inputs, or what is like
        outputs.
      out: whether they are like outputs.
    """

    def product(seen, weights, *, name):
      parts = self._rows(name, seen, out)
      total = None
      for rows, times in zip(parts, self._repeats(name, seen, parts)):
        left = rows
        if times:
          left = rows * jnp.tile(weights, times)[:, None, :, None]
        one = jnp.einsum(
          "nbri,nbrj->bij", left, rows, precision=jax.lax.Precision.HIGHEST
        )
        total = one if total is None else total + one
      return total

    return {
      name: total
      + number_on_mesh(
        functools.partial(product, name=name),
        self._own(name, seen),
        self.weights,
      )
      for name, total in totals.items()
    }

  def counts(self, seen):
    """Returns how many rows each layer saw, by their weights."""
    found = {}
    for name in self.static.names:
      own = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._own(name, seen)
      )
      shapes = jax.eval_shape(
        lambda seen, name=name: self._rows(name, seen, False), own
      )
      repeats = self._repeats(name, own, shapes)
      found[name] = jnp.float32(
        sum(x.shape[0] * x.shape[2] for x, n in zip(shapes, repeats) if not n)
      )
      if any(repeats):
        real = number_on_mesh(jnp.sum, self.weights)
        found[name] += jnp.float32(sum(repeats)) * real
    return found


def _weights(static, batch):
  if static.mask is None:
    return None
  weights = jax.vmap(static.mask)(batch).astype(jnp.float32)
  return weights.reshape(weights.shape[0], -1)


@functools.partial(jax.jit, static_argnums=0)
def _add_inputs(static, total, arrays, batch):
  """Adds a batch to the sums of outer products of inputs."""
  wires = None

  def one(x):
    nonlocal wires
    if static.explicit is not None:
      return dict(static.explicit(arrays, x))
    wires = tapping.Wiring.of(static.function, arrays, x).only(static.names)
    _, seen = wires.run(arrays, x)
    return {key: x for key, (x, _) in seen.items()}

  inputs = jax.vmap(one)(batch)
  seen = _Seen(static, wires, _weights(static, batch))
  return seen.added(total, inputs, out=False), seen.counts(inputs)


@functools.partial(jax.jit, static_argnums=0)
def _add_both(static, totals, arrays, batch, targets, key, start):
  """Adds a batch to the sums of both factors."""
  wires = None

  def scores(taps, x):
    nonlocal wires
    wires = tapping.Wiring.of(static.function, arrays, x).only(static.names)
    out, seen = wires.run(arrays, x, taps=taps)
    # Whole on every device: classes are picked one at a time.
    return number_on_mesh(jax.nn.log_softmax, out.astype(jnp.float32)), seen

  def forward(x):
    out, seen = scores(None, x)
    inputs = {k: x for k, (x, _) in seen.items()}
    return out, inputs, {k: jnp.zeros_like(y) for k, (_, y) in seen.items()}

  out, inputs, taps = jax.vmap(forward)(batch)
  seen = _Seen(static, wires, _weights(static, batch))
  ins, outs = seen.added(totals[0], inputs, out=False), totals[1]
  counts = seen.counts(inputs)
  if static.labels == "exact":
    if out.ndim != 2:
      raise ValueError(
        "labels='exact' sums over the classes of one prediction an example, "
        f"and log_prob gives shape {out.shape[1:]}; use labels='sample'"
      )

    def add_class(total, c):
      def one(taps, x, log_p):
        found = jax.grad(lambda taps: scores(taps, x)[0][c])(taps)
        # The outer product of what has the root of the probability.
        root = jnp.exp(log_p[c] / jnp.float32(2))
        return {k: g.astype(jnp.float32) * root for k, g in found.items()}

      found = jax.vmap(one)(taps, batch, out)
      return seen.added(total, found, out=True), None

    classes = jnp.arange(out.shape[1])
    return (ins, jax.lax.scan(add_class, outs, classes)[0]), counts

  def one(i, taps, x, out, y):
    if static.labels == "sample":
      y = jax.random.categorical(jax.random.fold_in(key, i), out)
    y = jnp.asarray(y)[..., None]

    def likelihood(taps):
      return jnp.sum(jnp.take_along_axis(scores(taps, x)[0], y, axis=-1))

    return jax.grad(likelihood)(taps)

  # Laid out over devices as the examples are.
  like = jnp.sum(jnp.zeros_like(out, jnp.int32), axis=tuple(range(1, out.ndim)))
  index = start + jnp.arange(out.shape[0], dtype=jnp.int32) + like
  found = jax.vmap(one)(index, taps, batch, out, targets)
  return (ins, seen.added(outs, found, out=True)), counts


def _means(total, counted) -> tuple[dict[str, Array], dict[str, Any]]:
  """Returns sums divided by the numbers of rows, and these."""
  sums = jax.device_get(counted)
  rows = {n: float(np.sum([s[n] for s in sums], dtype="f8")) for n in total}
  values, bad = _divided(
    total, {n: np.float32(max(r, 1e-30)) for n, r in rows.items()}
  )
  wrong = [name for name, is_bad in jax.device_get(bad).items() if is_bad]
  if wrong:
    raise NonFiniteError(
      "NaN or Inf in what goes into or comes back to " + ", ".join(wrong) + "; "
      "look at the model, or leave these layers out (layers=)"
    )
  return values, {n: int(r) if r == int(r) else r for n, r in rows.items()}


@jax.jit
def _divided(total, rows):
  values = {name: x / rows[name] for name, x in total.items()}
  bad = {name: ~jnp.isfinite(jnp.sum(x)) for name, x in values.items()}
  return values, bad
