"""Writes spectral.npz: what the authors' codes answer on small models.

Run by hand, in an environment of its own with PyTorch and numpy, in a folder
with what the papers' authors published:

  pip download --no-deps fusion-bench==0.2.33 && unzip fusion_bench-*.whl
  for r in IBM/STAR gstoica27/KnOTS lyymuwu/SVC \
      apanariello4/core-space-merging; do git clone https://github.com/$r; done
  python .../tests/golden/make_spectral.py

FusionBench holds the codes of TSV-M, Iso-C, Iso-CTS and WUDI. Functions are
taken out of their files, with nothing that these import but PyTorch. Weights
are outputs by inputs. The file holds task vectors, LoRA factors, and answers.
"""

import ast
import contextlib
import math
import pathlib
import types

import numpy as np
import torch

SHAPES = {"up": (20, 12), "down": (12, 20), "bias": (12,)}
TASKS, RANK = 3, 2
FUSION = "fusion_bench/method"


def functions(path, *names, **more):
  """The functions of a file, wherever in it they are."""
  tree = ast.parse(pathlib.Path(path).read_text())
  found = [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and node.name in names
  ]
  spaces = {
    "torch": torch,
    "math": math,
    "tqdm": types.SimpleNamespace(write=print),
    "timeit_context": lambda what: contextlib.nullcontext(),
    **more,
  }
  future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
  module = ast.fix_missing_locations(ast.Module([future, *found], []))
  exec(compile(module, str(path), "exec"), spaces)
  return types.SimpleNamespace(**{name: spaces[name] for name in names})


def silent(items, **_):
  """What shows progress."""
  return items


silent.write = lambda text: None


def main():
  """Draws the models, asks, and writes."""
  rng = np.random.default_rng(0)
  tasks = [
    {n: np.float32(0.1 * rng.standard_normal(s)) for n, s in SHAPES.items()}
    for _ in range(TASKS)
  ]
  factors = [
    {
      "b": np.float32(rng.standard_normal((20, RANK))),
      "a": np.float32(rng.standard_normal((RANK, 12))),
    }
    for _ in range(TASKS)
  ]
  arrays = {
    f"task/{i}/{n}": x for i, t in enumerate(tasks) for n, x in t.items()
  }
  arrays |= {
    f"lora/{i}/{n}": x for i, f in enumerate(factors) for n, x in f.items()
  }
  # In float64: what is recorded is the method, not its rounding.
  models = [{n: torch.tensor(x).double() for n, x in t.items()} for t in tasks]
  loras = [{n: torch.tensor(x).double() for n, x in f.items()} for f in factors]
  answers = {
    "tsv_m": tsv_m(models),
    "iso_c": iso(models, "iso_c"),
    "iso_cts": iso(models, "iso_cts", common_space_fraction=0.8),
    "wudi": wudi(models),
    "star": star(models),
    "svc": svc(models),
    "svc_paper": svc_paper(models),
    "knots": knots(models),
    "core_ties": {"w": core(loras, "ties")},
    "core_tsv_m": {"w": core(loras, "tsv")},
  }
  for method, merged in answers.items():
    for name, x in merged.items():
      arrays[f"{method}/{name}"] = x.detach().numpy().astype(np.float32)
  path = pathlib.Path(__file__).with_name("spectral.npz")
  np.savez_compressed(path, **arrays)


def tsv_m(models):
  """AntoAndGar/task_singular_vectors, in FusionBench."""
  name = "compute_and_sum_svd_mem_reduction"
  path = f"{FUSION}/task_singular_vector/utils/TSVM_utils.py"
  return getattr(functions(path, name), name)(models, accelerator="cpu")


def iso(models, name, **settings):
  """danielm1405/iso-merging, in FusionBench."""
  path = f"{FUSION}/isotropic_merging/iso_utils.py"
  code = functions(path, name)
  return getattr(code, name)(models, accelerator="cpu", **settings)


