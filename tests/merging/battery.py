"""The table of merge methods that `test_methods.py` goes through.

How to add a method: give it a row in `_CASES` (or in a table of a module of
its own, of which `CASES` is made too), under the name it has in
`patchjax.merging`. A method may have more rows, `"name/variant"`. The row
says with which options to call it; the same options go to the reference of
that name in `tests/reference/merging_*.py`. From the row the tests derive:

  * equality with the reference: float32 to 1e-6 of a leaf's largest number,
    bfloat16 and float16 as the correctly rounded result in 99.9 % of entries;
  * the same answer eagerly, under jit, from files, on an Auto and on an
    Explicit mesh of 8 devices: the same bits, if the row says `exact`; in 16
    bits those of float32, rounded;
  * structure, dtype and sharding, also of `eval_shape`;
  * no compilation when numbers change (`swept`);
  * that the order of contributors does not matter (`symmetric`), nor the
    order of leaves, nor, if the row says `local`, which other leaves exist;
  * that one contributor, or equal ones, are the result (`alone`, `agreed`).

Outputs of mergekit are found by the names of methods in `tests/golden`: no
row is needed for them, beyond that a method takes `flavour="mergekit"` where
it differs.

A compilation is what a test costs. So all leaves have one shape and share a
program, and a row that is a variant of another is run on one device only. A
row says `heavy` if a program of its takes more than half a second: give it two
contributors rather than three. `test_methods.py` says what is run where.
"""

import functools

import numpy as np

from patchjax.merging import keep_mask, masks
from patchjax.patches import placement
from tests.merging import battery_spectral, battery_statistical
from tests.merging.battery_case import OTHER, WEIGHTS, Case
from tests.reference import merging_sparse


def dare_masks(base, models, options, *, rng="hash"):
  """What DARE keeps of each leaf with the key that all rows use."""
  return _drawn(base, models, options, lambda share, delta, i: share, rng)


def della_masks(base, models, options):
  """What DELLA keeps of each leaf with the key that all rows use."""
  epsilons = np.broadcast_to(options.get("epsilon", 0.15), len(models))
  mergekit = options.get("flavour") == "mergekit"
  if not mergekit and options.get("rescale", True):

    def likely(share, delta, i):
      return merging_sparse.della_probabilities(delta, share, epsilons[i])

    return _drawn(base, models, options, likely, "hash")

  shares = np.broadcast_to(options.get("density", 0.5), len(models))

  def mask(name, i):
    x = base[name]
    leaf = placement.leaf_of(x, identity=placement.identity_of(name))
    return merging_sparse.della_kept(
      np.asarray(masks.uniform(masks.uniform_bits(5, leaf, i))),
      models[i][name] - x,
      shares[i],
      epsilons[i],
      axis=1 if mergekit else -1,
    )

  return [{name: mask(name, i) for name in base} for i in range(len(models))]


def _drawn(base, models, options, likely, rng):
  shares = np.broadcast_to(options.get("density", 0.5), len(models))

  def mask(name, i):
    if shares[i] >= 1:
      return None
    p = likely(shares[i], models[i][name] - base[name], i)
    return np.asarray(keep_mask(5, name, base[name].shape, p, i, rng=rng))

  return [{name: mask(name, i) for name in base} for i in range(len(models))]


