"""LoRA patches merged in small spaces: no product of factors is ever made.

The changes `a_i b_i` of a leaf have few directions together. Core-space takes
orthonormal ones of all inputs and all outputs, and merges the small matrices
between them; KnOTS takes those of the outputs, and merges what lies along
them. Any method merges the parts; the result is a patch of low rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from patchjax.merging import running
from patchjax.merging.methods.averages import task_arithmetic
from patchjax.merging.methods.signs import ties
from patchjax.merging.spectral import factors
from patchjax.merging.spectral.bracketed import check_inner
from patchjax.patches import engine
from patchjax.patches.codes import Dense, LowRank
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform
from patchjax.trees.errors import StructureError

Array = Any


def core_space(
  patches: Sequence[Patch], *, method: Transform | None = None
) -> Patch:
  """Returns LoRA patches merged in their core space, a patch of low rank.

  Panariello et al. 2025 (https://arxiv.org/abs/2509.17786, section 4). With
  P and Q orthonormal bases of all contributors' inputs and outputs, the
  change of contributor i is `P M_i Q^T` exactly; a method merges the cores
  M_i, small matrices of at most the sum of the ranks. The patch stands for
  the dense merge `P method(M_1, ..., M_k) Q^T`. For methods that do not depend
  on a basis (`task_arithmetic`, `wudi`, `star`) that is the method's own merge
  of the dense changes; so it is for `tsv_m` if all patches have one rank.
  Those that choose entries (`ties`) choose them among those of the cores.

  As in the authors' code (apanariello4/core-space-merging), where the bases
  are the singular vectors of the factors put side by side, and TIES and
  Iso-C are run leaf by leaf: `ties(scope="leaf")`. The mean singular value of
  `iso_c` is that of the core, not of as many as the leaf has.

  Args:
    patches: patches on one base. Leaves that all hold as low-rank sums, or
      not at all, are merged by their cores, all others as they are.
    method: a transform with a reducing step that works on task vectors; by
      default `task_arithmetic()`.

  Returns:
    A patch of law `add`: low rank where the contributors are, else dense.
    `pj.compress(patch, pj.truncate(rank=...))` makes it smaller.

  Raises:
    BaseMismatchError: if the patches say that their bases differ.
    StructureError: if there is no patch, or one is structural.
    ValueError: if the method works on parameters, or reduces nothing.

  Example:
    >>> import jax, numpy as np, patchjax as pj
    >>> base = {"w": np.zeros((6, 4), np.float32)}
    >>> def patch(seed):
    ...   a, b = jax.random.normal(jax.random.key(seed), (2, 6, 4))
    ...   code = pj.patches.LowRank(a[:, :1], b[:1, :4], np.float32(1))
    ...   return pj.Patch({"w": pj.patches.Delta(code, "add")})
    >>> both = [patch(0), patch(1)]
    >>> merged = pj.merging.core_space(both)
    >>> merged.deltas["w"].code.rank
    2
    >>> total = pj.merge(base, both, pj.merging.task_arithmetic())["w"]
    >>> bool(np.allclose(pj.apply(base, merged)["w"], total, atol=1e-5))
    True
  """
  inner = task_arithmetic() if method is None else method
  check_inner("core_space", inner)
  found = {name: _core(codes) for name, codes in _low_rank(patches).items()}
  small = [
    {name: core.parts[i] for name, core in found.items()}
    for i in range(len(patches))
  ]
  return _merged(patches, small, inner, found)


def knots_of_patches(
  patches: Sequence[Patch],
  *,
  method: Transform | None = None,
  threshold: float = 1e-5,
) -> Patch:
  """Returns LoRA patches merged by KnOTS, a patch of low rank.

  `knots` (Stoica et al. 2025, https://arxiv.org/abs/2410.19735) without the
  products of the factors: the output directions U come of a small
  decomposition, the parts `d_i U` have as many columns as there are
  directions, and each leaf is decomposed once, whatever the method counts.
  The patch stands for `method(d_1 U, ..., d_k U) U^T`.

  Args:
    patches: patches on one base, see `core_space`.
    method: how the parts are merged; by default `ties()`.
    threshold: of the singular values of the directions that are kept.
      Outside of `jit` the others are left out; inside they are zeros, which a
      density counts.

  Returns:
    A patch of law `add`: low rank where the contributors are, else dense.

  Raises:
    BaseMismatchError: if the patches say that their bases differ.
    StructureError: if there is no patch, or one is structural.
    ValueError: if the method works on parameters, or reduces nothing.

  Example:
    >>> import numpy as np, patchjax as pj
    >>> a, b = np.float32([[1], [2]]), np.float32([[3, 4, 0]])
    >>> code = pj.patches.LowRank(a, b, np.float32(1))
    >>> patch = pj.Patch({"w": pj.patches.Delta(code, "add")})
    >>> same = pj.merging.knots_of_patches(
    ...     [patch], method=pj.merging.task_arithmetic())
    >>> bool(np.allclose(same.deltas["w"].code.dense(), a @ b))
    True
  """
  inner = ties() if method is None else method
  check_inner("knots_of_patches", inner)
  found = {
    name: _aligned(codes, threshold)
    for name, codes in _low_rank(patches).items()
  }
  small = [
    {name: one.parts[i] for name, one in found.items()}
    for i in range(len(patches))
  ]
  return _merged(patches, small, inner, found)


@dataclasses.dataclass(frozen=True)
class _Factored:
  """A leaf's contributors as small arrays between bases.

  Attributes:
    parts: one a contributor, None if it does not touch the leaf:
      `[*batch, p, q]`, or `[*batch, *inputs, q]` where there is no left basis.
    left: `[*batch, *inputs, p]`, or None.
    right: `[*batch, q, *outputs]`.
    batch: number of batch axes.
  """

  parts: tuple[Array | None, ...]
  left: Array | None
  right: Array
  batch: int


def _low_rank(
  patches: Sequence[Patch],
) -> dict[str, tuple[LowRank | None, ...]]:
  """The leaves whose changes are low-rank sums alone, of the same axes."""
  found = {}
  for name in sorted({name for patch in patches for name in patch.deltas}):
    deltas: list[Any] = [patch.deltas.get(name) for patch in patches]
    held = [d for d in deltas if d is not None]
    codes = [d.code for d in held if isinstance(d, Delta) and d.law == "add"]
    low = [code for code in codes if isinstance(code, LowRank)]
    alike = {(code.batch, np.ndim(code.a)) for code in low}
    if len(low) == len(held) and len(alike) == 1 and math.prod(low[0].shape):
      found[name] = tuple(d and d.code for d in deltas)
  return found


def _merged(
  patches: Sequence[Patch],
  small: Sequence[Mapping[str, Array | None]],
  method: Transform,
  found: Mapping[str, _Factored],
) -> Patch:
  """The merge of the small parts and of all other leaves, between the bases."""
  if not patches:
    raise StructureError("there is nothing to merge: patches is empty")
  parts = []
  for patch, own in zip(patches, small, strict=True):
    deltas = {n: d for n, d in patch.deltas.items() if n not in found}
    deltas |= {
      n: Delta(Dense(x), "add") for n, x in own.items() if x is not None
    }
    parts.append(Patch(deltas, base=patch.base))
  merge = running.combine(parts, method)
  deltas: dict[str, Any] = dict(merge.deltas)
  for name, one in found.items():
    if name in deltas:
      deltas[name] = Delta(_between(one, deltas[name].code.values), "add")
  structure = next((p.structure for p in patches if p.structure), None)
  return Patch(deltas, structure, base=merge.base)


def _between(found: _Factored, middle: Array) -> LowRank:
  """The low-rank code of `left @ middle @ right`."""
  one = jnp.ones((), middle.dtype)
  if found.left is None:
    like = next(x for x in found.parts if x is not None)
    return LowRank(
      factors.placed(factors.same, like, middle), found.right, one, found.batch
    )
  if middle.shape[-2] <= middle.shape[-1]:
    b = factors.placed(factors.product_after, found.right, middle, found.right)
    return LowRank(found.left, b, one, found.batch)
  a = factors.placed(factors.product_before, found.left, found.left, middle)
  return LowRank(a, found.right, one, found.batch)


def _core(codes: tuple[LowRank | None, ...]) -> _Factored:
  held = tuple(code for code in codes if code is not None)
  left = factors.placed(factors.inputs_basis, held[0].a, held)
  right = factors.placed(factors.outputs_basis, held[0].b, held)
  parts = tuple(
    None if code is None else factors.whole(factors.core, code, left, right)
    for code in codes
  )
  return _Factored(parts, left, right, held[0].batch)


def _aligned(codes: tuple[LowRank | None, ...], threshold: float) -> _Factored:
  held = tuple(code for code in codes if code is not None)
  vt, count = factors.whole(factors.directions, held, jnp.float32(threshold))
  if not engine.is_traced(count):
    vt = vt[:, : max(int(count), 1)]
  parts = tuple(
    None if code is None else factors.placed(factors.part, code.a, code, vt)
    for code in codes
  )
  right = factors.placed(factors.outputs_like, held[0].b, held[0], vt)
  return _Factored(parts, None, right, held[0].batch)
