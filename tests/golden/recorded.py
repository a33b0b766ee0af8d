"""Reads mergekit.npz, see make_mergekit.py."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

PATH = pathlib.Path(__file__).with_name("mergekit.npz")


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of mergekit.

  Attributes:
    name: for test ids.
    method: name of the method here (mergekit's but for `ramplus`).
    base: the base's leaves, or None if mergekit was given none.
    models: the contributors' leaves, float32.
    settings: numbers and switches in the names of `tests/reference`.
    masks: for each contributor its Bernoulli draws by leaf, None where
      mergekit drew nothing.
    dtype: "float32" or "bfloat16": models were rounded to it before the call.
    merged: mergekit's answer as float32.
  """

  name: str
  method: str
  base: dict[str, np.ndarray] | None
  models: list[dict[str, np.ndarray]]
  settings: dict[str, Any]
  masks: list[dict[str, np.ndarray | None]]
  dtype: str
  merged: dict[str, np.ndarray]


def bfloat16(x):
  """The float32 array rounded to nearest even bfloat16, as float32."""
  bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
  bits = bits + 0x7FFF + (bits >> 16 & 1)
  return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)


def cases() -> list[Case]:
  """All cases of the file, in its order."""
  with np.load(PATH) as file:
    arrays = dict(file)
  out = []
  for index, case in enumerate(json.loads(str(arrays["cases"]))):

    def model(prefix, case=case):
      leaves = {name: arrays[f"{prefix}/{name}"] for name in case["leaves"]}
      if case["dtype"] == "bfloat16":
        return {name: bfloat16(x) for name, x in leaves.items()}
      return leaves

    base = model("base")
    masks = []
    for i in range(len(case["contributors"])):
      draws = {}
      for name in case["leaves"]:
        bits = arrays.get(f"mask{index}/{i}/{name}")
        draws[name] = None
        if bits is not None:
          mask = np.unpackbits(bits, count=base[name].size)
          draws[name] = mask.astype(bool).reshape(base[name].shape)
      masks.append(draws)
    merged = {name: arrays[f"case{index}/{name}"] for name in case["leaves"]}
    if case["dtype"] == "bfloat16":
      merged = {
        name: (x.astype(np.uint32) << 16).view(np.float32)
        for name, x in merged.items()
      }
    out.append(
      Case(
        name=f"{case['method']}-{index}",
        method=case["method"],
        base=base if case["base"] else None,
        models=[model(f"model{i}") for i in case["contributors"]],
        settings=case["settings"],
        masks=masks,
        dtype=case["dtype"],
        merged=merged,
      )
    )
  return out
