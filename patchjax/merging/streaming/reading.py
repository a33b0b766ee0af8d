"""What a merge reads: its models, checked against each other, leaf by leaf."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from patchjax.merging import inputs
from patchjax.merging.running import check_baseless, check_reducing
from patchjax.merging.streaming import models
from patchjax.patches import engine, files, laws, leafwise
from patchjax.patches.deltas import Delta
from patchjax.patches.patch import Patch
from patchjax.patches.transform import Transform
from patchjax.trees.check import check_named
from patchjax.trees.dtypes import dtype_name, host, is_wide
from patchjax.trees.errors import BaseMismatchError, MismatchError

Methods = Mapping[Any, Transform]


class Reader:
  """Base and contributors of one merge.

  Attributes:
    base: the base; without one, the first contributor.
    baseless: whether there is no base.
    floats: shapes and dtypes of the leaves that are merged, after the cast.
    rest: names of the leaves that have no mean.
    leaves: shapes and dtypes of all leaves of the result.
    identity: of all models; fresh where nothing is known of one.
    moved: is told how many bytes were read.

  Args:
    base: see `merge_files`.
    contributors: see `merge_files`.
    methods: by selector.
    only: selector of the leaves to merge.
    dtype: that floating point leaves are cast to first, or None.
    out_dtype: that of floating point leaves of the result, or None.
  """

  def __init__(
    self,
    base: Any,
    contributors: Sequence[Any],
    methods: Methods,
    only: Any,
    dtype: np.dtype | None,
    out_dtype: np.dtype | None,
  ):
    for method in methods.values():
      check_reducing(method, len(contributors))
    self._given = list(map(_contributor, contributors))
    self.baseless = base is None
    if base is None:
      check_baseless(self._given, methods)
      self.base = self._given[0]
    else:
      self.base = models.open_model(base)
    self._dtype = dtype
    self._out_dtype = out_dtype or dtype
    held = {name: self._cast_like(x) for name, x in self.base.leaves.items()}
    self._sources = [
      self._source(held, x, f"contributor {i}")
      for i, x in enumerate(self._given)
    ]
    self.floats = inputs.floats_of(held, only)
    inputs.check_narrow(self.floats)
    self.rest = [n for n in held if not inputs.is_float(held[n])]
    self._only = only
    self.leaves = {
      name: models.Abstract(x.shape, self._out_dtype)
      if self._out_dtype is not None and inputs.is_float(x)
      else x
      for name, x in held.items()
    }
    self.identity = _identity([self.base, *contributors], self._given)
    self.moved: models.Moved = lambda count: None
    self._slots = self._slots_of()
    self._after = dict(zip(self.floats, list(self.floats)[1:]))

  def _slots_of(self) -> list[models.Slot]:
    """One for the base, for each contributor, and for what is cast."""
    every = [self.base, *(x for x in self._given if not _is_patch(x))]
    largest = max(models.nbytes(x) for m in every for x in m.leaves.values())
    return [models.Slot(largest) for _ in range(len(self._given) + 2)]

  def _cast_like(self, like: Any) -> Any:
    if self._dtype is None or not inputs.is_float(like):
      return like
    return models.Abstract(like.shape, self._dtype)

  def _source(self, held: Any, given: Any, what: str) -> Mapping[str, Any]:
    if isinstance(given, Patch):
      return inputs.of_patch(self.base.leaves, given, what)
    found = {name: self._cast_like(x) for name, x in given.leaves.items()}
    check_named(held, found, what=given.what)
    return {name: found[name] for name in held}

  @property
  def paths(self) -> set[pathlib.Path]:
    """Every file that is read."""
    every = (self.base, *self._given)
    return {p for m in every if not _is_patch(m) for p in m.paths}

  @property
  def contributors(self) -> int:
    """How many there are."""
    return len(self._given)

  def touched(self, names: Any) -> list[str]:
    """Returns those of the names that some contributor holds.

    Args:
      names: of leaves.
    """
    return [n for n in names if any(n in source for source in self._sources)]

  def check_base(self) -> None:
    """Refuses patches that were made for another base.

    Raises:
      BaseMismatchError: if a patch says so.
    """
    wanted = {g.base for g in self._given if isinstance(g, Patch)} - {None}
    if not wanted:
      return
    digest = models.digest_of(self.base, self.moved)
    for other in wanted - {digest}:
      raise BaseMismatchError(
        f"a patch was made for {str(other)[:12]}, and {self.base.what} is "
        f"{digest[:12]}; merge it with its own base"
      )

  # -------------------------------------------------------------------------
  # Leaves that are merged.

  def works(
    self, names: Sequence[str], method: Transform
  ) -> dict[str, Callable[[], leafwise.Work]]:
    """Returns what the engine reads: each leaf's arrays, when it is due.

    Args:
      names: of leaves.
      method: the method that they are merged by.
    """
    return {n: functools.partial(self._work, n, method) for n in names}

  def bytes_of(self, names: Sequence[str], method: Transform) -> int:
    """Returns how many bytes one pass over leaves reads.

    Args:
      names: of leaves.
      method: the method that they are merged by.
    """
    total = 0
    for name in names:
      given = [source.get(name) for source in self._sources]
      read = [
        x
        for x, s in zip(self._given, given)
        if s is not None and not _is_patch(x)
      ]
      read += [self.base] * self._reads_base(method, given)
      total += sum(models.nbytes(m.leaves[name]) for m in read)
    return total

  def _reads_base(self, method: Transform, given: Sequence[Any]) -> bool:
    return not self.baseless and engine.reads_base(method, given, True)

  def _work(self, name: str, method: Transform) -> leafwise.Work:
    given = [source.get(name) for source in self._sources]
    reads = self._reads_base(method, given)
    if (following := self._after.get(name)) is not None:
      every = [x for x in self._given if not _is_patch(x)]
      for model in [self.base] * reads + every:
        model.expect(following)
    params = engine.in_params(method, True)
    base = self._load(self.base, name, 0) if reads else None
    arrays = tuple(
      self._delta(name, base, one, params)
      if isinstance(one, Delta)
      else None
      if one is None
      else self._load(self._given[i], name, i + 1)
      for i, one in enumerate(given)
    )
    return leafwise.Work(base, arrays, self.floats[name])

  def _delta(self, name: str, base: Any, delta: Delta, params: bool) -> Any:
    if self._dtype is None or delta.law == "add":
      return leafwise.held_dense(base, delta, params=params)
    # Such a law is one of the base's own numbers: first changed, then cast.
    own = jax.device_put(self.base.read(name, self._slots[-1], self.moved))
    return _cast(np.asarray(laws.act(own, delta)), self._dtype)

  def _load(self, model: models.Model, name: str, slot: int) -> Any:
    """Reads a leaf to the device."""
    dtype = self._dtype
    if dtype is None or not _rounds(model.leaves[name].dtype, dtype):
      array = model.read(name, self._slots[slot], self.moved)
      return jax.block_until_ready(jax.device_put(array))
    return _cast(model.read(name, self._slots[-1], self.moved), dtype)

  # -------------------------------------------------------------------------
  # Leaves that are not.

  def check_rest(self) -> dict[str, int]:
    """Returns for leaves that have no mean whose they are: contributor's.

    Raises:
      MismatchError: if contributors differ in them; lists the leaves.
    """
    found, bad = {}, []
    if self._only is not None:
      return found
    for name in self.rest:
      holders = [i for i, s in enumerate(self._sources) if name in s]
      if not holders:
        continue
      first = host(self._whole(name, holders[0], 1))[0]
      for i in range(len(self._given)):
        # Who does not touch a leaf has the base's.
        other = first if i == holders[0] else host(self._whole(name, i, 2))[0]
        if not np.array_equal(first, other):
          bad.append(f" - {name}: {dtype_name(self.base.leaves[name])}")
          break
      found[name] = holders[0]
    if bad:
      raise MismatchError(
        "contributors differ in leaves that have no mean:\n"
        + "\n".join(bad)
        + "\nto mend it: make them equal, or leave them out with only="
      )
    return found

  def _whole(self, name: str, i: int, slot: int) -> Any:
    """Returns a leaf of one contributor as it is."""
    given, source = self._given[i], self._sources[i].get(name)
    if not isinstance(given, Patch):
      return given.read(name, self._slots[slot], self.moved)
    base = self.base.read(name, self._slots[slot], self.moved)
    return base if source is None else laws.act(base, source)

  def untouched(self, name: str, holder: int | None) -> np.ndarray:
    """Returns a leaf of the result that is not merged.

    Args:
      name: of the leaf.
      holder: the contributor that it is from; None for the base.
    """
    if holder is not None:
      return np.asarray(self._whole(name, holder, 1))
    array = self.base.read(name, self._slots[0], self.moved)
    if not inputs.is_float(array):
      return array
    for dtype in (self._dtype, self._out_dtype):
      if dtype is not None and array.dtype != dtype:
        array = np.asarray(_cast(array, dtype))
    return array

  @property
  def dtype(self) -> np.dtype | None:
    """Of merged leaves of the result; None if it is their own."""
    return self._out_dtype


def _is_patch(given: Any) -> bool:
  return isinstance(given, Patch)


def _contributor(given: Any) -> Any:
  """Opens a contributor: a patch, or a model."""
  if isinstance(given, Patch):
    return given
  if isinstance(given, str | os.PathLike) and pathlib.Path(given).is_file():
    if files.is_patch_file(given):
      return Patch.load(given)
  return models.open_model(given)


def _identity(sources: Sequence[Any], opened: Sequence[Any]) -> list[Any]:
  """Returns what is another if any source may be another."""
  first, *given = sources
  found = [first.identity]
  for source, model in zip(given, opened, strict=True):
    if not isinstance(model, Patch):
      found.append(model.identity)
    elif isinstance(source, Patch):
      found.append(None)
    else:
      content = hashlib.sha256(pathlib.Path(source).read_bytes())
      found.append(content.hexdigest())
  return found


def _rounds(own: Any, dtype: np.dtype) -> bool:
  """Returns whether a cast changes numbers, or what they are computed in."""
  own = np.dtype(own)
  if own == dtype:
    return False
  # Arithmetic is in float32 for all that fits into it.
  return not (dtype == np.float32 and own.itemsize < 4)


def _cast(array: np.ndarray, dtype: np.dtype) -> Any:
  """Returns an array in another dtype, in memory of its own."""
  if is_wide(array) or np.dtype(dtype).itemsize > 4:
    return jax.device_put(array.astype(dtype))
  return jax.block_until_ready(_cast_jit(jax.device_put(array), dtype))


@functools.partial(jax.jit, static_argnums=1)
def _cast_jit(x: Any, dtype: Any) -> Any:
  return x.astype(dtype)
