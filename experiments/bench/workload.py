"""What the benchmarks work on."""

from __future__ import annotations

from typing import Any

import numpy as np


def tree(seed: int, width: int = 384, layers: int = 6) -> dict[str, Any]:
  """Random parameters with the shapes of MiniLM."""
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)

  return {
    "embed": normal(30522, width),
    "layers": {
      str(i): {
        "attention": [normal(width, width) for _ in range(4)],
        "mlp": [normal(width, 4 * width), normal(4 * width, width)],
        "vectors": [normal(width) for _ in range(9)] + [normal(4 * width)],
      }
      for i in range(layers)
    },
  }
