"""Writes mergekit.npz: what mergekit 0.1.5 answers on small models.

Run by hand, in an environment of its own, which patchjax never imports:

  python3.11 -m venv /tmp/mergekit
  /tmp/mergekit/bin/pip install "torch==2.13.0+cpu" "mergekit==0.1.5" numpy
  /tmp/mergekit/bin/python tests/golden/make_mergekit.py

Every case calls mergekit's public `merge_tensors` leaf by leaf, as mergekit
itself merges a checkpoint. The file holds, for each case, the settings in the
names of `tests/reference/merging_*.py` (JSON under "cases"), the merged leaves
and, for random methods, the Bernoulli draws that mergekit made.

Models lie on a grid of 2**-22, so that task vectors are exact in float32, and
no two entries of a task vector have one magnitude, so that no rule about equal
magnitudes is needed to repeat a selection.
"""

import json
import pathlib

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors

SHAPES = {
  "embed": (7, 5),
  "layers.0.kernel": (24, 20),
  "layers.0.bias": (20,),
  "layers.1.kernel": (20, 24),
  "layers.1.conv": (3, 4, 5),
  "norm.scale": (16,),
  "tiny": (9, 8),  # numbers below most of mergekit's floors and thresholds
}
GRID = 2.0**-22
WEIGHTS = [0.5, 1.25, 0.75]

# mergekit's name for a setting of the references.
RENAMED = {
  "weights": "weight",
  "scale": "lambda",
  "flatten": "nuslerp_flatten",
  "row_wise": "nuslerp_row_wise",
  "iterations": "max_iter",
  "tolerance": "tol",
  "threshold": "epsilon",
}
RENAMED_FOR = {
  ("multislerp", "normalize"): "normalize_weights",
  ("multislerp", "epsilon"): "eps",
  ("sce", "density"): "select_topk",
  ("passthrough", "scale"): "scale",
}
METHOD = {"ramplus": "ramplus_tl"}


def distinct(numbers):
  """The integers, some moved until no two have one magnitude; none is 0."""
  seen, out = set(), []
  for number in numbers:
    sign = -1 if number < 0 else 1
    magnitude = max(1, abs(int(number)))
    while magnitude in seen:
      magnitude += 1
    seen.add(magnitude)
    out.append(sign * magnitude)
  return np.array(out)


def leaf(integers, shape):
  return (integers * GRID).astype(np.float32).reshape(shape)


