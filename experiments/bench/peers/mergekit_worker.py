"""mergekit's and PyTorch's side: runs in an environment of its own.

Reads one JSON command a line and answers with one line: what it took, in
seconds on the clock and of this process. Imports nothing of patchjax.
"""

import json
import os
import sys
import time

import torch
import torch_formulas
import torch_spectral
import torch_statistical
from mergekit import merge_methods
from safetensors import torch as files

_FORMULAS = {
  **torch_formulas.METHODS,
  **torch_spectral.METHODS,
  **torch_statistical.METHODS,
}
_SMALL = 1 << 16  # what is merged once, uncounted, before anything is timed


def main() -> None:
  """Serves commands until the input ends."""
  # Whatever a library prints must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  models = []
  for line in sys.stdin:
    command = json.loads(line)
    answer = {}
    if "load" in command:
      # A copy: what is loaded is a view of the file.
      models = [
        {name: x.clone() for name, x in files.load_file(path).items()}
        for path in command["load"]
      ]
      answer = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    else:
      with torch.no_grad():
        answer = _run(models, **command)
    print(json.dumps(answer), file=answers, flush=True)


def _run(models, way, method, settings, base, count, warm=False, save=None):
  # The first file is the base's; a method without one does not get it.
  used = models[0 if base else 1 : count + 1]
  if warm:
    names = [n for n, x in models[0].items() if x.numel() <= _SMALL]
    used = [{name: model[name] for name in names} for model in used]
  start, cpu = time.perf_counter(), time.process_time()
  if way == "mergekit":
    out = merge_methods.merge_state_dicts(
      used, method, parameters=settings, base=0 if base else None
    )
  else:
    formula = _FORMULAS[method]
    first, rest = (used[0], used[1:]) if base else (None, used)
    out = {
      name: formula(first and first[name], [m[name] for m in rest], **settings)
      for name in used[0]
    }
  taken = {
    "wall": time.perf_counter() - start,
    "cpu": time.process_time() - cpu,
  }
  if save is not None:
    whole = {name: x.contiguous() for name, x in out.items()}
    files.save_file(whole, save)
  return taken


if __name__ == "__main__":
  main()
