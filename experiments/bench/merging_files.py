"""What a merge costs from files to files, by command: ours and mergekit's.

A base and four models of llama's shapes in bfloat16, each in two shards, as
Hugging Face lays them out. Counted are the CPU seconds of the whole process,
imports and compilation included, and the peak of its resident memory, which
includes pages of mapped files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from experiments.bench import timing, workload
from experiments.bench.history_tables import Section, Table, Target, times
from experiments.bench.merging_core import Settings
from experiments.bench.merging_methods import WEIGHTS
from experiments.bench.peers import files, mergekit_peer
from experiments.bench.peers.installing import MissingError

_MEASURED = pathlib.Path(__file__).parent / "peers" / "measured.py"
_MODELS = 4
_SHARDS = 2
_THIRD = 1 / 3
_HALF = 1 / 2

METHODS = {
  "linear": ({"weights": WEIGHTS}, {}),
  "ties": (
    {"weights": WEIGHTS, "density": 0.2, "flavour": "mergekit"},
    {"density": 0.2},
  ),
}
"""By name: our arguments, and mergekit's parameters beside the weights."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a command took.

  Attributes:
    cost: seconds.
    rss: peak of the resident memory, bytes.
  """

  cost: timing.Cost
  rss: int


def run(settings: Settings) -> Section:
  """Times the commands in turn.

  Args:
    settings: how.
  """
  folder = settings.folder / "files"
  models = write_models(folder, settings.file_params)
  commands: dict[str, Callable[[str, pathlib.Path], list[str]]] = {
    "patchjax": lambda method, out: ours(models, method, out)
  }
  remarks = []
  if settings.install:
    try:
      theirs = pathlib.Path(mergekit_peer.install()).with_name("mergekit-yaml")
      commands["mergekit"] = lambda method, out: [
        str(theirs), str(recipe(models, method)), str(out), "--quiet",
        "--no-copy-tokenizer", "--no-write-model-card",
      ]  # fmt: skip
    except MissingError as error:
      remarks.append(f"mergekit is left out: {error}")
  else:
    remarks.append("mergekit is left out: --install was not given")
  rows, targets = [], []
  for method in METHODS:
    taken: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(min(3, settings.repeats)):
      for name, command in commands.items():
        out = folder / f"out-{name}"
        taken[name].append(measured(command(method, out), folder))
        if not list(out.glob("*.safetensors")):
          raise AssertionError(f"{name} wrote nothing")
        shutil.rmtree(out)
    costs = {n: timing.joined([r.cost for r in rs]) for n, rs in taken.items()}
    peaks = {n: statistics.median(r.rss for r in rs) for n, rs in taken.items()}
    row = [method]
    for name in ("patchjax", "mergekit"):
      there = name in costs
      row += [
        times(costs[name]) if there else "-",
        f"{peaks[name] / 1e6:,.0f}" if there else "-",
      ]
    if "mergekit" in costs:
      cpu = costs["mergekit"].ratio(costs["patchjax"])
      rss = peaks["patchjax"] / peaks["mergekit"]
      row += [f"{1 / cpu:.1f}x", f"{1 / rss:.1f}x"]
      what = f"files, {method}: of mergekit's"
      targets += [
        Target.at_most(f"{what} CPU-s", cpu, round(_THIRD, 3), ""),
        Target.at_most(f"{what} peak RSS", rss, _HALF, ""),
      ]
    else:
      row += ["-", "-"]
    rows.append(row)
  size = sum(np.prod(s) for s in shapes(settings.file_params).values())
  table = Table(
    f"commands: {_MODELS} models of {size / 1e6:.0f} M parameters and their "
    f"base in bfloat16, {_SHARDS} shards each: CPU / wall ms, peak RSS in MB",
    (
      "method", "patchjax merge", "RSS", "mergekit-yaml", "RSS",
      "CPU less", "RSS less",
    ),
    rows,
  )  # fmt: skip
  shutil.rmtree(folder)
  return Section([table], targets, remarks)


def shapes(params: float) -> dict[str, tuple[int, ...]]:
  """Returns the leaves of a small llama, by the names of Hugging Face.

  Args:
    params: about how many numbers; 151e6 gives a width of 768.
  """
  # 14 layers of 12 w^2, an embedding of 44 w^2 on either end.
  width = max(64, 64 * round((params / (14 * 12 + 88)) ** 0.5 / 64))
  hidden = 8 * width // 3
  out: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (44 * width, width)
  }
  for i in range(14):
    layer = f"model.layers.{i}"
    for name in "qkvo":
      out[f"{layer}.self_attn.{name}_proj.weight"] = (width, width)
    out[f"{layer}.mlp.gate_proj.weight"] = (hidden, width)
    out[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
    out[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
    out[f"{layer}.input_layernorm.weight"] = (width,)
    out[f"{layer}.post_attention_layernorm.weight"] = (width,)
  return out | {
    "model.norm.weight": (width,),
    "lm_head.weight": (44 * width, width),
  }


def write_models(folder: pathlib.Path, params: float) -> list[pathlib.Path]:
  """Writes a base and models tuned from it; returns their folders.

  Args:
    folder: where.
    params: see `shapes`.
  """
  rng = np.random.default_rng(0)
  base = {
    name: np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)
    for name, shape in shapes(params).items()
  }
  places = [folder / f"model{i}" for i in range(_MODELS + 1)]
  for i, place in enumerate(places):
    value = workload.tuned(base, 0.1, rng) if i else base
    _write(place, workload.cast(value, ml_dtypes.bfloat16))
  return places


def _write(place: pathlib.Path, named: dict[str, np.ndarray]) -> None:
  """Writes a model in shards, with an index and a configuration."""
  place.mkdir(parents=True)
  names = list(named)
  index = {}
  for i in range(_SHARDS):
    file = f"model-{i + 1:05}-of-{_SHARDS:05}.safetensors"
    part = names[len(names) * i // _SHARDS : len(names) * (i + 1) // _SHARDS]
    files.write(place / file, {name: named[name] for name in part})
    index |= dict.fromkeys(part, file)
  total = {"total_size": sum(x.nbytes for x in named.values())}
  (place / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": total, "weight_map": index})
  )
  vocabulary, width = named["lm_head.weight"].shape
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": width,
    "intermediate_size": named["model.layers.0.mlp.up_proj.weight"].shape[0],
    "num_attention_heads": width // 64,
    "num_key_value_heads": width // 64,
    "num_hidden_layers": 14,
    "vocab_size": vocabulary,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  }
  (place / "config.json").write_text(json.dumps(config))


def ours(
  models: Sequence[pathlib.Path], method: str, out: pathlib.Path
) -> list[str]:
  """Returns our command.

  Args:
    models: folders, the base's first.
    method: its name.
    out: the folder to write.
  """
  settings, _ = METHODS[method]
  command = [sys.executable, "-m", "patchjax.cli", "merge"]
  command += ["--method", method]
  if method != "linear":
    command += ["--base", str(models[0])]
  for name, value in settings.items():
    command += ["--set", f"{name}={json.dumps(value)}"]
  return [*command, *map(str, models[1:]), "--out", str(out)]


def recipe(models: Sequence[pathlib.Path], method: str) -> pathlib.Path:
  """Writes mergekit's recipe; returns its path.

  Args:
    models: folders, the base's first.
    method: its name.
  """
  _, settings = METHODS[method]
  described: dict[str, Any] = {
    "merge_method": method,
    "dtype": "bfloat16",
    "models": [
      {"model": str(model), "parameters": {"weight": w, **settings}}
      for model, w in zip(models[1:], WEIGHTS, strict=True)
    ],
  }
  if method != "linear":
    described["base_model"] = str(models[0])
  path = models[0].with_name(f"{method}.yml")
  path.write_text(json.dumps(described))  # JSON is YAML
  return path


def measured(command: Sequence[str], folder: pathlib.Path) -> Run:
  """Runs a command, and returns what it took.

  Args:
    command: with its arguments.
    folder: for files.

  Raises:
    RuntimeError: if it fails.
  """
  found = folder / "measured.json"
  done = subprocess.run(
    [sys.executable, str(_MEASURED), str(found), *command],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "OMP_WAIT_POLICY": "passive"},
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
  taken = json.loads(found.read_text())
  return Run(timing.Cost(taken["wall"], taken["cpu"]), taken["rss"])