def models():
  """A base and three contributors, of unequal spread, some entries shared."""
  rng = np.random.default_rng(20240607)
  base, others = {}, [{}, {}, {}]
  for name, shape in SHAPES.items():
    n = int(np.prod(shape))
    size = 2e-4 if name == "tiny" else 1.0
    origin = np.clip(rng.normal(0, 0.3, n), -0.9, 0.9) * size
    origin = np.round(origin / GRID).astype(np.int64)
    common = rng.normal(0, 0.02, n)
    deltas = []
    for spread in (0.01, 0.03, 0.02):
      delta = common + spread * rng.standard_t(4, n)
      delta = np.clip(delta, -0.5, 0.5) * size / GRID
      deltas.append(distinct(np.round(delta)))
    # A tenth of the entries is not touched; two contributors cancel in some.
    for delta in deltas:
      delta[rng.random(n) < 0.1] = 0
    cancel = rng.choice(n, max(1, n // 40), replace=False)
    deltas[1][cancel] = -deltas[0][cancel]
    deltas[2][cancel[: len(cancel) // 2]] = 0
    if name == "norm.scale":
      deltas[2][:] = 0  # this contributor left the leaf as it was
    base[name] = leaf(origin, shape)
    for other, delta in zip(others, deltas):
      other[name] = leaf(origin + delta, shape)
  return base, others


def cases():
  """(name, method, base?, contributors, settings, leaves, dtype) of each."""
  out = []

  def add(method, base=True, use=(0, 1, 2), leaves=None, dtype="float32", **s):
    out.append(
      {
        "method": method,
        "base": base,
        "contributors": list(use),
        "settings": s,
        "leaves": list(leaves or SHAPES),
        "dtype": dtype,
      }
    )

  few = ["embed", "layers.0.bias", "layers.1.conv", "norm.scale", "tiny"]
  rows = [x for x in SHAPES if x != "layers.1.conv"]
  w = WEIGHTS
  add("linear", base=False, weights=w)
  add("linear", base=False, weights=w, normalize=False, leaves=few)
  for t in (0.3, 0.8):
    add("slerp", use=[1], t=t)
  add("slerp", use=[2], t=0.6, leaves=few)  # norm.scale is the base's: linear
  for base in (False, True):
    add("nuslerp", base=base, use=[0, 1], weights=[0.5, 1.25])
    for row_wise in (False, True):
      add(
        "nuslerp",
        base=base,
        use=[0, 1],
        weights=[0.5, 1.25],
        flatten=False,
        row_wise=row_wise,
        leaves=few if base else None,
      )
    add("multislerp", base=base, weights=w)
    add("multislerp", base=base, weights=w, normalize=False, leaves=few)
  add("nuslerp", base=False, use=[0, 1], weights=[1.0, -1.0], leaves=few)
  add("karcher", base=False)
  add("karcher", base=False, iterations=1, leaves=few)
  add("karcher", base=False, use=[0, 1], tolerance=1e-3, leaves=few)
  add("task_arithmetic", weights=w)
  add("task_arithmetic", weights=w, normalize=True, scale=0.4, leaves=few)
  for normalize in (True, False):
    add("ties", weights=w, density=[0.2, 0.5, 0.8], normalize=normalize)
  add("ties", weights=w, density=0.3, rescale=True, scale=0.7, leaves=few)
  add("ties", weights=[1.0, 1.0, 1.0], density=1.0, leaves=few)
  add("ties", weights=[1.0, -0.5, 1.0], density=0.01, leaves=few)
  for method in ("dare_linear", "dare_ties"):
    add(method, weights=w, density=[0.3, 0.5, 1.0])
    add(
      method,
      weights=w,
      density=0.5,
      rescale=False,
      normalize=True,
      scale=0.7,
      leaves=few,
    )
  for method in ("della", "della_linear"):
    add(method, weights=w, density=[0.3, 0.5, 0.7], epsilon=0.2, leaves=rows)
    add(
      method,
      weights=w,
      density=0.6,
      epsilon=[0.1, 0.15, 0.2],
      rescale=False,
      normalize=method != "della",
      scale=0.7,
      leaves=few,
    )
  for method in ("breadcrumbs", "breadcrumbs_ties"):
    add(method, weights=w, density=[0.3, 0.5, 0.8], gamma=[0.01, 0.05, 0.1])
    add(
      method,
      weights=w,
      density=[0.97, 0.5, 1.0],  # less than gamma is left to drop; all kept
      gamma=0.1,
      rescale=True,
      normalize=True,
      scale=0.7,
      leaves=few,
    )
  add("sce", density=0.3)
  add("sce", leaves=few)
  add("sce", density=0.01, leaves=few)
  add("ram")
  add("ram", threshold=0.02, leaves=few)
  add("ramplus", threshold=0.02, r=0.3, alpha=0.9)
  add("ramplus", leaves=few)
  for filter_wise in (False, True):
    add("model_stock", filter_wise=filter_wise)
  add("model_stock", use=[0, 1], leaves=few)
  add("nearswap", use=[1], t=0.005)
  add("nearswap", use=[1], t=5e-7, leaves=["tiny"])
  # Divergences of tiny rows are rounding errors in float32.
  add("arcee_fusion", use=[1], leaves=[x for x in SHAPES if x != "tiny"])
  add("passthrough", base=False, use=[1], scale=0.5, leaves=few)
  add("passthrough", base=False, use=[1], leaves=few)
  for method, settings in (
    ("linear", {"weights": w, "base": False}),
    ("slerp", {"use": [1], "t": 0.3}),
    ("task_arithmetic", {"weights": w}),
    ("nearswap", {"use": [1], "t": 0.005}),
  ):
    add(method, dtype="bfloat16", **settings)
  return out


def settings_of(case):
  out = {}
  for key, value in case["settings"].items():
    name = RENAMED.get(key, key)
    out[RENAMED_FOR.get((case["method"], key), name)] = value
  if case["method"] == "passthrough" and "scale" in out:
    out["scale"] = [out["scale"]]
  return out


def main():
  base, others = models()
  arrays = {f"base/{k}": v for k, v in base.items()}
  for i, other in enumerate(others):
    arrays |= {f"model{i}/{k}": v for k, v in other.items()}

  drawn = []
  bernoulli = torch.bernoulli

  def recorded(probabilities, *args, **kwargs):
    mask = bernoulli(probabilities, *args, **kwargs)
    drawn.append(mask.numpy().astype(bool))
    return mask

  torch.bernoulli = recorded
  listed = cases()
  for index, case in enumerate(listed):
    torch.manual_seed(index)
    dtype = getattr(torch, case["dtype"])
    densities = case["settings"].get("density", 1.0)
    if not isinstance(densities, list):
      densities = [densities] * len(case["contributors"])
    for name in case["leaves"]:
      drawn.clear()
      used = [others[i][name] for i in case["contributors"]]
      if case["base"]:
        used = [base[name], *used]
      merged = merge_tensors(
        [torch.from_numpy(x).to(dtype) for x in used],
        METHOD.get(case["method"], case["method"]),
        parameters=settings_of(case),
        base_index=0 if case["base"] else None,
      )
      assert merged.dtype == dtype and torch.isfinite(merged).all(), case
      merged = merged.float().numpy()
      if case["dtype"] == "bfloat16":
        merged = (merged.view(np.uint32) >> 16).astype(np.uint16)
      arrays[f"case{index}/{name}"] = merged
      # A density of 1 draws nothing.
      draws = iter(drawn)
      for i, density in enumerate(densities):
        if case["method"].startswith(("dare", "della")) and density < 1:
          mask = next(draws).reshape(SHAPES[name])
          arrays[f"mask{index}/{i}/{name}"] = np.packbits(mask)
      assert next(draws, None) is None, "a draw that no contributor made"
  arrays["cases"] = np.array(json.dumps(listed))
  path = pathlib.Path(__file__).with_name("mergekit.npz")
  np.savez_compressed(path, **arrays)
  print(len(listed), "cases,", path.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