def wudi(models):
  """nathanielyvo/WUDI-Merging, in FusionBench, which averages vectors."""
  path = f"{FUSION}/wudi/wudi.py"
  code = functions(path, "wudi_merging", tqdm=silent)
  return code.wudi_merging(models, accelerator="cpu", iter_num=300)


def star(models):
  """IBM/STAR: of matrices, and then the mean."""
  code = functions("STAR/merger/STAR.py", "star")
  return {
    name: sum(code.star(m[name], 40) for m in models) / TASKS
    for name in ("up", "down")
  }


def svc(models):
  """lyymuwu/SVC, around task arithmetic."""
  code = functions("SVC/merge_func.py", "coef_cal_multi_ranks", print=silent)
  found = {}
  for name in ("up", "down"):
    stacked = torch.stack([m[name] for m in models])
    merged = 0.3 * stacked.sum(0)
    u, s, vt = torch.linalg.svd(merged, full_matrices=False)
    _, factors = code.coef_cal_multi_ranks(
      stacked, merged, u, s, vt.T, len(s), alpha=0.1
    )
    found[name] = u @ torch.diag(s / factors) @ vt
  return found


def svc_paper(models):
  """FusionBench's code of it."""
  name = "subspace_consistency_spectral_calibration_accelerated"
  path = f"{FUSION}/singular_value_calibration/utils.py"
  code = functions(
    path, name, Optional=__import__("typing").Optional,
    List=__import__("typing").List,
  )  # fmt: skip
  found = {}
  for leaf in ("up", "down"):
    own = [m[leaf] for m in models]
    found[leaf] = getattr(code, name)(
      torch.zeros_like(own[0]), own, 0.3 * sum(own), alpha=0.1,
      accelerator="cpu",
    )  # fmt: skip
  return found


def knots(models):
  """gstoica27/KnOTS: TIES of the aligned parts of all matrices."""
  align = functions(f"{FUSION}/knots/knots_utils.py", "subspace_alignment")
  code = functions(
    "KnOTS/masking_ops.py",
    "topk_values_mask",
    "resolve_zero_signs",
    "resolve_sign",
    "ties_masking",
    "chunked_disjoint_mean",
    "masked_merge",
  )
  bases, parts, shapes = [], [[] for _ in models], []
  for name in ("down", "up"):  # in the order of names, as there
    u, s, vts = align.subspace_alignment([m[name] for m in models], eps=1e-5)
    bases.append(u)
    shapes.append((len(s), vts[0].shape[1]))
    for part, vt in zip(parts, vts):
      part.append((torch.diag(s) @ vt).reshape(-1))
  vectors = [torch.cat(part) for part in parts]
  masks = code.ties_masking(vectors, topK=20)
  merged = code.masked_merge(torch.vstack(vectors) * masks, "mean")
  found, start = {}, 0
  for name, u, shape in zip(("down", "up"), bases, shapes):
    size = shape[0] * shape[1]
    found[name] = u @ merged[start : start + size].reshape(shape)
    start += size
  return found


def core(loras, method):
  """apanariello4/core-space-merging, leaf by leaf."""
  code = functions(
    "core-space-merging/task_merger.py", "get_core_matrices", "get_tsv_delta_w"
  )
  ties = functions(
    "core-space-merging/merging_functions.py",
    "topk_values_mask",
    "resolve_zero_signs",
    "resolve_sign",
    "disjoint_merge",
    "ties_merging",
  )
  self = types.SimpleNamespace(cache={})
  given = [{"w": (f["a"], f["b"])} for f in loras]
  cores, u, vt = code.get_core_matrices(self, given, "w", {})
  if method == "tsv":
    return u @ code.get_tsv_delta_w(self, cores) @ vt
  merged = ties.ties_merging([x.flatten() for x in cores], topK=30)[0]
  return u @ merged.reshape(cores[0].shape) @ vt


if __name__ == "__main__":
  main()
