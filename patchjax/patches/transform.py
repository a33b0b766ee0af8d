"""Transforms: the one protocol of encodings and merges, and `chain`.

A transform maps k deltas of a leaf to k deltas, or, at most once in a chain,
to one. It is described by *stages*: a `Step`, which is a record of
module-level functions, and its options, which are hashable and static. Its
*numbers* (density, scale, weights, t) are a pytree beside them, so that a
transform is itself a pytree: an argument of a jitted function whose numbers
change without a new compilation, can be mapped over with `vmap`, and learned
with `grad`.

A step sees one leaf at a time, whoever runs it: eagerly leaf by leaf, inside
a user's jit, on a mesh, or over files that do not fit in memory. A step that
needs the whole tree (a global threshold) also counts (`Count`): its `reduce`
looks at a leaf and returns a small array, the runner adds these up over leaves
and shards, `finish` turns the total into what the next pass or `update` needs.

A chain runs in one space. In the space of deltas its arrays are task vectors
`f32(x_i) - f32(base)`, and the base is added to the result; in the space of
parameters they are `f32(x_i)` themselves, the result is the merged leaf, and
the base is read only by steps that ask for it. Means commute with adding the
base: they say "either", and a merge then spares itself the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from patchjax.patches import perleaf, placement
from patchjax.trees.errors import FormatError, SelectionError

Array = Any
Options = tuple[tuple[str, Hashable], ...]
Space = Literal["deltas", "params", "either"]


@dataclasses.dataclass(frozen=True)
class Count:
  """Passes over the leaves, in which a step counts something.

  Attributes:
    reduce: `(leaf, deltas, state, carry, **options)`, a small array or a
      pytree of them: summed over leaves and shards. With `Step.needs_base`
      it is `(leaf, deltas, base, state, carry, **options)`.
    finish: `(total, carry) -> (carry, done)`; `done` is a boolean scalar, and
      another pass is made until it is true. Not told of the options: steps
      that have the function in common share its program.
    once: whether the first pass is always the last. It is then run without a
      loop, and derivatives go through it; through others they do not.
    beside: whether `reduce` is given what `Step.kept` made and the deltas
      beside it: `(leaf, kept, deltas, state, carry, **options)`.
    needed: `(carry)`, whether the first pass is needed, by default always.
  """

  reduce: Callable[..., Any]
  finish: Callable[..., Any]
  once: bool = False
  beside: bool = False
  needed: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Step:
  """One kind of step: module-level functions on one leaf.

  Every function gets the step's options as keyword arguments. `leaf` is a
  `placement.Leaf`; `deltas` is a tuple of k float arrays of its shape, never
  stacked: task vectors, or in the space of parameters the contributors'
  leaves; `state` is the step's numbers (a dict) or what `init` made of them,
  with every `PerLeaf` replaced by its number for this leaf.

  Attributes:
    name: what the step is called in specs.
    update: `(leaf, deltas, base, state, shared, **options)`, the new tuple of
      k deltas or, for a reducing step, one array. A last step may return
      codes. `base` is the base's leaf in the dtype of the deltas, or None
      (in the space of parameters, unless `needs_base`); `shared` is the last
      carry, or None for a step that does not count.
    init: `(numbers, shapes, **options) -> state`, if the state is more than
      the numbers (a key, statistics); `shapes` is `{name: ShapeDtypeStruct}`.
    start: `(state, shapes, k, **options) -> carry` of the first pass;
      `shapes` is the list of the shapes of all leaves, in order of names.
    counts: `(**options)`, the tuple of what is counted, one after another;
      the carry goes on from each to the next.
    reducing: whether `update` turns the k deltas into one.
    scope: `(**options) -> "tree" | "leaf" | "none"`: what counts are summed
      over, or that these options need none; by default the tree.
    space: `(**options) -> "deltas" | "params" | "either"`: what the arrays
      are; by default deltas. "either" is for steps that commute with adding
      the base, as means do.
    needs_base: whether the step cannot do without the base.
    carries_nonfinite: whether NaN or Inf in an entry of any of the arrays is
      always seen in that entry of the result, so that a check of the result
      is enough: sums do, selections do not.
    kept: `(leaf, deltas, state, **options)`, a tuple of integer arrays of the
      leaf's shape that `Count.reduce` is given in the place of the deltas, or
      before them; they are computed once and kept, where passes are over the
      leaf alone.
      With `needs_base` it is `(leaf, deltas, base, state, **options)`.
    keys: of a step that searches for cuts (`rank_cuts.cuts`): the integer
      keys of a leaf.
    each: and how many cuts are made of each of them.
    ranks: and the ranks of the cuts.
    key_bits: and how many bits the keys have.
    exact: and, `(**options) -> bool`, whether ties are broken by position.
    bracket: "opens": `update` returns `(deltas, held)`, where `held` is any
      pytree of arrays; "closes": the `update` of a later step is given what
      was opened last, as `held=`. Brackets nest.
    counted: `(shapes, k, **options) -> shapes`, of a step that leaves some
      entries without meaning (zeros): the shapes of what counts for the steps
      after it, where they ask for shares of a size.
    dear: whether `update` takes far longer than to read a leaf, so that what
      it makes is kept for later steps that count, k leaves of each.
  """

  name: str
  update: Callable[..., Any]
  init: Callable[..., Any] | None = None
  start: Callable[..., Any] | None = None
  counts: Callable[..., tuple[Count, ...]] | None = None
  reducing: bool = False
  scope: Callable[..., str] | None = None
  space: Callable[..., str] | None = None
  needs_base: bool = False
  carries_nonfinite: bool = False
  kept: Callable[..., tuple[Array, ...]] | None = None
  keys: Callable[..., tuple[Array, ...]] | None = None
  each: int = 1
  ranks: Callable[..., Any] | None = None
  key_bits: int = 32
  exact: Callable[..., bool] | None = None
  bracket: Literal["opens", "closes"] | None = None
  counted: Callable[..., Any] | None = None
  dear: bool = False

  def __post_init__(self):
    if (self.start is None) != (self.counts is None):
      raise ValueError(f"step {self.name!r}: start and counts go together")


def one_count(
  reduce: Callable[..., Any], finish: Callable[..., Any], **how: Any
) -> Callable[..., tuple[Count, ...]]:
  """Returns the `counts` of a step that counts one thing.

  Args:
    reduce: see `Count`.
    finish: see `Count`.
    **how: other attributes of `Count`.
  """
  found = (Count(reduce, finish, **how),)
  return lambda **options: found


_STEPS: dict[str, Step] = {}


def register_step(step: Step) -> Step:
  """Makes a step known by its name, so that `from_spec` finds it.

  Args:
    step: the step. Registering a name again is allowed from the same module
      (a notebook cell that is run again).

  Returns:
    the step.

  Raises:
    ValueError: if another module registered the name.
  """
  before = _STEPS.get(step.name)
  if before and before.update.__module__ != step.update.__module__:
    raise ValueError(
      f"a step named {step.name!r} is already registered by "
      f"{before.update.__module__}; choose another name"
    )
  _STEPS[step.name] = step
  return step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
  """A step with its numbers, or a chain of several. See `chain`.

  Attributes:
    numbers: a dict of numbers or arrays for each stage: the pytree's leaves.
    stages: `(step, options)` for each stage; static.
  """

  numbers: tuple[dict[str, Any], ...]
  stages: tuple[tuple[Step, Options], ...] = dataclasses.field(
    metadata={"static": True}
  )

  @classmethod
  def of(
    cls, step: Step, numbers: Mapping[str, Any], **options: Hashable
  ) -> Transform:
    """Returns the transform of one step.

    Args:
      step: the step.
      numbers: traced arguments; those that are None are left out.
      **options: static arguments, hashable.

    Example:
      >>> def halved(leaf, deltas, base, state, shared):
      ...   return tuple(d / 2 for d in deltas)
      >>> Transform.of(register_step(Step("halve", halved)), {})
      halve()
    """
    given = {k: v for k, v in numbers.items() if v is not None}
    return cls((given,), ((step, tuple(sorted(options.items()))),))

  @property
  def spec(self) -> tuple[Any, ...]:
    """Names and options, hashable; the numbers are not in it.

    Example:
      >>> import patchjax as pj
      >>> pj.trim(density=0.2).spec
      ('trim', (('exact_k', False), ('one_more', False), ('scope', 'tree')))
    """
    specs = tuple((step.name, options) for step, options in self.stages)
    return specs[0] if len(specs) == 1 else ("chain", specs)

  @property
  def reducing(self) -> bool:
    """Whether k deltas become one."""
    return any(step.reducing for step, _ in self.stages)

  @property
  def space(self) -> Space:
    """What the arrays of the steps are: "deltas", "params", or "either".

    Example:
      >>> import patchjax as pj
      >>> pj.merging.linear().space, pj.merging.ties().space
      ('either', 'deltas')
    """
    spaces = {space_of(step, options) for step, options in self.stages}
    order: tuple[Space, ...] = ("deltas", "params", "either")
    return next(space for space in order if space in spaces)

  @property
  def needs_base(self) -> bool:
    """Whether some step reads the base's leaf."""
    return any(step.needs_base for step, _ in self.stages)

  def init(self, params: Any) -> tuple[Any, ...]:
    """Returns the state of each stage: its numbers, as float32 arrays.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`; only its names,
        shapes and dtypes matter.

    Example:
      >>> import patchjax as pj
      >>> pj.merging.scale(2.0).init({"w": 0.0})
      ({'scale': Array(2., dtype=float32)},)
    """
    from patchjax.trees import names

    shapes = {
      name: jax.eval_shape(jnp.asarray, leaf)
      for name, leaf in names.named_leaves(params).items()
    }
    state = initial_state(self, shapes)
    return jax.tree.map(_as_array, state)

  def __repr__(self) -> str:
    parts = []
    for (step, options), numbers in zip(self.stages, self.numbers, strict=True):
      args = [f"{k}={v}" for k, v in numbers.items()]
      args += [f"{k}={v!r}" for k, v in options]
      parts.append(f"{step.name}({', '.join(args)})")
    return parts[0] if len(parts) == 1 else f"chain({', '.join(parts)})"


