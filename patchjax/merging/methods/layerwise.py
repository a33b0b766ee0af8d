"""RegMean++: each block is fitted to what the merged blocks before it give."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from patchjax.merging.methods.averages import linear
from patchjax.merging.methods.coefficients import LAYER
from patchjax.merging.methods.statistical import regmean
from patchjax.merging.running import merge
from patchjax.statistics import gram, linear_layers
from patchjax.statistics.streaming import part
from patchjax.trees.errors import SelectionError, StructureError
from patchjax.trees.names import flatten
from patchjax.trees.selectors import select_named

Array = Any
Blocks = list[tuple[tuple[str, ...], tuple[str, ...]]]


def regmean_plus_plus(
  apply: Callable[[Any, Any], Any],
  models: Sequence[Any],
  data: Sequence[Any],
  *,
  weights: Any = 1.0,
  off_diagonal: Any = 0.9,
  blocks: Sequence[Any] | None = None,
  mask: Callable[[Any], Array] | None = None,
  chunk: int = 64,
) -> Any:
  """Returns the RegMean merge, with Gram matrices through merged layers.

  RegMean++ (Nguyen et al. 2025, https://arxiv.org/abs/2508.03121): the blocks
  of a model are merged from the first to the last; the inputs of a block come
  from the blocks before it as they were merged, and inside it from each
  contributor's own. As in the authors' code leaves before the first block
  (embeddings), and all that are no linear layers, get the mean; the last
  leaves (a head) are a block of their own if they are linear layers.

  Leaves that are stacked for a scan over layers have no number in their names:
  the whole stack is one block then, which is plain RegMean. Unstack them, in
  the models and in `apply`, for a block a layer.

  Every block asks for one more run of the model up to it, over all data.

  Args:
    apply: `(params, x) -> anything`, for one example; see `statistics.gram`.
    models: pytrees of one structure.
    data: one a contributor: a pytree of arrays with examples along the first
      axis, or a function without arguments that returns an iterator over
      such batches (it is gone through once a block).
    weights: one a contributor, or one for all.
    off_diagonal: see `regmean`.
    blocks: selectors of leaves, a block each, in the order in which they are
      run; by default leaves whose names agree up to their first number, in
      the order of their first linear layer.
    mask: see `statistics.gram`.
    chunk: see `statistics.gram`.

  Returns:
    a pytree of the structure of the models.

  Raises:
    MismatchError: if a model does not fit the first; lists every leaf.
    SelectionError: if a leaf is in two blocks, or a selector picks nothing.
    StructureError: if there is no model, not as many data, or no linear layer.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> models = [{"w": np.float32([[x], [x]])} for x in (1, 3)]
    >>> data = [np.float32([[1, 0]]), np.float32([[0, 1]])]
    >>> merged = pj.merging.regmean_plus_plus(
    ...   lambda params, x: x @ params["w"], models, data
    ... )
    >>> merged["w"].tolist()
    [[1.0], [3.0]]
  """
  if not models or len(models) != len(data):
    raise StructureError(
      f"expected models and as many data, got {len(models)} and {len(data)}"
    )
  models = list(models)
  first = next(iter(_batches(data[0])))
  found = linear_layers(
    apply, models[0], jax.tree.map(lambda x: x[0], part(first, 0, 1))
  )
  named, treedef = flatten(models[0])
  order = _blocks_of(named, tuple(found), blocks)
  in_blocks = {name for leaves, _ in order for name in leaves}
  mean = flatten(merge(None, models, linear(weights=weights)))[0]

  def whole(leaves):
    return jax.tree.unflatten(treedef, [leaves[name] for name in named])

  current = [
    {n: x if n in in_blocks else mean[n] for n, x in flatten(m)[0].items()}
    for m in models
  ]
  for leaves, layers in order:
    merged = {name: mean[name] for name in leaves}
    if layers:
      grams = [
        gram(
          apply,
          whole(own),
          _batches(examples),
          layers=lambda name, _, layers=layers: name in layers,
          mask=mask,
          chunk=chunk,
        )
        for own, examples in zip(current, data, strict=True)
      ]
      method = regmean(grams=grams, weights=weights, off_diagonal=off_diagonal)
      new = merge(
        None, models, method, only=lambda name, _, layers=layers: name in layers
      )
      new = flatten(new)[0]
      merged |= {name: new[name] for name in layers}
    current = [own | merged for own in current]
  return whole(current[0])


def _batches(data: Any) -> Iterator[Any]:
  made: Any = data() if callable(data) else [data]
  return iter(made)


def _blocks_of(
  named: dict[str, Any], layers: tuple[str, ...], blocks: Any
) -> Blocks:
  """Returns the leaves and the linear layers of each block, in order."""
  if not layers:
    raise StructureError(
      "no linear layer was found in the function; see linear_layers for what "
      "is one"
    )
  if blocks is None:
    block = {name: _block(name) for name in named}
    # Layers of no block are blocks: those that come after one another, one.
    last, count = None, 0
    for name in layers:
      if block[name] is None:
        count += last is not None
        block[name], last = f"#{count}", None
      else:
        last = block[name]
    order = list(dict.fromkeys(block[name] for name in layers))
    groups = [tuple(n for n in named if block[n] == b) for b in order]
  else:
    groups = [select_named(named, selector) for selector in blocks]
    picked = [name for group in groups for name in group]
    if twice := sorted({n for n in picked if picked.count(n) > 1}):
      raise SelectionError(f"leaves in two blocks: {', '.join(twice)}")
  return [(g, tuple(n for n in layers if n in g)) for g in groups]


def _block(name: str) -> str | None:
  found = re.search(LAYER, name)
  return name[: found.end(1)] if found else None
