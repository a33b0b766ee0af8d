"""The table of merge methods that `test_methods.py` goes through.

How to add a method: give it a row in `CASES` (or in a table of a module of
its own, merged into `CASES` at the end of this one), under the name it has in
`patchjax.merging`. A method may have more rows, `"name/variant"`. The row
says with which options to call it; the same options go to the reference of
that name in `tests/reference/merging_*.py`. From the row the tests derive:

  * equality with the reference: float32 to 1e-6 of a leaf's largest number,
    bfloat16 and float16 as the correctly rounded result in 99.9 % of entries;
  * the same answer eagerly, under jit, from files, on an Auto and on an
    Explicit mesh of 8 devices: the same bits, if the row says `exact`;
  * structure, dtype and sharding, also of `eval_shape`;
  * no compilation when numbers change (`swept`);
  * that the order of contributors does not matter (`symmetric`), nor the
    order of leaves, nor, if the row says `local`, which other leaves exist;
  * that one contributor, or equal ones, are the result (`alone`, `agreed`).

Outputs of mergekit are found by the names of methods in `tests/golden`: no
row is needed for them, beyond that a method takes `flavour="mergekit"` where
it differs.

A compilation is what a test costs. So all leaves have one shape and share a
program; a row that is a variant of another is run in fewer places, and so is
one that says `heavy`, because its programs take more than half a second each.
Give those two contributors rather than three. `test_methods.py` says what is
run where.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

P = jax.sharding.PartitionSpec

DTYPES = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}

SHAPE = (32, 16)
SPEC = P("x", "y")


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to call a method.

  Attributes:
    options: keyword options of the method and of its reference.
    only_method: further options of the method alone (a key, rng).
    swept: other values for some of the options: numbers, which must not
      compile anything.
    base: whether there is a base.
    contributors: how many.
    masks: of a random method, `(base, models, options) -> masks`: what the
      reference is given, one `{leaf: bool array or None}` a contributor.
    exact: whether the result has the same bits however it is run. Not so for
      methods that sum floats over a leaf.
    symmetric: whether contributors may be permuted (with those options that
      are lists of one number a contributor).
    local: whether a leaf's result depends on that leaf alone: not so for
      methods that count or measure whole models.
    alone: options under which a single contributor is the result; None if
      there are none.
    agreed: options under which contributors that are all equal are the
      result; None if there are none.
    heavy: whether it takes long to compile.
    close: in float32, the largest error as a share of a leaf's largest number.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only_method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  swept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: bool = True
  contributors: int = 3
  masks: Callable[..., list[dict[str, Any]]] | None = None
  exact: bool = True
  symmetric: bool = True
  local: bool = True
  alone: Mapping[str, Any] | None = None
  agreed: Mapping[str, Any] | None = None
  heavy: bool = False
  close: float = 1e-6


WEIGHTS = [0.5, 1.25, 0.75]
OTHER = [1.0, 0.25, 0.5]

CASES: dict[str, Case] = {
  # Averages.
  "linear": Case(
    {"weights": WEIGHTS}, swept={"weights": OTHER}, alone={}, agreed={}
  ),
  "linear/baseless": Case({"weights": WEIGHTS}, base=False),
  "linear/sum": Case({"weights": WEIGHTS, "normalize": False}, base=False),
  "task_arithmetic": Case(
    {"weights": WEIGHTS, "scale": 0.4},
    swept={"weights": OTHER, "scale": 0.3},
    alone={"scale": 1.0, "weights": 1.0},
  ),
  "passthrough": Case(
    {"scale": 0.5}, swept={"scale": 0.25}, contributors=1, alone={"scale": 1.0}
  ),
  "uniform_soup": Case(alone={}, agreed={}),
  "wise_ft": Case(
    {"alpha": 0.25}, swept={"alpha": 0.75}, contributors=1, alone={"alpha": 1.0}
  ),
  "ema": Case(
    {"decay": 0.75},
    swept={"decay": 0.5},
    symmetric=False,
    alone={},
    agreed={"decay": 0.5},
  ),
  "lawa": Case({"window": 2}, symmetric=False, alone={"window": 1}),
  # On spheres: lengths and angles are sums of floats.
  "slerp": Case(
    {"t": 0.3},
    swept={"t": 0.6},
    base=False,
    contributors=2,
    exact=False,
    symmetric=False,
    agreed={},
  ),
  "slerp/from_base": Case(
    {"t": 0.3},
    {"from_base": True},
    contributors=1,
    exact=False,
    alone={"t": 1.0},
  ),
  "nuslerp": Case(
    {"weights": WEIGHTS[:2]},
    swept={"weights": OTHER[:2]},
    base=False,
    contributors=2,
    exact=False,
    agreed={},
  ),
  "nuslerp/task_vectors": Case(
    {"weights": WEIGHTS[:2]},
    {"task_vectors": True},
    contributors=2,
    exact=False,
    agreed={},
  ),
  "nuslerp/columns": Case(
    {"weights": WEIGHTS[:2], "flatten": False},
    base=False,
    contributors=2,
    exact=False,
  ),
  "nuslerp/rows": Case(
    {"weights": WEIGHTS[:2], "flatten": False, "row_wise": True},
    {"task_vectors": True},
    contributors=2,
    exact=False,
  ),
  "multislerp": Case(
    {"weights": WEIGHTS},
    swept={"weights": OTHER, "epsilon": 1e-7},
    base=False,
    exact=False,
    alone={},
    agreed={},
  ),
  "multislerp/task_vectors": Case(
    {"weights": WEIGHTS, "normalize": False},
    {"task_vectors": True},
    exact=False,
    alone={},
  ),
  "karcher": Case(
    {"weights": WEIGHTS},
    swept={"weights": OTHER, "tolerance": 1e-3},
    base=False,
    exact=False,
    alone={},
    agreed={},
  ),
  # Coefficients.
  "model_stock": Case(exact=False, agreed={}),
  "model_stock/rows": Case({"filter_wise": True}, exact=False, agreed={}),
  "metagpt": Case(
    {"scale": 0.7},
    swept={"scale": 1.1},
    exact=False,
    local=False,
    alone={"scale": 1.0},
    agreed={"scale": 1.0},
  ),
  "lines": Case(
    {"beta": 0.4},
    swept={"beta": 0.8},
    local=False,  # the depth of a leaf depends on how many blocks there are
    alone={"beta": 0.0},
    agreed={"beta": 0.0},
  ),
  "lines/alpha": Case({"alpha": 0.2, "beta": 0.4}),
  # Robust aggregation.
  "median": Case(contributors=4, alone={}, agreed={}),
  "median/odd": Case(contributors=5, base=False, agreed={}),
  "trimmed_mean": Case(
    {"drop": 1}, contributors=4, alone={"drop": 0}, agreed={}
  ),
  "geometric_median": Case(
    {"weights": WEIGHTS},
    swept={"weights": OTHER, "epsilon": 1e-3},
    exact=False,
    local=False,
    alone={},
    agreed={},
  ),
  "krum": Case(contributors=5, exact=False, local=False, alone=None, agreed={}),
  "krum/multi": Case(
    {"attackers": 2, "chosen": 3}, contributors=7, exact=False, local=False
  ),
  "centered_clipping": Case(
    {"radius": 1.5, "iterations": 3},
    swept={"radius": 0.5},
    exact=False,
    local=False,
    alone={"radius": 1e9},
    agreed={"radius": 1e9},
  ),
}


def method_of(name: str) -> str:
  """The method a row is about."""
  return name.split("/")[0]


# ---------------------------------------------------------------------------
# Models.


def model(seed: int, dtype: str, spread: float = 1.0) -> Any:
  """A tree of random leaves of one shape, and an integer."""
  rng = np.random.default_rng(seed)

  def draw():
    return (spread * rng.standard_normal(SHAPE)).astype(DTYPES[dtype])

  layers = {str(i): {"kernel": draw()} for i in range(2)}
  return {"layers": layers, "step": np.int32(7)}


def models(count: int, dtype: str = "float32") -> tuple[Any, list[Any]]:
  """A base, and contributors around it.

  Args:
    count: how many contributors.
    dtype: of the leaves.
  """
  base = model(0, dtype)

  def add(x, d):
    if x.dtype == np.int32:
      return x
    return (np.float32(x) + np.float32(d)).astype(x.dtype)

  near = [model(i + 1, dtype, spread=0.1) for i in range(count)]
  return base, [jax.tree.map(add, base, d) for d in near]


def named(tree: Any) -> dict[str, np.ndarray]:
  """The floating point leaves by text name, wide enough to hold them."""
  return {
    f"layers/{i}/kernel": np.asarray(layer["kernel"]).astype(np.float32)
    for i, layer in sorted(tree["layers"].items())
  }


def put(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The tree on a mesh with axes x (4) and y (2)."""

  def place(x):
    spec = SPEC if x.ndim == 2 else P()
    return jax.device_put(
      jnp.asarray(x), jax.sharding.NamedSharding(mesh, spec)
    )

  return jax.tree.map(place, tree)