def _as_array(x: Any) -> Array:
  if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jnp.number):
    return x  # a PRNG key
  return jnp.asarray(x, jnp.float32)


def chain(*transforms: Transform) -> Transform:
  """Returns the transform that applies several, first to last.

  Args:
    *transforms: transforms, themselves chains or not.

  Raises:
    ValueError: if more than one step reduces k deltas to one, if some work
      on task vectors and others on parameters, or if a step closes what none
      has opened.

  Example:
    >>> import patchjax as pj
    >>> pj.chain(pj.trim(density=0.2), pj.merging.mean())
    chain(trim(density=0.2, exact_k=False, one_more=False, scope='tree'),
          mean())
  """
  stages = tuple(stage for t in transforms for stage in t.stages)
  if not stages:
    raise ValueError("chain: at least one transform is needed")
  reducing = [step.name for step, _ in stages if step.reducing]
  if len(reducing) > 1:
    raise ValueError(
      "chain: at most one reducing step is allowed, got "
      f"{len(reducing)}: {', '.join(reducing)}"
    )
  spaces: dict[str, list[str]] = {}
  for step, options in stages:
    spaces.setdefault(space_of(step, options), []).append(step.name)
  if "deltas" in spaces and "params" in spaces:
    raise ValueError(
      "chain: the steps must work in one space, got "
      f"{', '.join(spaces['deltas'])} on task vectors and "
      f"{', '.join(spaces['params'])} on parameters"
    )
  depth = 0
  for step, _ in stages:
    depth += {"opens": 1, "closes": -1}.get(step.bracket or "", 0)
    if depth < 0:
      raise ValueError(f"chain: no step before {step.name} opens its bracket")
  numbers = tuple(numbers for t in transforms for numbers in t.numbers)
  return Transform(numbers, stages)


