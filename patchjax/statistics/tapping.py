"""Evaluating a function with its linear layers laid open.

The jaxpr of the function is evaluated as it is, but for the products found in
it (`wiring`): what is multiplied with a parameter is kept, and something may
be added to the product (a *tap*), so that a derivative with respect to the
tap is the gradient at the layer's output. No model has to be written for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from patchjax.statistics import wiring
from patchjax.statistics.layers import LinearLayer
from patchjax.trees.dtypes import is_array
from patchjax.trees.names import flatten

Array = Any
Taps = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Wiring:
  """A function of parameters as a jaxpr, and its linear layers.

  Attributes:
    closed: of the arrays among the parameters, and the inputs, flat.
    treedef: of the outputs.
    names: of the arrays among the parameters.
    uses: where layers multiply, by path.
    layers: by name of the leaf, in order of their first use.
  """

  closed: core.ClosedJaxpr
  treedef: Any
  names: tuple[str, ...]
  uses: Mapping[wiring.Path, wiring.Use]
  layers: dict[str, LinearLayer]

  @classmethod
  def of(
    cls,
    function: Callable[..., Any],
    arrays: Mapping[str, Any],
    *inputs: Any,
  ) -> Wiring:
    """Traces a function.

    Args:
      function: `(arrays, *inputs) -> outputs`, see `by_name`.
      arrays: parameters by name.
      *inputs: pytrees of arrays.
    """
    given = dict(arrays)
    # A dict is flattened in the order of its keys.
    names = tuple(sorted(given))
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(given, *inputs)
    rest = len(closed.jaxpr.invars) - len(names)
    origins = [
      wiring.Origin.of(name, arrays[name].shape)
      if all(arrays[name].shape)
      else None
      for name in names
    ]
    found = wiring.Found()
    outs = wiring.walk(closed.jaxpr, [*origins, *(None,) * rest], found)
    found.others.update(origin.leaf for origin in outs if origin is not None)
    layers: dict[str, LinearLayer] = {}
    for use in found.uses:
      if layers.setdefault(use.leaf, use.layer) != use.layer:
        found.others.add(use.leaf)
    layers = {n: x for n, x in layers.items() if n not in found.others}
    uses = {use.path: use for use in found.uses if use.leaf in layers}
    return cls(closed, jax.tree.structure(shapes), names, uses, layers)

  def only(self, names: Sequence[str]) -> Wiring:
    """Returns the wiring with some of the layers alone.

    Args:
      names: of the layers.
    """
    uses = {path: u for path, u in self.uses.items() if u.leaf in names}
    layers = {name: self.layers[name] for name in names}
    return dataclasses.replace(self, uses=uses, layers=layers)

  def run(
    self, named: Mapping[str, Array], *inputs: Any, taps: Taps | None = None
  ) -> tuple[Any, dict[str, tuple[Array, Array]]]:
    """Returns the outputs, and what goes into and out of each layer.

    Args:
      named: the parameters by name.
      *inputs: as they were traced.
      taps: what is added to each product, by the key of its use.

    Returns:
      the outputs, and `{key: (input, output)}`, as `Use.rows_in` and
      `Use.rows_out` take them.
    """
    arrays = [jnp.asarray(named[name]) for name in self.names]
    args = [*arrays, *jax.tree.leaves(inputs)]
    jaxpr, consts = self.closed.jaxpr, self.closed.consts
    outs, seen = _evaluate(self.uses, jaxpr, consts, args, (), taps)
    return jax.tree.unflatten(self.treedef, outs), seen

  def keys(self, name: str) -> tuple[str, ...]:
    """Returns the keys of the uses of a layer.

    Args:
      name: of the layer.
    """
    return tuple(use.key for use in self.uses.values() if use.leaf == name)

  def rows(
    self, name: str, seen: Mapping[str, Array], *, out: bool
  ) -> list[Array]:
    """Returns an array of each use of a layer as `[batch, rows, entries]`.

    Args:
      name: of the layer.
      seen: an array of each use, by key: inputs, or what is like outputs.
      out: whether they are like outputs.
    """
    uses = [use for use in self.uses.values() if use.leaf == name]
    return [
      (use.rows_out if out else use.rows_in)(seen[use.key].astype(jnp.float32))
      for use in uses
    ]

  def steps(
    self, name: str, shapes: Mapping[str, Sequence[int]]
  ) -> list[tuple[int, ...]]:
    """Returns, of each use of a layer, the scans that its rows are of.

    Args:
      name: of the layer.
      shapes: of what goes into each use, by key.

    Returns:
      their lengths, outermost first; a use's rows have them in front.
    """
    return [
      tuple(
        shapes[use.key][i] for i, along in enumerate(use.scans) if not along
      )
      for use in self.uses.values()
      if use.leaf == name
    ]


def by_name(
  apply: Callable[..., Any], params: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
  """Returns a function of arrays by name, and these arrays.

  Args:
    apply: `(params, *inputs) -> outputs`.
    params: pytree; what is no array in it stays as it is.
  """
  named, treedef = flatten(params)
  arrays = {name: leaf for name, leaf in named.items() if is_array(leaf)}
  fixed = tuple((n, x) for n, x in named.items() if n not in arrays)
  return _ByName(apply, treedef, tuple(named), fixed), arrays


@dataclasses.dataclass(frozen=True)
class _ByName:
  """A function whose parameters are a dict; hashable, for a static argument."""

  apply: Callable[..., Any]
  treedef: Any
  names: tuple[str, ...]
  fixed: tuple[tuple[str, Any], ...]

  def __call__(self, arrays, *inputs):
    named = dict(self.fixed) | dict(arrays)
    leaves = [named[name] for name in self.names]
    return self.apply(jax.tree.unflatten(self.treedef, leaves), *inputs)


def _evaluate(uses, jaxpr, consts, args, path, taps):
  """Returns a jaxpr's results and what its layers see."""
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))
  seen: dict[str, tuple[Array, Array]] = {}
  inside = {p[: len(path) + 1] for p in uses if len(p) > len(path) + 1}

  def read(var):
    return var.val if isinstance(var, core.Literal) else values[var]

  for i, eqn in enumerate(jaxpr.eqns):
    here = (*path, i)
    if here not in inside:
      outs = _as_it_is(jaxpr, eqn, values)
      if (use := uses.get(here)) is not None:
        if taps is not None:
          outs = [outs[0] + taps[use.key]]
        seen[use.key] = read(eqn.invars[1 - use.side]), outs[0]
    else:
      given = list(map(read, eqn.invars))
      if (inner := wiring.called(eqn)) is not None:
        outs, more = _evaluate(
          uses, inner.jaxpr, inner.consts, given, here, taps
        )
      else:
        outs, more = _scan(uses, eqn, given, here, taps)
      seen |= more
    values.update(zip(eqn.outvars, outs, strict=True))
  return list(map(read, jaxpr.outvars)), seen


def _as_it_is(jaxpr, eqn, values):
  """Returns the results of one equation."""
  variables = [v for v in eqn.invars if not isinstance(v, core.Literal)]
  variables = list(dict.fromkeys(variables))
  alone = jaxpr.replace(
    constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn]
  )
  function = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
  return function(*(values[v] for v in variables))


def _scan(uses, eqn, given, path, taps):
  """Returns a scan's results, with what its layers see in each step."""
  params, inner = eqn.params, eqn.params["jaxpr"]
  first = params["num_consts"]
  last = first + params["num_carry"]
  own = None
  if taps is not None:
    below = [u.key for p, u in uses.items() if p[: len(path)] == path]
    own = {key: taps[key] for key in below}

  def step(carry, x):
    x, own = x
    args = [*given[:first], *carry, *x]
    outs, seen = _evaluate(uses, inner.jaxpr, inner.consts, args, path, own)
    carry, y = outs[: last - first], outs[last - first :]
    return carry, (y, seen)

  carry, (ys, seen) = lax.scan(
    step,
    given[first:last],
    (given[last:], own),
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry, *ys], seen
