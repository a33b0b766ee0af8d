"""Whether a merge of models too large for memory is right, bit for bit.

The models of `merging_scale` are mostly holes, and what is not is drawn again
from its seeds whenever it is needed, some rows at a time. Where TIES cuts a
contributor is found by sorting what lies in a narrow band about the place that
a sample shows; so nothing here counts as the library does.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

CONTRIBUTORS = 4
COLUMNS = 4096
WRITTEN = 16  # one row of so many
_ROWS = 512  # drawn at a time
_SAMPLED = 64  # one row of so many

Shapes = Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Checked:
  """What was compared.

  Attributes:
    entries: how many, those in holes among them.
    wrong: how many of them are others.
    tied: entries that cancel, so that the majority sign says what they are.
    merged: entries in which the result is not the base.
  """

  entries: int
  wrong: int
  tied: int
  merged: int

  @property
  def right(self) -> bool:
    """Whether all are right, and some were there to be wrong."""
    return not self.wrong and self.tied > 0 and self.merged > 0

  def __str__(self) -> str:
    return (
      f"{self.entries} entries beside NumPy's: {self.wrong} others; "
      f"{self.merged} are not the base's, {self.tied} have the majority's sign"
    )


def parts(leaves: Shapes, seed: int) -> Iterator[tuple[str, int, np.ndarray]]:
  """Yields `(leaf, first row, rows)` of what is written of a model.

  Args:
    leaves: shapes by name.
    seed: of the model.
  """
  rng = np.random.default_rng(seed)
  for name, (rows, columns) in leaves.items():
    for row in range(0, rows // WRITTEN, _ROWS):
      size = min(_ROWS, rows // WRITTEN - row)
      some = rng.standard_normal((size, columns), np.float32)
      # The upper half of a float32: the bfloat16 towards zero.
      upper = some.view(np.uint16).reshape(size, columns, 2)[..., 1]
      yield name, row, np.ascontiguousarray(upper)


def _wide(words: np.ndarray) -> np.ndarray:
  return (words.astype(np.uint32) << 16).view(np.float32)


def _deltas(
  leaves: Shapes,
) -> Iterator[tuple[str, int, np.ndarray, list[np.ndarray]]]:
  """Yields `(leaf, first row, base, task vectors)`, float32."""
  models = [parts(leaves, seed) for seed in range(CONTRIBUTORS + 1)]
  for pieces in zip(*models, strict=True):
    base, *others = (_wide(words) for *_, words in pieces)
    yield *pieces[0][:2], base, [x - base for x in others]


def cuts(leaves: Shapes, density: float) -> list[np.float32]:
  """Returns the least magnitude of each contributor that TIES keeps.

  Args:
    leaves: shapes by name.
    density: the share that is kept; one entry more is, as in the paper's code.
  """
  size = sum(rows * columns for rows, columns in leaves.values())
  k = int(density * size) + 1
  samples: list[list[np.ndarray]] = [[] for _ in range(CONTRIBUTORS)]
  numbers = 0
  for _, _, base, deltas in _deltas(leaves):
    numbers += base.size
    for sample, delta in zip(samples, deltas, strict=True):
      sample.append(np.abs(delta[::_SAMPLED]).reshape(-1))
  if k > numbers - numbers // 100:
    raise ValueError(f"{density} must be less than the share that is written")
  bands = []
  for sample in samples:
    drawn = np.sort(np.concatenate(sample))
    # Ten standard deviations, or more, of how many of a sample are above.
    away = 5 * np.sqrt(drawn.size)
    at = drawn.size * (1 - k / numbers) + np.array([-away, away])
    bands.append(drawn[np.clip(at.astype(int), 0, drawn.size - 1)])
  inside: list[list[np.ndarray]] = [[] for _ in range(CONTRIBUTORS)]
  above = [0] * CONTRIBUTORS
  for *_, deltas in _deltas(leaves):
    for i, delta in enumerate(deltas):
      size_of, (low, high) = np.abs(delta), bands[i]
      above[i] += int(np.count_nonzero(size_of > high))
      inside[i].append(size_of[(size_of >= low) & (size_of <= high)])
  found = []
  for higher, some in zip(above, inside, strict=True):
    every = np.sort(np.concatenate(some))[::-1]
    if not higher < k <= higher + every.size:
      raise AssertionError("the sample was misleading")
    found.append(every[k - higher - 1])
  return found


def _trimmed(
  deltas: list[np.ndarray], at: list[np.float32]
) -> list[np.ndarray]:
  nought = np.float32(0)
  return [np.where(np.abs(x) >= cut, x, nought) for x, cut in zip(deltas, at)]


def _sum(arrays: list[np.ndarray]) -> np.ndarray:
  """Returns the sum, in order: float32 sums are not associative."""
  total = arrays[0]
  for x in arrays[1:]:
    total = total + x
  return total


def check(leaves: Shapes, density: float, out: pathlib.Path) -> Checked:
  """Compares a merge by TIES with what it should be.

  Args:
    leaves: shapes by name, in order.
    density: that the merge was made with.
    out: folder of the result, in shards.
  """
  at = cuts(leaves, density)
  more = tied = 0
  for *_, deltas in _deltas(leaves):
    kept = _trimmed(deltas, at)
    total = _sum(kept)
    more += int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))
    tied += int(np.count_nonzero((total == 0) & np.any(kept, axis=0)))
  found = _arrays(out)
  wrong = merged = 0
  for name, row, base, deltas in _deltas(leaves):
    kept = _trimmed(deltas, at)
    total = _sum(kept)
    up = (total > 0) | ((total == 0) & (more > 0))
    agree = [np.where(up, x > 0, x < 0) for x in kept]
    voices = _sum([x.astype(np.float32) for x in agree])
    total = _sum([np.where(a, x, np.float32(0)) for x, a in zip(kept, agree)])
    wanted = base + total / np.maximum(voices, np.float32(1))
    words = wanted.astype(ml_dtypes.bfloat16).view(np.uint16)
    here = found[name][row : row + base.shape[0]]
    wrong += int(np.count_nonzero(here != words))
    merged += int(np.count_nonzero(_wide(here) != base))
  for name, (rows, _) in leaves.items():
    for row in range(rows // WRITTEN, rows, _ROWS):
      wrong += int(np.count_nonzero(found[name][row : row + _ROWS]))
  entries = sum(x.size for x in found.values())
  expected = sum(rows * columns for rows, columns in leaves.values())
  return Checked(entries, wrong + abs(expected - entries), tied, merged)


def _arrays(out: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the words of a model in shards, mapped."""
  index = json.loads((out / "model.safetensors.index.json").read_text())
  found = {}
  for shard in sorted(set(index["weight_map"].values())):
    with open(out / shard, "rb") as file:
      head = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(head))
    header.pop("__metadata__", None)
    for name, one in header.items():
      if one["dtype"] != "BF16" or index["weight_map"][name] != shard:
        raise AssertionError(f"{name}: {one} in {shard}")
      begin, _ = one["data_offsets"]
      found[name] = np.memmap(
        out / shard,
        np.uint16,
        "r",
        offset=8 + head + begin,
        shape=tuple(one["shape"]),
      )
  return found
