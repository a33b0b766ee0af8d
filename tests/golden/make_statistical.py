"""Writes statistical.npz: what FusionBench answers, told statistics.

Run by hand, in an environment of its own with PyTorch, NumPy and tqdm, in a
folder with FusionBench's files:

  pip download --no-deps fusion-bench==0.2.33 && unzip fusion_bench-*.whl
  python .../tests/golden/make_statistical.py

Its codes of Fisher merging, RegMean and trust regions are called with made up
statistics. Weights are outputs by inputs. The file holds the base, models,
statistics, and answers.
"""

import copy
import pathlib
from collections import OrderedDict

import numpy as np
import torch
from make_spectral import FUSION, functions

SHAPES = {"up": (6, 4), "down": (4, 6), "bias": (4,)}
TASKS = 3
WEIGHTS = (0.5, 0.3, 0.2)


def main():
  """Draws the models, asks, and writes."""
  rng = np.random.default_rng(0)

  def model(shapes=SHAPES):
    return {n: np.float32(rng.standard_normal(s)) for n, s in shapes.items()}

  def gram(inputs):
    rows = rng.standard_normal((50, inputs))
    return np.float32(rows.T @ rows / 50)

  kinds = {
    "base": [model()],
    "model": [model() for _ in range(TASKS)],
    "diagonal": [{n: x**2 for n, x in model().items()} for _ in range(TASKS)],
    "gram": [
      {n: gram(SHAPES[n][1]) for n in ("up", "down")} for _ in range(TASKS)
    ],
    "gradient": [
      {n: np.abs(x) for n, x in model().items()} for _ in range(TASKS)
    ],
  }
  arrays = {
    f"{kind}/{i}/{n}": x
    for kind, trees in kinds.items()
    for i, tree in enumerate(trees)
    for n, x in tree.items()
  }
  given = {
    kind: [{n: torch.tensor(x).double() for n, x in t.items()} for t in trees]
    for kind, trees in kinds.items()
  }
  answers = {
    "fisher": fisher(given["model"], given["diagonal"]),
    "regmean": regmean(given["model"], given["gram"]),
    "trust_region": trust_region(
      given["base"][0], given["model"], given["gradient"]
    ),
  }
  for method, merged in answers.items():
    for name, x in merged.items():
      arrays[f"{method}/{name}"] = x.detach().numpy().astype(np.float32)
  path = pathlib.Path(__file__).with_name("statistical.npz")
  np.savez_compressed(path, **arrays)


def fisher(models, diagonals):
  """Without their floor, which is added where the paper's code cuts at it."""
  code = functions(
    f"{FUSION}/fisher_merging/fisher_merging.py",
    "get_models_fisher_norm",
    "merging_with_fisher_weights",
  )
  return code.merging_with_fisher_weights(
    {name: [m[name] for m in models] for name in SHAPES},
    diagonals,
    torch.tensor(WEIGHTS).double(),
    minimal_fisher_weight=0.0,
  )


def regmean(models, grams):
  """Leaves are weights where their names end in `.weight`."""
  code = functions(
    f"{FUSION}/regmean/regmean.py",
    "reduce_non_diagonal_elements",
    "merging_with_regmean_weights",
  )
  found = code.merging_with_regmean_weights(
    {f"{name}.weight": [m[name] for m in models] for name in SHAPES},
    grams,
    reduce_non_diagonal_ratio=0.9,
  )
  return {name.removesuffix(".weight"): x for name, x in found.items()}


def trust_region(base, models, gradients):
  """The method's `run`, of an algorithm that is asked for nothing else."""
  tools = functions(
    f"{FUSION}/trust_region/utils.py",
    "state_dict_to_vector",
    "vector_to_state_dict",
    copy=copy,
    OrderedDict=OrderedDict,
    nn=torch.nn,
  )
  code = functions(
    f"{FUSION}/trust_region/clip_task_arithmetic.py",
    "run",
    "trainable_state_dict",
    override=lambda function: function,
    first=lambda items: next(iter(items)),
    **vars(tools),
  )
  start = torch.nn.ParameterDict(base)

  class Algorithm:
    zero_shot = False
    threshold_quantile = 0.7
    scaling_factor = 0.4

    def compute_vanilla_task_vectors(self):
      tasks = [{n: m[n] - base[n] for n in base} for m in models]
      return start, dict(enumerate(tasks))

    def compute_avg_abs_grads(self, pretrained_model):
      del pretrained_model
      return dict(enumerate(gradients))

  return dict(code.run(Algorithm(), None).named_parameters())


if __name__ == "__main__":
  main()
