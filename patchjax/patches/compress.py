"""compress: run an encoding over a patch, then hold it in the fewest bytes."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from patchjax.patches import encode, engine, leafwise
from patchjax.patches.codes import Code, Dense, LowRank, Quantized, Sparse
from patchjax.patches.deltas import Delta
from patchjax.patches.laws import LAWS
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform

Choice = Literal["auto", "dense", "sparse"]


def compress(
  patch: Patch,
  transform: Transform | None = None,
  *,
  code: Choice = "auto",
  state: Any = None,
) -> Patch:
  """Returns a patch in fewer bytes.

  What is lost is lost in the transform, which acts on the deltas of law `add`
  (a share such as `trim`'s density is a share of their numbers). The code is
  then chosen without loss. Runs outside `jit`: which code is smallest depends
  on the numbers.

  Args:
    patch: a patch.
    transform: `trim`, `ternarize`, `truncate`, `quantize`, or a chain of
      them; None to choose codes only.
    code: "auto": of all codes that hold the same numbers the one with the
      fewest bytes, and no delta where nothing changes; "dense" or "sparse":
      this one, for every delta that is an array after the transform.
    state: of the transform's steps; by default its own numbers.

  Returns:
    A patch of the same structure and base.

  Raises:
    NonFiniteError: if a delta that is transformed holds NaN or Inf.
    ValueError: if the transform reduces contributors (a merge), or the code
      is unknown.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((100, 10), np.float32)}
    >>> tuned = {"w": np.arange(1000, dtype=np.float32).reshape(100, 10)}
    >>> patch = pj.diff(base, tuned)
    >>> small = pj.compress(
    ...     patch, pj.chain(pj.trim(density=0.05), pj.ternarize()))
    >>> small, patch.nbytes, small.nbytes
    (Patch(1 x add sparse quantized), 4000, 211)
  """
  if code not in ("auto", "dense", "sparse"):
    raise ValueError(f"code must be 'auto', 'dense' or 'sparse', got {code!r}")
  deltas = dict(patch.deltas)
  if transform is not None:
    if transform.reducing:
      raise ValueError(
        f"{transform} merges contributors into one; to compress a patch use "
        "steps that keep it one, such as trim or quantize"
      )
    deltas |= _transformed(patch, transform, state)
  chosen = {}
  for name, delta in deltas.items():
    if isinstance(delta, Delta):
      delta = _recoded(delta, code)
    if delta is not None:
      chosen[name] = delta
  return patch.replace(chosen)


def _transformed(
  patch: Patch, transform: Transform, state: Any
) -> dict[str, Delta]:
  sums = {
    name: delta
    for name, delta in patch.deltas.items()
    if isinstance(delta, Delta) and delta.law == "add"
  }
  leaves, shapes = {}, {}
  for name, delta in sums.items():
    work = leafwise.Work(None, (leafwise.held_dense(None, delta),))
    leaves[name] = lambda work=work: work
    shapes[name] = work.shape
  results = engine.run(
    transform, state, leaves, shapes, contributors=1, as_params=False
  )
  return {name: Delta(_as_code(out[0]), "add") for name, out in results}


def _as_code(out: Any) -> Code:
  return Dense(out) if hasattr(out, "at") else out


def _recoded(delta: Delta, choice: Choice) -> Delta | None:
  """Returns the delta in the chosen code; None where it changes nothing."""
  law, code = delta.law, delta.code
  fill = LAWS[law].identity
  if fill is None or not _on_host(code):
    return delta
  if isinstance(code, LowRank):
    return delta if choice != "auto" or _any(code.a, code.b) else None
  if isinstance(code, Quantized):
    if choice != "auto":
      return delta
    return (
      Delta(encode.smallest_quantized(code), law)
      if _any(code.words, code.scales)
      else None
    )
  if choice == "dense":
    return (
      delta
      if isinstance(code, Dense)
      else Delta(Dense(code.dense(fill=fill)), law)
    )
  if isinstance(code, Sparse):
    if choice == "auto" and not len(code.indices):
      return None
    if law == "bits" or isinstance(code.values, Quantized):
      return delta
  values = np.asarray(
    code.dense(fill=fill) if isinstance(code, Sparse) else code.values
  )
  if choice == "sparse":
    return Delta(encode.sparse(values, fill), law)
  if (values == values.dtype.type(fill)).all():
    return None
  best = encode.smallest(values, fill)
  # What is on the device stays there, if it stays as it is.
  return (
    delta
    if type(best) is type(code) and not isinstance(best, Sparse)
    else Delta(best, law)
  )


def _any(*arrays: Any) -> bool:
  return all(np.any(np.asarray(x)) for x in arrays)


def _on_host(code: Code) -> bool:
  return all(
    not isinstance(x, jax.Array) or x.is_fully_addressable
    for x in jax.tree.leaves(code)
  )