def from_spec(spec: Sequence[Any], numbers: Any) -> Transform:
  """Returns the transform that a spec and numbers describe.

  Args:
    spec: as given by `Transform.spec`; lists (from JSON) do for tuples.
    numbers: `Transform.numbers`: a dict for each stage.

  Raises:
    FormatError: if a step is unknown or the numbers do not fit.

  Example:
    >>> import patchjax as pj
    >>> t = pj.chain(pj.trim(density=0.2), pj.merging.mean())
    >>> pj.from_spec(t.spec, t.numbers) == t
    True
  """
  name, options = spec
  specs = options if name == "chain" else (spec,)
  if isinstance(numbers, Mapping):
    numbers = (numbers,)
  if len(specs) != len(numbers):
    raise FormatError(
      f"a spec of {len(specs)} steps needs as many dicts of numbers, got "
      f"{len(numbers)}"
    )
  stages = []
  for name, options in specs:
    if name not in _STEPS:
      raise FormatError(
        f"unknown step {name!r}; known are {', '.join(sorted(_STEPS))}. "
        "Import the module that defines it (register_step) first"
      )
    stages.append((_STEPS[name], tuple((k, _frozen(v)) for k, v in options)))
  return chain(
    *(
      Transform((dict(n),), (stage,))
      for n, stage in zip(numbers, stages, strict=True)
    )
  )