_CASES: dict[str, Case] = {
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
  # Signs.
  "ties": Case(
    {"weights": WEIGHTS, "density": 0.3, "scale": 0.7},
    swept={"weights": OTHER, "density": 0.5, "scale": 1.0},
    local=False,
    alone={"density": 1.0, "weights": 1.0, "scale": 1.0},
    agreed={"density": 1.0, "weights": 1.0, "scale": 1.0},
    heavy=True,
  ),
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
  # Sparse task vectors.
  "dare_linear": Case(
    {"weights": WEIGHTS, "density": [0.3, 0.5, 1.0], "scale": 0.7},
    {"key": 5},
    swept={"density": [0.4, 0.9, 0.2], "key": 6},
    masks=dare_masks,
    alone={"density": 1.0, "weights": 1.0, "scale": 1.0},
  ),
  "dare_linear/plain": Case(
    {"rescale": False, "normalize": True},
    {"key": 5, "rng": "threefry"},
    masks=functools.partial(dare_masks, rng="threefry"),
  ),
  "dare_ties": Case(
    {"weights": WEIGHTS[:2], "density": 0.6, "trim": 0.3},
    {"key": 5},
    swept={"density": 0.4, "trim": 0.4, "scale": 0.5},
    masks=dare_masks,
    local=False,
    alone={"density": 1.0, "trim": 1.0, "weights": 1.0},
    agreed={"density": 1.0, "trim": 1.0, "weights": 1.0},
    contributors=2,
    heavy=True,
  ),
  "della": Case(
    {"weights": WEIGHTS, "density": [0.3, 0.5, 1.0], "epsilon": 0.2},
    {"key": 5},
    swept={"density": 0.4, "epsilon": 0.1},
    masks=della_masks,
    alone={"density": 1.0, "weights": 1.0},
    agreed={"density": 1.0, "weights": 1.0},
  ),
  "della_linear": Case(
    {"density": 0.6, "scale": 0.4},
    {"key": 5},
    swept={"epsilon": 0.05, "scale": 0.3},
    masks=della_masks,
    alone={"density": 1.0, "scale": 1.0},
  ),
  "breadcrumbs": Case(
    {"weights": WEIGHTS[:2], "density": 0.5, "gamma": 0.15},
    swept={"density": 0.7, "gamma": 0.3},
    alone={"density": 1.0, "gamma": 0.0, "weights": 1.0},
    contributors=2,
    heavy=True,
  ),
  "breadcrumbs/leaf": Case(
    {"density": [0.3, 0.5, 0.2], "gamma": [0.0, 0.05, 0.3], "scope": "leaf"}
  ),
  "breadcrumbs_ties": Case(
    {"weights": WEIGHTS[:2], "density": 0.5, "gamma": 0.15, "normalize": True},
    swept={"density": 0.7, "scale": 0.3},
    alone={"density": 1.0, "gamma": 0.0, "weights": 1.0},
    agreed={"density": 1.0, "gamma": 0.0, "weights": 1.0},
    contributors=2,
    heavy=True,
  ),
  # Choices among contributors.
  "sce": Case(
    {"density": 0.4},
    swept={"density": 0.7},
    exact=False,
    alone={"density": 1.0},
    agreed={"density": 1.0},
    heavy=True,
  ),
  "ram": Case(
    {"threshold": 0.05},
    swept={"threshold": 0.1},
    alone={"threshold": 0.0},
    agreed={"threshold": 0.0},
  ),
  "ramplus": Case(
    {"threshold": 0.05, "r": 0.3},
    swept={"threshold": 0.1, "r": 0.2, "alpha": 0.5},
    local=False,
    alone={"threshold": 0.0},
    agreed={"threshold": 0.0},
  ),
  "nearswap": Case(
    {"t": 0.05}, swept={"t": 0.01}, contributors=1, alone={"t": 10.0}
  ),
  "arcee_fusion": Case(contributors=1, exact=False, heavy=True),
  "magmax": Case(
    {"scale": 0.4},
    swept={"scale": 0.5},
    alone={"scale": 1.0},
    agreed={"scale": 1.0},
  ),
  "consensus_ta": Case(
    {"threshold": [0.4, 0.5, 0.6], "scale": 0.3},
    swept={"threshold": 0.2, "agreement": 1},
    alone={"agreement": 1, "scale": 1.0},
  ),
  "emr": Case(
    {"scale": 0.9},
    swept={"scale": 0.7},
    alone={"scale": 1.0},
    agreed={"scale": 1.0},
  ),
  "pcb": Case(
    {"density": 0.3, "scale": 1.2},
    swept={"density": 0.5, "scale": 1.0},
    exact=False,
    local=False,
    contributors=2,
    heavy=True,
  ),
}

CASES = _CASES | battery_spectral.CASES | battery_statistical.CASES
"""Every row."""


def method_of(name: str) -> str:
  """The method a row is about."""
  return name.split("/")[0]