def _frozen(value: Any) -> Hashable:
  return tuple(map(_frozen, value)) if isinstance(value, list) else value


def initial_state(method: Transform, shapes: Mapping[str, Any]) -> tuple:
  """Returns each stage's state, numbers as they were given.

  Args:
    method: the transform.
    shapes: `{name: ShapeDtypeStruct}` of the leaves.
  """
  return tuple(
    step.init(numbers, shapes, **dict(options)) if step.init else numbers
    for (step, options), numbers in zip(
      method.stages, method.numbers, strict=True
    )
  )


def space_of(step: Step, options: Options) -> Any:
  """Returns what a step works on: "deltas", "params", or "either"."""
  return step.space(**dict(options)) if step.space else "deltas"


def scope_of(step: Step, options: Options) -> str:
  """Returns what a step counts over: "tree", "leaf", or "none"."""
  if step.counts is None:
    return "none"
  return step.scope(**dict(options)) if step.scope else "tree"


def counts_of(step: Step, options: Options) -> tuple[Count, ...]:
  """Returns what a step counts, one after another."""
  return step.counts(**dict(options)) if step.counts else ()


def per_contributor(value: Any, k: int) -> tuple[Array, ...]:
  """Returns a number for each of k contributors: a scalar broadcasts.

  Args:
    value: a number, or k of them.
    k: how many contributors there are.

  Raises:
    SelectionError: if there are neither one nor k numbers, or if they differ
      by leaf and the count is over the tree.
  """
  perleaf.refuse(value)
  shape = jnp.shape(value)
  if shape == ():
    return (value,) * k
  if shape != (k,):
    raise SelectionError(
      f"expected one number or {k} (one a contributor), got shape {shape}"
    )
  return tuple(value[i] for i in range(k))


def rounded(product: Array) -> Array:
  """Returns a product, rounded before anything is added to it.

  A compiler may contract a product and a sum into one rounding, and does so
  in some of the places where the same expression is compiled (a jit, a mesh,
  a remainder of a loop). A merge would then have other bits there. It cannot
  look through this selection, which is true for no finite number.

  Args:
    product: floating point array.
  """
  largest = jnp.asarray(jnp.finfo(product.dtype).max, product.dtype)
  return jnp.where(product > largest, jnp.full_like(product, jnp.nan), product)


# ---------------------------------------------------------------------------
# Running the stages on one leaf: traceable, shared by every runner.


def run_prefix(
  method: Transform,
  count: int,
  leaf: placement.Leaf,
  deltas: tuple[Array, ...],
  base: Array,
  state: Sequence[Any],
  shared: Sequence[Any],
) -> Any:
  """Returns a leaf's deltas after the first `count` stages.

  Args:
    method: the transform (its numbers are not used: the state holds them).
    count: how many stages to run.
    leaf: where the leaf is.
    deltas: the k deltas before the first stage.
    base: the base's leaf, or None.
    state: of each stage, resolved for this leaf.
    shared: last carry of each counting stage among the first `count`.

  Returns:
    a tuple of arrays or codes.
  """
  return run_opened(method, count, leaf, deltas, base, state, shared)[0]


def run_opened(
  method: Transform,
  count: int,
  leaf: placement.Leaf,
  deltas: tuple[Array, ...],
  base: Array,
  state: Sequence[Any],
  shared: Sequence[Any],
) -> tuple[Any, tuple[Any, ...]]:
  """Returns `run_prefix`, and what brackets hold that are still open.

  Args:
    method: see `run_prefix`.
    count: see `run_prefix`.
    leaf: see `run_prefix`.
    deltas: see `run_prefix`.
    base: see `run_prefix`.
    state: see `run_prefix`.
    shared: see `run_prefix`.
  """
  held: list[Any] = []
  for (step, options), state_, shared_ in list(
    zip(method.stages, state, shared, strict=True)
  )[:count]:
    deltas = tuple(d if hasattr(d, "at") else d.dense() for d in deltas)
    more = {"held": held.pop()} if step.bracket == "closes" else {}
    out = step.update(
      leaf, deltas, base, state_, shared_, **more, **dict(options)
    )
    if step.bracket == "opens":
      out, kept = out
      held.append(kept)
    deltas = out if isinstance(out, tuple) else (out,)
  return deltas, tuple(held)
